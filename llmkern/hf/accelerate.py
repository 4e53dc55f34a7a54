"""Take over a model that transformers has loaded: compressed-tensors, bitsandbytes, 2:4 sparse."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from llmkern.formats.bitsandbytes import METHOD as BITSANDBYTES
from llmkern.hf._sparse24 import accelerate_sparse, like
from llmkern.hf.scheme import weights_format
from llmkern.models.experts import find_expert_matrices
from llmkern.nn import Int4Linear, Lut4Linear, PackedLinear
from llmkern.patch import record_formats, warn_dense

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Run a compressed-tensors, bitsandbytes 4-bit or 2:4 sparse model on llmkern's kernels.

    transformers keeps a `pack-quantized` checkpoint packed only until the first forward pass, which
    expands every layer to dense. Called before that pass, this swaps the packed layers for
    `Int4Linear`, sharing their tensors: nothing is expanded, and saving writes the same bytes.

        model = AutoModelForCausalLM.from_pretrained("some/w4a16-checkpoint")
        model = llmkern.accelerate(model)

    A model that transformers has loaded with bitsandbytes in 4 bits gets `Lut4Linear` layers instead, at
    any time; nested scales are decoded.

    Linears whose weight is 2:4 sparse (at most two non-zeros in every 4 columns, 45 % zeros in all)
    become `Sparse24Linear`, and such `Int4Linear`, their zeros being the codes at the zero point,
    `Sparse24Int4Linear`, at any time and in any of these models; layers that share their weight stay
    dense. Saving writes the plain dense or int4 model again.

    Layers of other formats (8 bits, fp8, quantized activations ...) and MoE experts held as 3-D
    parameters stay with transformers and are listed in one warning.

    Args:
        model: from `from_pretrained`, with compressed-tensors installed and not used yet, or with
            bitsandbytes; or any model with 2:4 sparse weights, whoever loaded it.

    Returns:
        The same model, changed in place.

    Raises:
        ValueError: the first forward pass has already expanded the model, or nothing in it is packed or
            2:4 sparse.
    """
    if _method(model) == BITSANDBYTES:
        _accelerate_bitsandbytes(model)
    else:
        _accelerate_compressed_tensors(model)
    accelerate_sparse(model)
    return model


def _accelerate_compressed_tensors(model: nn.Module) -> None:
    quantized = {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    packed = {n: m for n, m in quantized.items() if "weight_packed" in m._parameters}
    if not packed:
        done = any(isinstance(module, PackedLinear) for module in model.modules())
        if not done and (quantized or not accelerate_sparse(model)):
            raise ValueError(_why_nothing_is_packed(quantized))
    if not quantized:
        return
    left = {}
    for name, module in quantized.items():
        try:
            model.set_submodule(name, _take_over(module, name))
        except ValueError as error:
            left[name] = str(error).removeprefix(f"{name}: ")
    if packed:
        left |= find_expert_matrices(model)
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()
        del model.ct_decompress_hook
    rest = [name for name in left if name in quantized]
    if not rest:
        _release(model)
    elif hook is not None:
        _expand_at_first_pass(model, rest)
    warn_dense("accelerate", left)


def _why_nothing_is_packed(quantized: dict[str, nn.Module]) -> str:
    if quantized:
        return (
            f"model: got {next(iter(quantized))} already expanded by a first forward pass, expected a "
            "model fresh from from_pretrained: load it again and call accelerate first"
        )
    return (
        "model: got no packed layer in it, expected a compressed-tensors model from from_pretrained "
        "(with compressed-tensors installed), one in bitsandbytes' 4 bits, or 2:4 sparse weights"
    )


def _take_over(module: nn.Module, name: str) -> Int4Linear:
    scheme: Any = module.quantization_scheme
    if not isinstance(module, nn.Linear) or "weight_packed" not in module._parameters:
        raise ValueError(f"{name}: its format is not pack-quantized")
    if module.weight_packed.is_meta:
        raise ValueError(f"{name}: its tensors are offloaded")
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise ValueError(f"{name}: quantized activations are not supported")
    fmt = weights_format(scheme.weights.model_dump(), name)
    own = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    layer = Int4Linear.from_packed(
        own["weight_packed"],
        own["weight_scale"],
        None if fmt.symmetric else own.get("weight_zero_point"),
        module.bias,
        in_features=module.in_features,
        format=fmt,
    )
    problem = layer.problem("weight_shape", own["weight_shape"])
    if problem:
        raise ValueError(f"{name}: {problem}")
    return like(module, layer)


def _method(model: nn.Module) -> str | None:
    """Name of the quantization with which transformers has loaded `model`."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _accelerate_bitsandbytes(model: nn.Module) -> None:
    # bitsandbytes' own linears, told by the state that only their weights have once loaded.
    layers = {
        name: module
        for name, module in model.named_modules()
        if getattr(module._parameters.get("weight"), "quant_state", None) is not None
    }
    if not layers:
        raise ValueError(
            "model: got bitsandbytes without a 4-bit layer in it, expected load_in_4bit with NF4 or FP4"
        )
    left = {}
    for name, module in layers.items():
        try:
            layer = Lut4Linear.from_bitsandbytes(module.state_dict(), module._parameters["bias"])
        except ValueError as error:
            left[name] = str(error)
        else:
            model.set_submodule(name, like(module, layer))
    if not left:
        _release(model)
        model.__dict__.pop("is_loaded_in_4bit", None)
    warn_dense("accelerate", left | find_expert_matrices(model))


def _expand_at_first_pass(model: nn.Module, names: list[str]) -> None:
    """compressed-tensors' own hook, for some modules only: it would wrap the tensors of all others."""
    from compressed_tensors.compressors import decompress_module

    def expand(model: nn.Module, args: tuple[Any, ...]) -> None:
        for name in names:
            module = model.get_submodule(name)
            if "weight" not in module._parameters:
                decompress_module(module)

    model.register_forward_pre_hook(expand)


def _release(model: nn.Module) -> None:
    """Make the model one of ours: transformers' quantizer has nothing left to do."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    record_formats(model)

"""compressed-tensors' `pack-quantized` checkpoints of 2, 3 and 4 bits: the canonical int4 layout.

Read with either packing of 3 bits: before 0.18, a word held 32 // bits codes and the rest of it was
unused; the other widths' bytes are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmkern.formats.int4 import QuantFormat, pack_codes
from llmkern.models import empty_like
from llmkern.models.experts import find_expert_matrices
from llmkern.models.linears import is_conv1d, is_linear, shape_of
from llmkern.models.replace import like, replace_modules
from llmkern.nn import IntLinear, PackedLinear, is_packed
from llmkern.wire._scheme import FORMAT, Scheme, read_scheme, weights_format
from llmkern.wire._wire import TakenOver, Wire
from llmkern.wire.checkpoint_files import CheckpointFiles
from llmkern.wire.conversions import initialised, merged, module_names, odd_classes, rebuilt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressedTensors(Wire):
    """Holds `IntLinear` layers, whose own tensors are the format's."""

    name = "compressed-tensors"
    kinds = (IntLinear,)
    takes = "a compressed-tensors model from from_pretrained (with compressed-tensors installed)"

    def reader(self, files: CheckpointFiles) -> _Reader:
        """Refuses schemes that llmkern does not read, and act-order groups."""
        scheme = read_scheme(files.config["quantization_config"], str(files.directory))
        _check_tensor_names(files)
        return _Reader(files, scheme)

    def describe(
        self, layers: Mapping[str, PackedLinear], dense: Sequence[str], stacks: Sequence[str]
    ) -> dict[str, Any]:
        """One group of modules per format."""
        formats: dict[str, Any] = {name: layer.format for name, layer in layers.items()}
        # Readers that unfuse the experts look each one up by its own name.
        return describe_formats(formats, [*dense, *(f"re:{name}.*" for name in stacks)])

    def leave_dense(self, entry: dict[str, Any], name: str) -> None:
        """One module more to ignore, and none that a group targets."""
        entry["ignore"] = sorted({*entry["ignore"], name})
        for key, group in list(entry["config_groups"].items()):
            group["targets"] = [target for target in group["targets"] if target != name]
            if not group["targets"]:
                del entry["config_groups"][key]

    def unread(self, model: PreTrainedModel, layers: Mapping[str, PackedLinear]) -> str | None:
        """transformers packs linears only, and looks for packed experts."""
        built = empty_like(model)
        odd = odd_classes(built, layers)
        why = [f"{name} is a packed {type(module).__name__}" for name, module in odd.items()][:1]
        experts = [*merged(model, find_expert_matrices(model)), rebuilt(model, self.name)]
        why += [f"{name} holds dense MoE experts" for name in experts[:1] if name is not None]
        if not why:
            tripped = initialised(built, layers)
            why = [] if tripped is None else [f"{tripped} is initialised anew by its model"]
        if not why:
            return None
        return f"{' and '.join(why)}, which transformers with compressed-tensors does not read"

    def take_over(self, model: nn.Module) -> TakenOver | None:
        """Of a model that transformers has loaded, before its first forward pass expands it."""
        quantized = _quantized(model)
        if not quantized:
            return None
        packed = any("weight_packed" in module._parameters for module in quantized.values())
        if not packed and not any(is_packed(module) for module in model.modules()):
            raise ValueError(
                f"model: got {next(iter(quantized))} already expanded by a first forward pass, expected "
                "a model fresh from from_pretrained: load it again and call accelerate first"
            )
        left = {}
        for name, module in quantized.items():
            try:
                model.set_submodule(name, _taken_over(module, name))
            except ValueError as error:
                left[name] = str(error).removeprefix(f"{name}: ")
        hook = getattr(model, "ct_decompress_hook", None)
        if hook is not None:
            hook.remove()
            del model.ct_decompress_hook
            if left:
                _expand_at_first_pass(model, list(left))
        experts = find_expert_matrices(model) if packed else {}
        return TakenOver(left | experts, not left)

    def spoilt(self, model: nn.Module) -> str | None:
        """The first forward pass of a model that transformers has loaded expands its layers."""
        for name, module in _quantized(model).items():
            if "weight" in module._parameters:
                return (
                    f"{name}: got a weight that its first forward pass has expanded, expected packed "
                    "tensors: load the model again, and call llmkern.accelerate before its first use"
                )
        return None


def describe_formats(formats: Mapping[str, QuantFormat], dense: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose weights are packed.

    A single format is written as the class name `Linear` with the dense linears ignored, which is how
    the field's own checkpoints look; several are written as one group each, naming their modules.

    Args:
        formats: the format of each quantized module, by its full name.
        dense: full names of the linear modules that stay dense.

    Returns:
        A JSON-serialisable dict.
    """
    by_format: dict[QuantFormat, list[str]] = {}
    for name, fmt in formats.items():
        by_format.setdefault(fmt, []).append(name)
    groups = {}
    for index, (fmt, names) in enumerate(by_format.items()):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(by_format) == 1 else names,
            "weights": {
                "num_bits": fmt.bits,
                "type": "int",
                "symmetric": fmt.symmetric,
                "strategy": "channel" if fmt.group_size is None else "group",
                "group_size": fmt.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": CompressedTensors.name,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(dense),
        "kv_cache_scheme": None,
    }


class _Reader:
    """transformers loads the tensors into layers that are there before it begins."""

    def __init__(self, files: CheckpointFiles, scheme: Scheme) -> None:
        self.files, self.scheme = files, scheme

    def prepare(self, model: PreTrainedModel) -> None:
        packed = {
            name.removesuffix(suffix)
            for name in self.files.tensors
            for suffix in (".weight_packed", ".weight_scale")
            if name.endswith(suffix)
        }
        modules, made = dict(model.named_modules(remove_duplicate=False)), {}
        for stored, name in module_names(model, sorted(packed)).items():
            module = modules.get(name)
            if module is None or not is_linear(module):
                there = "no module of the model" if module is None else f"a {type(module).__name__}"
                raise ValueError(
                    f"{stored}: got a packed weight for {there}, expected a linear layer"
                )
            # The format knows linears only; a Conv1D is packed as the linear that it computes.
            kind = nn.Linear(1, 1, device="meta") if is_conv1d(module) else module
            fmt = self.scheme.format_of(name, kind) or self.scheme.format_of(stored, kind)
            if fmt is None:
                raise ValueError(
                    f"{self.files.directory}: {stored}: got a packed weight, expected a dense one: "
                    "quantization_config ignores it, or has no group for it"
                )
            made[module] = self._layer(stored, module, fmt)
        replace_modules(model, made)

    def _layer(self, name: str, module: nn.Module, fmt: QuantFormat) -> IntLinear:
        N, K = shape_of(module)
        has_bias, dtype = getattr(module, "bias", None) is not None, module.weight.dtype
        try:
            layer = IntLinear(K, N, has_bias, fmt, device="meta", dtype=dtype)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        scales = self.files.tensors.get(f"{name}.weight_scale")
        if scales is not None and scales.torch_dtype is not None:
            layer.weight_scale = torch.empty_like(layer.weight_scale, dtype=scales.torch_dtype)
        info, words = self.files.tensors.get(f"{name}.weight_packed"), _word_aligned(K, fmt.bits)
        if info is not None and info.shape == (N, words) != tuple(layer.weight_packed.shape):
            layer.weight_packed = layer.weight_packed.new_empty(N, words)
            if layer.weight_zero_point is not None:
                groups = layer.weight_scale.shape[1]
                layer.weight_zero_point = layer.weight_packed.new_empty(
                    _word_aligned(N, fmt.bits), groups
                )
        return layer

    def explain(self, unexpected: Sequence[str]) -> str | None:
        return None

    def fill(self, model: PreTrainedModel) -> None:
        where = self.files.directory
        for name, layer in model.named_modules():
            if not isinstance(layer, CompressedTensors.kinds):
                continue
            _repack(layer)
            tensors = {key: t for key, t in layer.state_dict().items() if not t.is_meta}
            for key, tensor in tensors.items():
                problem = layer.problem(key, tensor)
                if problem:
                    raise ValueError(f"{where}: {name}.{problem}")
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise ValueError(
                        f"{where}: {name}.{key}: got NaN or Inf, expected finite numbers"
                    )


def _check_tensor_names(files: CheckpointFiles) -> None:
    packed = [name for name in files.tensors if name.endswith(".weight_packed")]
    if not packed:
        raise ValueError(
            f"{files.directory}: got a quantization_config but no weight_packed tensor, expected "
            "packed weights"
        )
    g_idx = next((name for name in files.tensors if name.endswith(".weight_g_idx")), None)
    if g_idx:
        raise ValueError(
            f"{files.directory}: {g_idx}: got act-order groups (actorder 'group'), expected groups of "
            "consecutive columns: not supported"
        )


def _repack(layer: IntLinear) -> None:
    """Bring a layer that was loaded in the packing before 0.18 into today's."""
    packed, zeros = layer.weight_packed, layer.weight_zero_point
    canonical = -(-layer.in_features * layer.bits // 32)
    # Another dtype is refused by name.
    if packed.shape[1] == canonical or packed.dtype != torch.int32:
        return
    layer.weight_packed = repack_words(packed, layer.bits, layer.in_features)
    if zeros is not None:
        rows = repack_words(zeros.t(), layer.bits, layer.out_features)
        layer.weight_zero_point = rows.t().contiguous()


def _word_aligned(K: int, bits: int) -> int:
    """Words per row of the packing that compressed-tensors used before 0.18, see `repack_words`."""
    return -(-K // (32 // bits))


def repack_words(packed: Tensor, bits: int, K: int) -> Tensor:
    """Rows packed by compressed-tensors before 0.18 to the canonical bit stream.

    Widths that do not divide 32 (3 bits here) then held 32 // bits codes per word, the rest of the
    word unused; the other widths' bytes are the same in both.

    Args:
        packed: int32 [N, ceil(K / (32 // bits))].
        bits: of a code.
        K: codes per row.

    Returns:
        int32 [N, ceil(K * bits / 32)].
    """
    shifts = torch.arange(32 // bits, device=packed.device) * bits
    codes = (packed[..., None].long() >> shifts) & ((1 << bits) - 1)
    return pack_codes(codes.to(torch.uint8).flatten(1)[:, :K].contiguous(), bits)


def _quantized(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that compressed-tensors has laid its hands on."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }


def _taken_over(module: nn.Module, name: str) -> IntLinear:
    scheme: Any = module.quantization_scheme
    if not isinstance(module, nn.Linear) or "weight_packed" not in module._parameters:
        raise ValueError(f"{name}: its format is not pack-quantized")
    if module.weight_packed.is_meta:
        raise ValueError(f"{name}: its tensors are offloaded")
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise ValueError(f"{name}: quantized activations are not supported")
    fmt = weights_format(scheme.weights.model_dump(), name)
    own = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    layer = IntLinear.from_packed(
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


def _expand_at_first_pass(model: nn.Module, names: list[str]) -> None:
    """compressed-tensors' own hook, for some modules only: it would wrap the tensors of all others."""
    from compressed_tensors.compressors import decompress_module

    def expand(model: nn.Module, args: tuple[Any, ...]) -> None:
        for name in names:
            module = model.get_submodule(name)
            if "weight" not in module._parameters:
                decompress_module(module)

    model.register_forward_pre_hook(expand)

"""bitsandbytes' 4-bit checkpoints (NF4, FP4), for transformers with bitsandbytes.

The tensors of a layer are those of `llmkern.formats.bitsandbytes`; a checkpoint names one table for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llmkern._dtypes import dtype_name
from llmkern.formats.lut4 import BLOCK_SIZES, CODEBOOKS, codebook_name
from llmkern.models import empty_like
from llmkern.models.experts import find_expert_matrices
from llmkern.models.linears import is_conv1d
from llmkern.models.replace import like
from llmkern.nn import Lut4Linear, PackedLinear
from llmkern.wire._wire import TakenOver, Wire
from llmkern.wire.checkpoint_files import CheckpointFiles
from llmkern.wire.conversions import odd_classes, rebuilt
from llmkern.wire.pending import fill_pending, leave_pending

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATES = tuple(f".weight.quant_state.bitsandbytes__{kind}" for kind in CODEBOOKS)


class Bitsandbytes(Wire):
    """Holds `Lut4Linear` layers of bitsandbytes' tables and blocks."""

    name = "bitsandbytes"
    kinds = (Lut4Linear,)
    takes = "one in bitsandbytes' 4 bits"

    def reader(self, files: CheckpointFiles) -> _Reader:
        """Refuses what is not in 4 bits."""
        return _Reader(files)

    def refuse(self, layers: Mapping[str, PackedLinear]) -> str | None:
        """Why the layers are not of one of bitsandbytes' tables, in its blocks."""
        first: tuple[str, str] | None = None
        for name, layer in layers.items():
            kind = codebook_name(cast(Tensor, layer.codebook))
            if kind is None or not layer.scaled:
                return (
                    f"{name}: got a book of its own or no scales, expected the NF4 or FP4 table: no "
                    "checkpoint format holds others; save the state_dict with torch.save, or quantize "
                    "the layer with a LutFormat"
                )
            if layer.block_size not in BLOCK_SIZES:
                return (
                    f"{name}: got blocks of {layer.block_size}, expected one of {BLOCK_SIZES}: "
                    "bitsandbytes has no other; quantize the layer with a LutFormat"
                )
            first = first or (name, kind)
            if kind != first[1]:
                return (
                    f"model: got {first[0]} in {first[1]} beside {name} in {kind}, expected one table: "
                    "a bitsandbytes checkpoint names one for all; patch the model with one of them and "
                    "save it again"
                )
        return None

    def describe(
        self, layers: Mapping[str, PackedLinear], dense: Sequence[str], stacks: Sequence[str]
    ) -> dict[str, Any]:
        """The table of all layers, and the dtype to compute in."""
        layer = next(iter(layers.values()))
        return {
            "quant_method": self.name,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": codebook_name(cast(Tensor, layer.codebook)),
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": dtype_name(layer.dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(dense),
        }

    def unread(self, model: PreTrainedModel, layers: Mapping[str, PackedLinear]) -> str | None:
        """transformers packs plain linears and Conv1D only; some blocks are read wrong on a CPU."""
        built = empty_like(model)
        kinds = odd_classes(built, layers)
        odd = {name: module for name, module in kinds.items() if not is_conv1d(module)}
        why = [f"{name} is a packed {type(module).__name__}" for name, module in odd.items()][:1]
        experts = rebuilt(model, self.name)
        why += [] if experts is None else [f"{experts} holds dense MoE experts"]
        if why:
            return f"{' and '.join(why)}, which transformers with bitsandbytes does not read"
        # On a CPU, bitsandbytes 0.50 does not get back what it packed itself in such blocks.
        sizes = {name: cast(Lut4Linear, layer).block_size for name, layer in layers.items()}
        for name, size in sizes.items():
            if layers[name].in_features % size:
                return (
                    f"{name} has K = {layers[name].in_features}, no multiple of its blocks of {size}, "
                    "which bitsandbytes reads wrong on a CPU"
                )
        return None

    def leave_dense(self, entry: dict[str, Any], name: str) -> None:
        """One module more to skip."""
        entry["llm_int8_skip_modules"] = sorted({*entry["llm_int8_skip_modules"], name})

    def take_over(self, model: nn.Module) -> TakenOver | None:
        """Of a model that transformers has loaded in 4 bits, at any time; nested scales are decoded."""
        if _method(model) != self.name:
            return None
        # bitsandbytes' own linears, told by the state that only their weights have once loaded.
        layers = {
            name: module
            for name, module in model.named_modules()
            if getattr(module._parameters.get("weight"), "quant_state", None) is not None
        }
        if not layers:
            raise ValueError(
                "model: got bitsandbytes without a 4-bit layer in it, expected load_in_4bit with NF4 or "
                "FP4"
            )
        left = {}
        for name, module in layers.items():
            try:
                bias = module._parameters["bias"]
                layer = Lut4Linear.from_bitsandbytes(module.state_dict(), bias)
            except ValueError as error:
                left[name] = str(error)
            else:
                model.set_submodule(name, like(module, layer))
        if not left:
            model.__dict__.pop("is_loaded_in_4bit", None)
        return TakenOver(left | find_expert_matrices(model), not left)


class _Reader:
    """All of a layer's tensors are read past transformers."""

    def __init__(self, files: CheckpointFiles) -> None:
        where = f"{files.directory}: quantization_config"
        if not files.config["quantization_config"].get("load_in_4bit"):
            raise ValueError(f"{where}: got bitsandbytes without load_in_4bit, expected NF4 or FP4")
        found = {
            name.removesuffix(state)
            for name in files.tensors
            for state in _STATES
            if name.endswith(state)
        }
        if not found:
            raise ValueError(f"{where}: got no packed weight, expected one with its quant_state")
        self.files, self.layers = files, sorted(found)

    def prepare(self, model: PreTrainedModel) -> None:
        leave_pending(model, self.layers, ["weight"], "a 4-bit weight")

    def explain(self, unexpected: Sequence[str]) -> str | None:
        return None

    def fill(self, model: PreTrainedModel) -> None:
        def make(tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> Lut4Linear:
            return Lut4Linear.from_bitsandbytes(tensors, bias)

        fill_pending(model, self.files, ["weight"], make)


def _method(model: nn.Module) -> str | None:
    """Name of the quantization with which transformers has loaded `model`."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))

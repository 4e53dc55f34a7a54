"""Find 2:4 sparse weights in a model, dense or of 4-bit codes, and run them on the sparse kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from llmkern.models.heads import shared_weights
from llmkern.models.linears import find_linears, uncalled_linears
from llmkern.models.replace import like
from llmkern.nn import PACKED, PackedLinear


@dataclass(frozen=True)
class SparseLayers:
    """What `accelerate_sparse` found.

    Attributes:
        floats: full names of the layers that became `Sparse24Linear`.
        codes: of those that became `Sparse24Int4Linear`.
        linears: how many linear layers the model has.
    """

    floats: list[str]
    codes: list[str]
    linears: int

    def __bool__(self) -> bool:
        return bool(self.floats or self.codes)

    def __str__(self) -> str:
        kinds = [
            f"{len(names)} of {what}"
            for names, what in ((self.floats, "floats"), (self.codes, "4-bit codes"))
            if names
        ]
        return (
            f"{len(self.floats) + len(self.codes)} of {self.linears} linear layers are 2:4 sparse "
            f"({', '.join(kinds)}) and run on the sparse kernels"
        )


def accelerate_sparse(model: nn.Module) -> SparseLayers:
    """Replace the linears of a model whose weights are 2:4 sparse by sparse modules, in place.

    A weight counts if every 4 consecutive columns have at most two non-zeros, and 45 % of all are
    zeros; in an `IntLinear` a code that is its zero point is a zero. Layers that share their weight
    with another module stay as they are.
    """
    shared = shared_weights(model)
    made: dict[int, PackedLinear | None] = {}
    floats: list[str] = []
    codes: list[str] = []
    linears, uncalled = find_linears(model), uncalled_linears(model)
    for name, module in linears.items():
        if id(module) not in made:
            stays = _is_shared(module, shared) or id(module) in uncalled
            made[id(module)] = None if stays else _sparse(module)
        layer = made[id(module)]
        if layer is not None:
            model.set_submodule(name, layer)
            (floats if layer.WRITTEN_DENSE else codes).append(name)
    return SparseLayers(floats, codes, len(linears))


def _is_shared(module: nn.Module, shared: dict[int, list[str]]) -> bool:
    return id(module._parameters.get("weight")) in shared


def _sparse(module: nn.Module) -> PackedLinear | None:
    """The sparse module that stands for a linear, or None."""
    layers = (kind.from_pattern(module) for kind in PACKED)
    layer = next((layer for layer in layers if layer is not None), None)
    return None if layer is None else like(module, layer)

"""Find 2:4 sparse weights in a model, dense or of 4-bit codes, and run them on the sparse kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from llmkern._dtypes import FLOATS
from llmkern.formats.int4 import unpack_codes, unpack_zeros
from llmkern.formats.sparse24 import is_sparse24
from llmkern.models.heads import shared_weights
from llmkern.nn import Int4Linear, Sparse24Int4Linear, Sparse24Linear

Replacement = TypeVar("Replacement", bound=nn.Module)

# Fewer zeros than this, and a weight that happens to fit the pattern is no pruned one.
LEAST_SPARSITY = 0.45


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
    zeros; in an `Int4Linear` a code that is its zero point is a zero. Layers that share their weight
    with another module stay as they are.
    """
    shared = shared_weights(model)
    made: dict[int, nn.Module | None] = {}
    found: dict[type, list[str]] = {Sparse24Linear: [], Sparse24Int4Linear: []}
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }
    for name, module in linears.items():
        if id(module) not in made:
            made[id(module)] = None if _is_shared(module, shared) else _sparse(module)
        layer = made[id(module)]
        if layer is not None:
            model.set_submodule(name, layer)
            found[type(layer)].append(name)
    return SparseLayers(found[Sparse24Linear], found[Sparse24Int4Linear], len(linears))


def _is_shared(module: nn.Module, shared: dict[int, list[str]]) -> bool:
    return id(module._parameters.get("weight")) in shared


def _sparse(module: nn.Module) -> nn.Module | None:
    """The sparse module that stands for a linear, or None."""
    if type(module) is nn.Linear:
        weight = module._parameters.get("weight")
        if type(weight) is not nn.Parameter or not _counts(weight.detach()):
            return None
        return like(module, Sparse24Linear.from_linear(module))
    if type(module) is not Int4Linear or module.bits != 4 or module.group_size % 32:
        return None
    # Those of the file, whatever the kernels hold.
    tensors = module._file_tensors()
    packed, zeros = tensors["weight_packed"], tensors["weight_zero_point"]
    if packed is None or packed.is_meta or not _counts(_steps(module, packed, zeros)):
        return None
    layer = Sparse24Int4Linear.from_packed(
        packed,
        tensors["weight_scale"],
        zeros,
        module.bias,
        in_features=module.in_features,
        format=module.format,
        dtype=module.dtype,
    )
    return like(module, layer)


def like(module: nn.Module, layer: Replacement) -> Replacement:
    """`layer` in the mode and with the hooks of the module that it replaces."""
    layer.train(module.training)
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        # A model spread over devices moves activations between them in these hooks.
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(layer, hook)
    return layer


def _steps(module: Int4Linear, packed: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """Codes minus zero points, modulo 256: 0 where the weight is."""
    codes = unpack_codes(packed, 4, module.in_features)
    if zeros is None:
        return codes - 8
    points = unpack_zeros(zeros, 4, module.out_features)
    return codes - points.repeat_interleave(module.group_size, 1)


def _counts(w: torch.Tensor) -> bool:
    """Whether a matrix is 2:4 sparse with as many zeros as pruning leaves."""
    if w.is_meta or w.numel() == 0 or (w.dtype not in FLOATS and w.dtype != torch.uint8):
        return False
    if int((w == 0).sum()) < LEAST_SPARSITY * w.numel():
        return False
    return is_sparse24(w)

"""The linears that models are made of, and their weights, whichever way they store them.

transformers' `Conv1D` (GPT-2) keeps its weight transposed. Everything here speaks of the weight as
[N, K]: out features by in features.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, which keeps its weight as [K, N]."""
    # By name: transformers need not be installed.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix: an nn.Linear of any kind, packed too, or a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def other_function(linear: nn.Module) -> str | None:
    """Why a dense linear is something else than x @ wᵀ + bias, or None.

    Models have subclasses of nn.Linear with a forward of their own. Some spell the same product in
    another way, which shows when it is run; others route, group or scale.
    """
    kind: Any = type(linear)
    if is_conv1d(linear) or kind.forward is nn.Linear.forward:
        return None
    why = f"of class {kind.__name__}, which computes something else than nn.Linear"
    weight = linear._parameters.get("weight")
    if weight is None or not _spells_linear(kind):
        return why
    if weight.is_meta:
        return None
    return None if _is_product(linear) else why


@cache
def _spells_linear(kind: Any) -> bool:
    """Whether a small layer of this class is a plain product."""
    try:
        return _is_product(kind(8, 4))
    except Exception:  # of its own constructor, or of a forward that wants other arguments
        return False


def _is_product(linear: nn.Module) -> bool:
    weight = linear.get_parameter("weight")
    x = (
        torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device)
        .to(weight.dtype)
        .view(2, -1)
    )
    try:
        with torch.no_grad():
            y = linear(x)
            want = nn.functional.linear(x, weight, linear._parameters.get("bias"))
    except Exception:
        return False
    if not isinstance(y, Tensor) or y.shape != want.shape or y.dtype != want.dtype:
        return False
    return bool(
        torch.allclose(y.float(), want.float(), rtol=0.02, atol=0.02 * float(want.abs().max()))
    )


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that multiplies by a matrix, by its full name; a shared one under each name."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if is_linear(module)}


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K), of a packed linear too."""
    weight = linear._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]
    first, second = weight.shape
    return (second, first) if is_conv1d(linear) else (first, second)


def weight_rows(linear: nn.Module) -> Tensor:
    """The weight [N, K] of a dense linear, sharing memory with the parameter, without gradient."""
    weight = linear.get_parameter("weight").detach()
    return weight.t() if is_conv1d(linear) else weight


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight [N, K], contiguous if the parameter is, without gradient; a packed linear's values.

    Raises:
        ValueError: `linear` is neither an nn.Linear nor a Conv1D.
    """
    weight = getattr(linear, "weight", None)
    if isinstance(linear, nn.Linear) and isinstance(weight, Tensor):
        return weight.detach()
    if is_conv1d(linear) and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.detach().t().contiguous()
    raise ValueError(
        f"linear: got {type(linear).__name__}, expected nn.Linear or transformers' Conv1D"
    )


def write_weight(linear: nn.Module, weight: Tensor) -> None:
    """Overwrite the weight by `weight` [N, K] of the same size, in place, in the parameter's dtype."""
    weight_rows(linear).copy_(weight.detach())


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias [N], sharing memory with the parameter, or None."""
    bias = linear._parameters.get("bias")
    return None if bias is None else bias.detach()


def set_weight(linear: nn.Module, weight: Tensor) -> None:
    """Replace the weight by `weight` [N, K], of any size, in the parameter's dtype."""
    old = linear.get_parameter("weight")
    stored = weight.t() if is_conv1d(linear) else weight
    new = stored.detach().to(old.dtype).clone(memory_format=torch.contiguous_format)
    linear.weight = nn.Parameter(new, old.requires_grad)
    N, K = weight.shape
    if is_conv1d(linear):
        linear.nf, linear.nx = N, K  # type: ignore[assignment]
    else:
        linear.out_features, linear.in_features = N, K  # type: ignore[assignment]


def set_bias(linear: nn.Module, bias: Tensor) -> None:
    """Replace the values of a bias [N] that is there."""
    linear.get_parameter("bias").data.copy_(bias)


def keep_rows(linear: nn.Module, rows: Tensor) -> None:
    """Leave only the out features `rows` (int64), with their biases, in that order."""
    weight, bias = weight_rows(linear), linear._parameters.get("bias")
    set_weight(linear, weight[rows.to(weight.device)])
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[rows.to(bias.device)].clone(), bias.requires_grad)


def keep_columns(linear: nn.Module, columns: Tensor) -> None:
    """Leave only the in features `columns` (int64), in that order."""
    weight = weight_rows(linear)
    set_weight(linear, weight[:, columns.to(weight.device)])

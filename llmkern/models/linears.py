"""Rows and columns of the dense linears that models are made of, whichever way they store them.

transformers' `Conv1D` (GPT-2) keeps its weight transposed. Everything here speaks of the weight as
[N, K]: out features by in features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def transposed(linear: nn.Module) -> bool:
    """Whether the weight is stored as [K, N]."""
    return type(linear).__name__ == "Conv1D"


def weight_rows(linear: nn.Module) -> Tensor:
    """The weight [N, K], sharing memory with the parameter, without gradient."""
    weight = linear.get_parameter("weight").detach()
    return weight.t() if transposed(linear) else weight


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias [N], sharing memory with the parameter, or None."""
    bias = linear._parameters.get("bias")
    return None if bias is None else bias.detach()


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K)."""
    rows, columns = weight_rows(linear).shape
    return rows, columns


def set_weight(linear: nn.Module, weight: Tensor) -> None:
    """Replace the weight by `weight` [N, K], of any size, in the parameter's dtype."""
    old = linear.get_parameter("weight")
    stored = weight.t() if transposed(linear) else weight
    new = stored.detach().to(old.dtype).clone(memory_format=torch.contiguous_format)
    linear.weight = nn.Parameter(new, old.requires_grad)
    N, K = weight.shape
    if transposed(linear):
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

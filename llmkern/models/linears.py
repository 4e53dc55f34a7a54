"""The linears that models are made of, and their weights, whichever way they store them.

transformers' `Conv1D` (GPT-2) keeps its weight transposed. Everything here speaks of the weight as
[N, K]: out features by in features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern._dtypes import FLOATS

# In and out features on which an unknown class is tried.
_PROBE = (16, 8)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, which keeps its weight as [K, N]."""
    # By name: transformers need not be installed.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies by a matrix: an nn.Linear of any kind, packed too, or a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def uncalled_linears(model: nn.Module) -> set[int]:
    """Ids of the linears whose weights `nn.MultiheadAttention` reads without calling them."""
    attentions = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    return {id(child) for attention in attentions for child in attention.modules()}


def other_function(linear: nn.Module) -> str | None:
    """Why a dense linear is another function than x @ wᵀ + bias of what it holds; None where it is that.

    A subclass with a forward of its own is tried on random numbers, in both modes.
    """
    if is_conv1d(linear):
        return None
    own = {**dict(linear.named_parameters()), **dict(linear.named_buffers())}
    more = [name for name in own if name not in ("weight", "bias")]
    what = f"of class {type(linear).__name__}"
    if more:
        return f"{what}, which holds {more[0]} beside its weight"
    if type(linear).forward is nn.Linear.forward:
        return None
    weight = linear._parameters.get("weight")
    if weight is None or weight.dtype not in FLOATS:
        return f"{what}, whose weight is no matrix of floats"
    with torch.device("cpu"):  # whatever a skeleton is built on
        same = all(_computes_the_product(linear, weight.dtype, mode) for mode in (False, True))
    return None if same else f"{what}, which computes something else than nn.Linear"


def _computes_the_product(linear: nn.Module, dtype: torch.dtype, training: bool) -> bool:
    """Whether a module of its class and settings with small random parameters does as nn.Linear."""
    K, N = _PROBE
    noise = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(dtype)

    tried = type(linear).__new__(type(linear))
    bias = random(N) if linear._parameters.get("bias") is not None else None
    weight = random(N, K)
    parameters = {
        "weight": nn.Parameter(weight, False),
        "bias": None if bias is None else nn.Parameter(bias, False),
    }
    tried.__dict__.update(linear.__dict__, _parameters=parameters, training=training)
    tried.__dict__.update(in_features=K, out_features=N)
    # Rows of very different size tell where something is clamped.
    x = random(2, 3, K) * torch.tensor([0.01, 1.0, 100.0], dtype=dtype)[:, None]
    wanted = F.linear(x, weight, bias)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            got = type(linear).forward(tried, x.clone())
    except Exception:  # any error of foreign code says that it needs something else
        return False
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != dtype:
        return False
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    error = (got.double() - wanted.double()).abs()
    return bool((error <= math.sqrt(K) * torch.finfo(dtype).eps * size.double()).all())


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

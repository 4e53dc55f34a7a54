"""obs_quantize: quantize a weight column by column, each error pushed onto the columns still to come.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the one-Cholesky form of
`llmkern.reference.obs_quantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.formats.int4 import QuantFormat
from llmkern.ops import _obs_gpu
from llmkern.ops._hessian_factor import HessianFactor
from llmkern.ops._library import kernels, register
from llmkern.ops._obs_grid import (
    Format,
    GridOptions,
    Outputs,
    check_grid,
    check_groups,
    check_loop,
    cpu_loops,
    given_scales,
    grid_options,
    refuse_cpu,
    refuse_cuda,
    refuse_triton,
)
from llmkern.ops._obs_problem import (
    Hessian,
    Problem,
    check_mask,
    check_weight,
    outcome,
    problems,
)
from llmkern.reference import obs_quantize as _reference

SCHEMA = (
    "obs_quantize(Tensor w, Tensor U, Tensor d, Tensor? mask, Tensor g_idx, Tensor? codebook, "
    "Tensor? scales, Tensor? zeros, int bits, int group_size, bool symmetric, bool clip_search, "
    "ScalarType scale_dtype) -> (Tensor codes, Tensor scales, Tensor zeros, Tensor w_hat, Tensor loss)"
)


@dataclass(frozen=True)
class ObsResult:
    """A quantized weight, or a batch of them: every tensor then has a first axis more.

    Attributes:
        codes: uint8 [N, K], columns in their original order; of a book, places in it.
        scales: [N, groups] in the scale dtype that was asked for; ones for a book without scales.
        zeros: uint8 [N, groups], or None when symmetric or of a book.
        w_hat: float32 [N, K], scales * (codes - zeros), or scales * codebook[codes].
        loss: float32 [N], each row's (w - w_hat) H (w - w_hat)ᵀ, H damped as below.
        damp: fraction of the mean diagonal that was added to H; the largest of a batch.
        factored: False if H, or one of a batch, could not be factored at any damping: its codes are
            then rounded to nearest. Callers must report it.
        unfactored: which of the batch those are.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    w_hat: Tensor
    loss: Tensor
    damp: float
    factored: bool
    unfactored: tuple[int, ...] = ()


class _Call(NamedTuple):
    w: Tensor
    U: Tensor
    d: Tensor
    mask: Tensor | None
    g_idx: Tensor
    codebook: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    bits: int
    group_size: int
    symmetric: bool
    clip_search: bool
    scale_dtype: torch.dtype


def _launch_reference(call: _Call, out: Outputs) -> None:
    dynamic = call.scales is None
    grid = (call.bits, call.group_size, call.symmetric, dynamic, call.clip_search, call.scale_dtype)
    for e, (w, U, d, g_idx) in enumerate(zip(call.w, call.U, call.d, call.g_idx, strict=True)):
        keep = None if call.mask is None else call.mask[e]
        book = None if call.codebook is None else call.codebook[e if len(call.codebook) > 1 else 0]
        results = _reference.obs_quantize(
            w, U, d, g_idx, out.scales[e], out.zeros[e], *grid, keep, book
        )
        for tensor, value in zip((out.codes, out.w_hat, out.loss), results, strict=True):
            tensor[e].copy_(value)


def _launch_cuda(call: _Call, out: Outputs) -> None:
    _obs_gpu.run("cuda", call, call.mask, None, out)


def _launch_triton(call: _Call, out: Outputs) -> None:
    _obs_gpu.run("triton", call, call.mask, None, out)


def _launch_cpu(call: _Call, out: Outputs) -> None:
    for loop in cpu_loops(call, out):
        kernels("_cpu").obs_quantize(**loop)


BACKENDS = (
    Backend("cuda", refuse_cuda, _launch_cuda),
    Backend("triton", refuse_triton, _launch_triton),
    Backend("cpu", refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _fake(*args: Any) -> Outputs:
    call = _Call(*args)
    check_loop("obs_quantize", call)
    check_grid("obs_quantize", call)
    E, N, K = call.w.shape
    grid = call.w.new_empty(E, N, K // call.group_size)
    codes = call.w.new_empty(E, N, K, dtype=torch.uint8)
    w_hat = torch.empty_like(call.w)
    return Outputs(codes, grid, torch.empty_like(grid), w_hat, call.w.new_empty(E, N))


def _run(*args: Any) -> Outputs:
    out, call = _fake(*args), _Call(*args)
    given_scales(call, out)
    check_groups("obs_quantize", call)
    if call.w.numel() == 0:
        out.loss.zero_()
        return out
    _backends.choose("obs_quantize", BACKENDS, call, out).launch(call, out)
    return out


_op = register(SCHEMA, _run, _fake)


def quantize_grid(
    w: Tensor,
    fmt: QuantFormat,
    *,
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Min-max grid of every group of w: what RTN rounds to, and the static grid of obs_quantize.

    Args:
        w: float [N, K].
        fmt: bits, group size and symmetry.
        clip_search: shrink each group's range to the fraction with the least squared error.
        scale_dtype: scales are rounded to it (by default w's dtype).

    Returns:
        scales and zeros, float32 [N, K/group_size]; zeros hold integers.

    Raises:
        ValueError: w is no float matrix or holds NaN or Inf; the group size does not divide K.
    """
    check_weight("obs_quantize", w)
    options = grid_options("obs_quantize", fmt, w, clip_search, scale_dtype or w.dtype, False)
    scales, zeros = options.fit(w.float()[None])
    return scales[0], zeros[0]


def obs_quantize(
    w: Tensor,
    H: Hessian,
    fmt: Format | None = None,
    *,
    mask: Tensor | None = None,
    group_scales: str = "dynamic",
    act_order: bool = False,
    damp: float = 0.01,
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> ObsResult:
    """Quantize w so that (w - w_hat) H (w - w_hat)ᵀ is small, one column at a time.

    Args:
        w: float32, bfloat16 or float16 [N, K], or [E, N, K]: a batch, such as the experts of a layer.
        H: float32 [K, K], the Hessian 2/n XᵀX of the layer's inputs (lower triangle read), or its
            factor from `factorize_hessian`, which layers with the same input share; `act_order` and
            `damp` are then the factor's own. For a batch [E, K, K], or a list of factors.
        fmt: a `QuantFormat` (bits 2, 3, 4 or 8, group size, symmetry), by default 4 bits, 128,
            symmetric; or a `CodebookFormat`, or a `LutFormat` whose blocks divide K.
        mask: bool like w, True = kept: the others become exactly zero, and what that costs is pushed
            onto the columns to come like any other error.
        group_scales: "dynamic" computes a group's grid from the weights as updated when the loop
            reaches it; "static" from the original weights. Only kept weights count.
        act_order: visit columns in descending order of H's diagonal. Groups stay those of the
            original order, so it needs static group scales.
        damp: fraction of the mean diagonal added to H's diagonal, in [0, 1).
        clip_search: search each group's clipping range for the least squared error.
        scale_dtype: dtype that the scales are stored in (by default w's); the codes are fitted to
            the rounded scales.

    Returns:
        An `ObsResult`. Columns that never received an input (zero diagonal) are set to zero.

    Raises:
        ValueError: bad shapes or dtypes, NaN or Inf, a group size that does not divide K, act_order
            with dynamic scales, an unknown group_scales, damp out of range, a book without 0 beside a
            mask.

    Source: Frantar et al. 2022, arXiv 2210.17323; factor form of arXiv 2507.18553.
    """
    fmt = fmt or QuantFormat()
    check_weight("obs_quantize", w)
    if mask is not None:
        check_mask("obs_quantize", w, mask)
    scale_dtype = scale_dtype or w.dtype
    grid = grid_options("obs_quantize", fmt, w, clip_search, scale_dtype, mask is not None)
    parts: list[Outputs] = []
    factors: list[HessianFactor] = []
    for problem in problems("obs_quantize", w, H, damp, act_order):
        keep = None if mask is None else mask.view(-1, *w.shape[-2:])[problem.experts]
        parts.append(_solve(problem, keep, grid, group_scales))
        factors += problem.factors
    codes, scales, zeros, w_hat, loss = (
        torch.cat(tensors).view(*w.shape[:-2], *tensors[0].shape[1:])
        for tensors in zip(*parts, strict=True)
    )
    met = outcome(factors)
    return ObsResult(
        codes,
        scales.to(scale_dtype),
        None if fmt.symmetric else zeros.to(torch.uint8),
        w_hat,
        loss,
        met.damp,
        not met.unfactored,
        met.unfactored,
    )


def _solve(problem: Problem, mask: Tensor | None, grid: GridOptions, group_scales: str) -> Outputs:
    """The op's outputs on one portion of the batch, codes and columns as the caller knows them."""
    scales, zeros = loop_scales("obs_quantize", problem, mask, grid, group_scales)
    codes, scales, zeros, w_hat, loss = _op(
        problem.w,
        problem.U,
        problem.d,
        None if mask is None else problem.visiting(mask).contiguous(),
        problem.groups(grid.group_size),
        grid.book_of(problem.experts),
        scales,
        zeros,
        *grid.options(),
    )
    codes = grid.caller_codes(problem.original(codes), problem.experts)
    return Outputs(codes, scales, zeros, problem.original(w_hat), loss)


def loop_scales(
    op: str, problem: Problem, mask: Tensor | None, grid: GridOptions, group_scales: str
) -> tuple[Tensor | None, Tensor | None]:
    """Scales and zeros that a loop is given: static ones, or None if it fits them.

    Raises:
        ValueError: an unknown group_scales, or dynamic groups in act-order.
    """
    if group_scales not in ("static", "dynamic"):
        raise ValueError(
            f"{op}: group_scales: got {group_scales!r}, expected 'static' or 'dynamic'"
        )
    dynamic = group_scales == "dynamic" and grid.scaled
    if problem.order is not None and dynamic and grid.group_size < problem.w.shape[2]:
        raise ValueError(
            f"{op}: group_scales: got 'dynamic' with act-order, expected 'static': groups that "
            "follow the visiting order have no checkpoint format"
        )
    if dynamic:
        return None, None
    w = problem.original(problem.w)
    return grid.fit(w if mask is None else w.masked_fill(~mask, 0.0), problem.experts)

"""obs_prune: set weights to zero column by column, and let the columns still to come make up for it.

SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) in the one-Cholesky form of
`llmkern.reference.obs_prune`, with what is kept rounded to a grid in the same pass if asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.ops import _obs_gpu
from llmkern.ops._hessian_factor import HessianFactor
from llmkern.ops._library import kernels, pointer, register
from llmkern.ops._obs_blocks import Pruning
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
from llmkern.ops.obs_quantize import loop_scales
from llmkern.reference.obs_prune import obs_prune as _reference
from llmkern.reference.obs_quantize import Grid

SCHEMA = (
    "obs_prune(Tensor w, Tensor U, Tensor d, Tensor? mask, float sparsity, int kept, int size, "
    "bool per_row, Tensor? g_idx, Tensor? codebook, Tensor? scales, Tensor? zeros, int bits, "
    "int group_size, bool symmetric, bool clip_search, ScalarType scale_dtype) "
    "-> (Tensor mask, Tensor codes, Tensor scales, Tensor zeros, Tensor w_hat, Tensor loss)"
)

MAX_SIZE = 8  # columns of an n:m group
_Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PruneResult:
    """A pruned weight, or a batch of them: every tensor then has a first axis more.

    Attributes:
        w_hat: float32 [N, K]; exactly zero where pruned.
        mask: bool [N, K], True = kept (a kept weight may still round to zero).
        loss: float32 [N], each row's (w - w_hat) H (w - w_hat)ᵀ, H damped as below.
        codes: uint8 [N, K] as in `ObsResult`, those of 0 where pruned; None if nothing is rounded.
        scales: [N, groups], likewise.
        zeros: uint8 [N, groups], likewise; None also when symmetric or of a book.
        damp: fraction of the mean diagonal that was added to H; the largest of a batch.
        factored: False if H, or one of a batch, could not be factored at any damping: its mask is then
            that of w² times H's diagonal, and nothing makes up for what is pruned. Callers must
            report it.
        unfactored: which of the batch those are.
    """

    w_hat: Tensor
    mask: Tensor
    loss: Tensor
    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    damp: float
    factored: bool
    unfactored: tuple[int, ...] = ()


class _Call(NamedTuple):
    w: Tensor
    U: Tensor
    d: Tensor
    mask: Tensor | None
    sparsity: float
    kept: int
    size: int
    per_row: bool
    g_idx: Tensor | None
    codebook: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    bits: int
    group_size: int
    symmetric: bool
    clip_search: bool
    scale_dtype: torch.dtype


def _launch_reference(call: _Call, out_mask: Tensor, out: Outputs) -> None:
    options = (call.bits, call.group_size, call.symmetric, call.clip_search, call.scale_dtype)
    selection = (call.sparsity, call.kept, call.size, call.per_row)
    rounds = call.g_idx is not None
    for e, (w, U, d) in enumerate(zip(call.w, call.U, call.d, strict=True)):
        grid = None
        if call.g_idx is not None:
            books = call.codebook
            book = None if books is None else books[e if len(books) > 1 else 0]
            dynamic = call.scales is None
            grid = Grid(call.g_idx[e], out.scales[e], out.zeros[e], book, dynamic, *options)
        given = None if call.mask is None else call.mask[e]
        results = _reference(w, U, d, given, *selection, grid)
        outputs = (out_mask, out.codes if rounds else None, out.w_hat, out.loss)
        for tensor, value in zip(outputs, results, strict=True):
            if tensor is not None:
                tensor[e].copy_(value)


def _launch_gpu(backend: str, call: _Call, out_mask: Tensor, out: Outputs) -> None:
    pruning = None
    if call.mask is None:
        pruning = Pruning(call.sparsity, call.kept, call.size, call.per_row)
        # A group is fitted before its unstructured mask is chosen where it is the wider of the two.
        out_mask.fill_(True)
    else:
        out_mask.copy_(call.mask)
    _obs_gpu.run(backend, call, out_mask, pruning, out)


def _launch_cuda(call: _Call, out_mask: Tensor, out: Outputs) -> None:
    _launch_gpu("cuda", call, out_mask, out)


def _launch_triton(call: _Call, out_mask: Tensor, out: Outputs) -> None:
    _launch_gpu("triton", call, out_mask, out)


def _launch_cpu(call: _Call, out_mask: Tensor, out: Outputs) -> None:
    if call.mask is not None:
        out_mask.copy_(call.mask)
    for chosen, loop in zip(out_mask, cpu_loops(call, out), strict=True):
        kernels("_cpu").obs_prune(
            **loop,
            chosen=pointer(chosen),
            sparsity=call.sparsity,
            per_row=call.per_row,
            kept=call.kept,
            size=call.size,
        )


BACKENDS = (
    Backend("cuda", refuse_cuda, _launch_cuda),
    Backend("triton", refuse_triton, _launch_triton),
    Backend("cpu", refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check_selection(
    K: int, mask: Tensor | None, sparsity: float, kept: int, size: int, dynamic_group: int | None
) -> None:
    if mask is not None:
        return
    if not size:
        if not 0 <= sparsity < 1:
            raise ValueError(f"obs_prune: sparsity: got {sparsity}, expected a fraction in [0, 1)")
        return
    if not 0 < kept < size <= MAX_SIZE:
        raise ValueError(
            f"obs_prune: pattern: got {kept}:{size}, expected n:m with 0 < n < m <= {MAX_SIZE}"
        )
    if K % size:
        raise ValueError(
            f"obs_prune: pattern: got {kept}:{size} for K = {K}, expected an m that divides K"
        )
    if dynamic_group is not None and dynamic_group % size:
        raise ValueError(
            f"obs_prune: group_size: got {dynamic_group} with dynamic scales, expected a multiple of "
            f"{size} for {kept}:{size}"
        )


def _fake(*args: Any) -> _Six:
    call = _Call(*args)
    check_loop("obs_prune", call)
    w, rounds = call.w, call.g_idx is not None
    E, N, K = w.shape
    if rounds:
        check_grid("obs_prune", call)
    dynamic_group = call.group_size if rounds and call.scales is None else None
    _check_selection(K, call.mask, call.sparsity, call.kept, call.size, dynamic_group)
    columns, groups = (K, K // call.group_size) if rounds else (0, 0)
    return (
        w.new_empty(E, N, K, dtype=torch.bool),
        w.new_empty(E, N, columns, dtype=torch.uint8),
        w.new_empty(E, N, groups),
        w.new_empty(E, N, groups),
        torch.empty_like(w),
        w.new_empty(E, N),
    )


def _run(*args: Any) -> _Six:
    outputs, call = _fake(*args), _Call(*args)
    out_mask, out = outputs[0], Outputs(*outputs[1:])
    if call.g_idx is not None:
        given_scales(call, out)
        check_groups("obs_prune", call)
    if call.w.numel() == 0:
        out.loss.zero_()
        return outputs
    _backends.choose("obs_prune", BACKENDS, call, out_mask, out).launch(call, out_mask, out)
    return outputs


_op = register(SCHEMA, _run, _fake)


def obs_prune(
    w: Tensor,
    H: Hessian,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    scope: str = "layer",
    fmt: Format | None = None,
    damp: float = 0.01,
    act_order: bool = False,
    group_scales: str = "dynamic",
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> PruneResult:
    """Set weights of w to zero so that (w - w_hat) H (w - w_hat)ᵀ is small, one column at a time.

    Exactly one of `sparsity`, `pattern` and `mask` says which.

    Args:
        w: float32, bfloat16 or float16 [N, K], or [E, N, K]: a batch, such as the experts of a layer.
        H: float32 [K, K], the Hessian 2/n XᵀX of the layer's inputs (lower triangle read), or its
            factor from `factorize_hessian`; `act_order` and `damp` are then the factor's own. For a
            batch [E, K, K], or a list of factors.
        sparsity: remove round(sparsity * number of weights), in [0, 1), those with the least cost in
            each block of 128 columns. Weights that are zero already go first.
        pattern: (n, m), keep n of every m neighbouring columns, m at most 8.
        mask: bool like w, True = kept.
        scope: with `sparsity`, "layer" weighs all rows of a block against each other, "row" removes
            the same number from each row.
        fmt: round what is kept to this format in the same pass, so that each step makes up for both
            errors; None to prune only.
        damp: fraction of the mean diagonal added to H's diagonal, in [0, 1).
        act_order: visit columns in descending order of H's diagonal, with a pattern in whole groups of
            m. With `fmt` it needs static group scales.
        group_scales, clip_search, scale_dtype: as `obs_quantize` takes them.

    Returns:
        A `PruneResult`. Columns that never received an input (zero diagonal) are set to zero.

    Raises:
        ValueError: none or several of sparsity, pattern and mask; one that is out of range or does not
            fit w; bad shapes or dtypes, NaN or Inf; a factor in an order that splits the pattern's
            groups; what `obs_quantize` refuses.

    Source: Frantar & Alistarh 2023, arXiv 2301.00774; factor form of arXiv 2507.18553.
    """
    check_weight("obs_prune", w)
    selection = _selection(w, sparsity, pattern, mask, scope)
    scale_dtype = scale_dtype or w.dtype
    grid = None
    if fmt is not None:
        grid = grid_options("obs_prune", fmt, w, clip_search, scale_dtype, True)
    parts: list[_Six] = []
    factors: list[HessianFactor] = []
    for problem in problems("obs_prune", w, H, damp, act_order, selection.size or 1):
        keep = None if mask is None else mask.view(-1, *w.shape[-2:])[problem.experts]
        parts.append(_solve(problem, keep, selection, grid, group_scales))
        factors += problem.factors
    out_mask, codes, scales, zeros, w_hat, loss = (
        torch.cat(tensors).view(*w.shape[:-2], *tensors[0].shape[1:])
        for tensors in zip(*parts, strict=True)
    )
    met = outcome(factors)
    integer_zeros = fmt is not None and not fmt.symmetric
    return PruneResult(
        w_hat,
        out_mask,
        loss,
        None if grid is None else codes,
        None if grid is None else scales.to(scale_dtype),
        zeros.to(torch.uint8) if integer_zeros else None,
        met.damp,
        not met.unfactored,
        met.unfactored,
    )


class _Selection(NamedTuple):
    """sparsity, kept, size and per_row as the op takes them."""

    sparsity: float = 0.0
    kept: int = 0
    size: int = 0
    per_row: bool = False


def _selection(
    w: Tensor,
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    mask: Tensor | None,
    scope: str,
) -> _Selection:
    given = {"sparsity": sparsity, "pattern": pattern, "mask": mask}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            f"obs_prune: sparsity, pattern, mask: got {' and '.join(names) or 'none'}, expected "
            "exactly one of them"
        )
    if scope not in ("layer", "row"):
        raise ValueError(f"obs_prune: scope: got {scope!r}, expected 'layer' or 'row'")
    if mask is not None:
        check_mask("obs_prune", w, mask)
        return _Selection()
    chosen = _Selection(float(sparsity or 0), *(pattern or (0, 0)), scope == "row")
    if pattern is not None and chosen.size < 1:
        raise ValueError(f"obs_prune: pattern: got {pattern}, expected (n, m) with 0 < n < m")
    _check_selection(w.shape[-1], None, *chosen[:3], None)
    return chosen


def _solve(
    problem: Problem,
    mask: Tensor | None,
    selection: _Selection,
    grid: GridOptions | None,
    group_scales: str,
) -> _Six:
    """The op's outputs on one portion of the batch, codes and columns as the caller knows them."""
    if problem.order is not None and selection.size:
        _check_order(problem.order, selection.size)
    scales = zeros = g_idx = book = None
    options: tuple[Any, ...] = (4, 1, True, False, torch.float32)
    if grid is not None:
        scales, zeros = loop_scales("obs_prune", problem, mask, grid, group_scales)
        g_idx, book = problem.groups(grid.group_size), grid.book_of(problem.experts)
        options = grid.options()
    given = None if mask is None else problem.visiting(mask).contiguous()
    out_mask, codes, scales, zeros, w_hat, loss = _op(
        problem.w,
        problem.U,
        problem.d,
        given,
        *selection,
        g_idx,
        book,
        scales,
        zeros,
        *options,
    )
    if grid is not None:
        codes = grid.caller_codes(problem.original(codes), problem.experts)
    return problem.original(out_mask), codes, scales, zeros, problem.original(w_hat), loss


def _check_order(order: Tensor, size: int) -> None:
    """Refuse an order [E, K] that does not visit each run of `size` neighbours as a whole."""
    runs = order.view(len(order), -1, size)
    first = runs[..., :1] // size * size
    if not torch.equal(runs, first + torch.arange(size, device=order.device)):
        raise ValueError(
            f"obs_prune: H: got a factor whose act-order splits groups of {size} columns, expected "
            f"factorize_hessian(H, act_order=True, unit={size})"
        )

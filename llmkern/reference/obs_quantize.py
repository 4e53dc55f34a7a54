"""Specification of obs_quantize: the column loop of GPTQ in its one-Cholesky form.

With the damped Hessian H = (U diag(d)) (U diag(d))ᵀ, U unit upper triangular, column k of a row w of
the weight is

    w'_k = w_k + sum_{j<k} (w_j - q_j) U_jk        what the earlier errors push onto column k
    q_k  = Q(w'_k)                                 nearest point of the group's grid, 0 if pruned
    loss = sum_k ((w'_k - q_k) d_k)^2              = (w - q) H (w - q)ᵀ

which gives the same codes as the loop over the Cholesky factor of the inverse Hessian (Frantar et
al. 2022, arXiv 2210.17323, Alg. 1) without forming any inverse: it is Babai's nearest-plane
algorithm (arXiv 2507.18553), known as LDLQ in QuIP (arXiv 2307.13304). SparseGPT
(`llmkern.reference.obs_prune`) is the same loop with a mask that is chosen on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Clipping search: the grid's range is shrunk to these fractions; 1 is among them, so the search never
# raises the error it minimises.
CLIP_STEPS = 20
CLIP_MIN = 0.6


def group_grid(
    w: Tensor,
    bits: int,
    symmetric: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of w [N, group]: the min-max grid, widened to contain 0.

    Args:
        w: float [N, group].
        bits: 2, 3, 4 or 8.
        symmetric: zero point 2^(bits-1) and scale 2 * absmax / (2^bits - 1).
        clip_search: shrink the range to the fraction, out of CLIP_STEPS from 1 down to CLIP_MIN, with
            the least squared error; the larger range wins ties.
        scale_dtype: scales are rounded to it, so that the codes fit the scales that get stored.
        codebook: float [N or 1, 16], ascending, in place of the integer grid: the scale is absmax over
            the book's own, the zero point 0.

    Returns:
        scales [N] in w.dtype, zeros [N] in w.dtype with integer values.
    """
    top = (1 << bits) - 1
    low = w.amin(1).clamp(max=0)
    high = w.amax(1).clamp(min=0)
    if symmetric or codebook is not None:
        high = torch.maximum(-low, high)
        low = -high
    steps = 2 * codebook.abs().amax(1) if codebook is not None else top

    def grid(fraction: float) -> tuple[Tensor, Tensor]:
        scale = ((high - low) * fraction / steps).to(scale_dtype).to(w.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        if codebook is not None:
            return scale, torch.zeros_like(scale)
        if symmetric:
            return scale, torch.full_like(scale, 1 << (bits - 1))
        return scale, (-low * fraction / scale).round().clamp(0, top)

    scale, zero = grid(1.0)
    if not clip_search:
        return scale, zero
    best = _squared_error(w, scale, zero, top, codebook)
    for step in range(1, CLIP_STEPS):
        candidate, centre = grid(1.0 - (1.0 - CLIP_MIN) * step / (CLIP_STEPS - 1))
        error = _squared_error(w, candidate, centre, top, codebook)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
        zero = torch.where(better, centre, zero)
    return scale, zero


def quantize_to_grid(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes (as floats) of w on the grid scale * (code - zero); ties round to even."""
    return ((w / scale).round() + zero).clamp(0, top)


def quantize_to_book(w: Tensor, scale: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of the entry of the book nearest to w / scale, a tie going to the smaller, and scale * entry.

    Args:
        w: float [N, columns].
        scale: float [N, 1].
        codebook: float [N or 1, 16], ascending.

    Returns:
        ranks int64 [N, columns] and values [N, columns].
    """
    codebook = codebook.expand(len(w), 16).contiguous()
    middles = (codebook[:, :-1] + codebook[:, 1:]) / 2
    ranks = torch.searchsorted(middles, (w / scale).contiguous())
    return ranks, scale * codebook.gather(1, ranks)


def _squared_error(
    w: Tensor, scale: Tensor, zero: Tensor, top: int, codebook: Tensor | None
) -> Tensor:
    scale, zero = scale[:, None], zero[:, None]
    if codebook is not None:
        return (quantize_to_book(w, scale, codebook)[1] - w).square().sum(1)
    codes = quantize_to_grid(w, scale, zero, top)
    return (scale * (codes - zero) - w).square().sum(1)


def unrounded(pushed: Tensor, w: Tensor, U: Tensor) -> Tensor:
    """The weights that the column loop reaches in a group of columns if it rounds none of them.

    A dynamic grid is fitted to them. They are the updated weights of GPTQ as published: the best values
    of the group for the errors made before it. `pushed` alone is not, for w'_k also takes up how far
    the group's columns before k have moved; a grid fitted to it costs 1 to 2 % of the loss.

    Args:
        pushed: float [N, g], w plus what the errors before the group push onto it.
        w: float [N, g], the group's original weights.
        U: float [g, g], its rows and columns of U.

    Returns:
        w' of the group: w'_k = pushed_k + sum_{j<k} (w_j - w'_j) U_jk.
    """
    moved: Tensor = torch.linalg.solve_triangular(
        U, pushed - w, upper=True, left=False, unitriangular=True
    )
    return w + moved


@dataclass
class Grid:
    """What the kept weights are rounded to.

    Attributes:
        g_idx: int32 [K], group of each column.
        scales, zeros: float [N, groups]; read when not `dynamic`, written when `dynamic`.
        codebook: float [N or 1, groups or 1, 16], ascending, or None for integers.
        dynamic: fit a group's grid to the weights that the loop reaches in it when it rounds none of
            them, once its first column is reached; needs g_idx = k // group_size.
        bits, group_size, symmetric, clip_search, scale_dtype: as `group_grid` takes them.
    """

    g_idx: Tensor
    scales: Tensor
    zeros: Tensor
    codebook: Tensor | None
    dynamic: bool
    bits: int
    group_size: int
    symmetric: bool
    clip_search: bool
    scale_dtype: torch.dtype

    def book(self, g: int) -> Tensor | None:
        """The group's book, [N or 1, 16]."""
        if self.codebook is None:
            return None
        return self.codebook[:, g if self.codebook.shape[1] > 1 else 0]

    def fit(self, g: int, w: Tensor) -> None:
        """Fit group g to its weights w [N, group_size]."""
        options = (self.bits, self.symmetric, self.clip_search, self.scale_dtype, self.book(g))
        self.scales[:, g], self.zeros[:, g] = group_grid(w, *options)

    def round(self, g: int, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, or ranks in the sorted book, and values of w [N] on the grid of group g."""
        scale, zero = self.scales[:, g], self.zeros[:, g]
        book = self.book(g)
        if book is not None:
            ranks, values = quantize_to_book(w[:, None], scale[:, None], book)
            return ranks[:, 0], values[:, 0]
        codes = quantize_to_grid(w, scale, zero, (1 << self.bits) - 1)
        return codes, scale * (codes - zero)


class Selection(Protocol):
    """Chooses which columns are kept, a block of columns at a time."""

    def end(self, k: int, rounding: bool) -> int | None:
        """End of the block that is chosen when the loop reaches column k, or None if none is."""

    def choose(self, k: int, w: Tensor, d: Tensor) -> Tensor:
        """bool like w [N, columns], True = kept, from the weights reached with none of them changed."""


def column_loop(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    keep: Tensor,
    grid: Grid | None = None,
    selection: Selection | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the kept columns to their grid, if there is one, and set the others to zero.

    Args:
        w: float [N, K], columns in the order in which they are visited; its dtype is that of the loop.
        U: float [K, K]; its strict upper triangle is read.
        d: float [K], positive.
        keep: bool [N, K]; written where a `selection` chooses.

    Returns:
        codes uint8 [N, K] (those of 0 where pruned), w_hat [N, K], loss [N] (per row, in H's units).
    """
    N, K = w.shape
    codes = torch.zeros(N, K, dtype=torch.uint8, device=w.device)
    w_hat, error = torch.zeros_like(w), torch.zeros_like(w)
    loss = torch.zeros_like(w[:, 0])

    def reached(span: slice) -> Tensor:
        pushed = w[:, span] + error[:, : span.start] @ U[: span.start, span]
        return unrounded(pushed, w[:, span], U[span, span])

    def fit(k: int, grid: Grid) -> None:
        span = slice(k, k + grid.group_size)
        if selection is None and bool(keep[:, span].all()):
            w_hat[:, span] = reached(span)
        else:
            walk(span.start, span.stop, rounding=False)
        grid.fit(int(grid.g_idx[k]), w_hat[:, span])

    def walk(first: int, last: int, rounding: bool) -> None:
        for k in range(first, last):
            end = None if selection is None else selection.end(k, rounding)
            due = rounding and grid is not None and grid.dynamic and k % grid.group_size == 0
            fits = grid if due else None
            # A group of several blocks is fitted before they are chosen.
            wide = fits is not None and end is not None and end < k + fits.group_size
            if fits is not None and wide:
                fit(k, fits)
            if selection is not None and end is not None:
                keep[:, k:end] = selection.choose(k, reached(slice(k, end)), d[k:end])
            if fits is not None and not wide:
                fit(k, fits)
            updated = w[:, k] + error[:, :k] @ U[:k, k]
            value = updated.masked_fill(~keep[:, k], 0.0)
            if rounding and grid is not None:
                code, value = grid.round(int(grid.g_idx[k]), value)
                codes[:, k] = code.to(torch.uint8)
                value = value.masked_fill(~keep[:, k], 0.0)
            w_hat[:, k] = value
            error[:, k] = w[:, k] - value
            if rounding:
                loss.add_(((updated - value) * d[k]).square())

    walk(0, K, rounding=True)
    return codes, w_hat, loss


def obs_quantize(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    dynamic: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
    mask: Tensor | None = None,
    codebook: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`column_loop` on the grid of these arguments, the entries where `mask` is False set to zero."""
    options = (bits, group_size, symmetric, clip_search, scale_dtype)
    keep = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    return column_loop(w, U, d, keep, Grid(g_idx, scales, zeros, codebook, dynamic, *options))

"""Specification of obs_quantize: the column loop of GPTQ in its one-Cholesky form.

With the damped Hessian H = (U diag(d)) (U diag(d))ᵀ, U unit upper triangular, column k of a row w of
the weight is

    w'_k = w_k + sum_{j<k} (w_j - q_j) U_jk        what the earlier errors push onto column k
    q_k  = Q(w'_k)                                 nearest point of the group's grid
    loss = sum_k ((w'_k - q_k) d_k)^2              = (w - q) H (w - q)ᵀ

which gives the same codes as the loop over the Cholesky factor of the inverse Hessian (Frantar et
al. 2022, arXiv 2210.17323, Alg. 1) without forming any inverse: it is Babai's nearest-plane
algorithm (arXiv 2507.18553), known as LDLQ in QuIP (arXiv 2307.13304).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Clipping search: the grid's range is shrunk to these fractions; 1 is among them, so the search never
# raises the error it minimises.
CLIP_STEPS = 20
CLIP_MIN = 0.6


def group_grid(
    w: Tensor, bits: int, symmetric: bool, clip_search: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of w [N, group]: the min-max grid, widened to contain 0.

    Args:
        w: float [N, group].
        bits: 2, 3, 4 or 8.
        symmetric: zero point 2^(bits-1) and scale 2 * absmax / (2^bits - 1).
        clip_search: shrink the range to the fraction, out of CLIP_STEPS from 1 down to CLIP_MIN, with
            the least squared error; the larger range wins ties.
        scale_dtype: scales are rounded to it, so that the codes fit the scales that get stored.

    Returns:
        scales [N] in w.dtype, zeros [N] in w.dtype with integer values.
    """
    top = (1 << bits) - 1
    low = w.amin(1).clamp(max=0)
    high = w.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high

    def grid(fraction: float) -> tuple[Tensor, Tensor]:
        scale = ((high - low) * fraction / top).to(scale_dtype).to(w.dtype)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        if symmetric:
            return scale, torch.full_like(scale, 1 << (bits - 1))
        return scale, (-low * fraction / scale).round().clamp(0, top)

    scale, zero = grid(1.0)
    if not clip_search:
        return scale, zero
    best = _squared_error(w, scale, zero, top)
    for step in range(1, CLIP_STEPS):
        candidate, centre = grid(1.0 - (1.0 - CLIP_MIN) * step / (CLIP_STEPS - 1))
        error = _squared_error(w, candidate, centre, top)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
        zero = torch.where(better, centre, zero)
    return scale, zero


def quantize_to_grid(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes (as floats) of w on the grid scale * (code - zero); ties round to even."""
    return ((w / scale).round() + zero).clamp(0, top)


def _squared_error(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    scale, zero = scale[:, None], zero[:, None]
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The column loop, in w's dtype.

    Args:
        w: float [N, K], columns in the order in which they are quantized.
        U: float [K, K]; its strict upper triangle is read.
        d: float [K], positive.
        g_idx: int32 [K], group of each column.
        scales, zeros: float [N, groups]; read when not `dynamic`, written when `dynamic`.
        dynamic: compute a group's grid from the updated weights (`unrounded`) when its first column is
            reached; needs g_idx = k // group_size.

    Returns:
        codes uint8 [N, K], w_hat [N, K], loss [N] (per row, in H's units).
    """
    N, K = w.shape
    top = (1 << bits) - 1
    codes = torch.empty(N, K, dtype=torch.uint8, device=w.device)
    w_hat = torch.empty_like(w)
    error = torch.zeros_like(w)
    loss = torch.zeros_like(w[:, 0])
    for k in range(K):
        g = int(g_idx[k])
        if dynamic and k % group_size == 0:
            span = slice(k, k + group_size)
            pushed = w[:, span] + error[:, :k] @ U[:k, span]
            group = unrounded(pushed, w[:, span], U[span, span])
            scales[:, g], zeros[:, g] = group_grid(group, bits, symmetric, clip_search, scale_dtype)
        updated = w[:, k] + error[:, :k] @ U[:k, k]
        code = quantize_to_grid(updated, scales[:, g], zeros[:, g], top)
        w_hat[:, k] = scales[:, g] * (code - zeros[:, g])
        codes[:, k] = code.to(torch.uint8)
        error[:, k] = w[:, k] - w_hat[:, k]
        loss += ((updated - w_hat[:, k]) * d[k]).square()
    return codes, w_hat, loss

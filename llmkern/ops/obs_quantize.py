"""obs_quantize: quantize a weight column by column, each error pushed onto the columns still to come.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) in the one-Cholesky form of
`llmkern.reference.obs_quantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._backends import Backend
from llmkern.formats.int4 import BITS, QuantFormat
from llmkern.ops._hessian_factor import HessianFactor, factorize_hessian
from llmkern.ops._library import DTYPE_CODES, FLOATS, expect, pointer, register
from llmkern.ops._obs_blocks import run_blocks
from llmkern.reference import obs_quantize as _reference

SCHEMA = (
    "obs_quantize(Tensor w, Tensor U, Tensor d, Tensor g_idx, Tensor? scales, Tensor? zeros, int bits, "
    "int group_size, bool symmetric, bool clip_search, ScalarType scale_dtype) "
    "-> (Tensor codes, Tensor scales, Tensor zeros, Tensor w_hat, Tensor loss)"
)

_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ObsResult:
    """A quantized weight.

    Attributes:
        codes: uint8 [N, K], columns in their original order.
        scales: [N, groups] in the scale dtype that was asked for.
        zeros: uint8 [N, groups], or None when symmetric.
        w_hat: float32 [N, K], scales * (codes - zeros).
        loss: float32 [N], each row's (w - w_hat) H (w - w_hat)ᵀ, H damped as below.
        damp: fraction of the mean diagonal that was added to H.
        factored: False if H could not be factored at any damping: the codes are then rounded to
            nearest. Callers must report it.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    w_hat: Tensor
    loss: Tensor
    damp: float
    factored: bool


def _launch_reference(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
    dynamic: bool,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    w_hat: Tensor,
    loss: Tensor,
) -> None:
    grid = (bits, group_size, symmetric, dynamic, clip_search, scale_dtype)
    for out, value in zip(
        (codes, w_hat, loss),
        _reference.obs_quantize(w, U, d, g_idx, scales, zeros, *grid),
        strict=True,
    ):
        out.copy_(value)


def _refuse_cuda(w: Tensor, *args: object) -> str | None:
    return _backends.refuse_cuda(w.device)


def _launch_cuda_block(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    w_hat: Tensor,
    loss: Tensor,
    first: int,
    last: int,
    error: Tensor,
) -> None:
    module, _ = _backends.compiled_module("_cuda")
    assert module is not None
    module.obs_quantize_block(
        *(pointer(t) for t in (w, U, d, g_idx, codes, scales, zeros, w_hat, loss, error)),
        *w.shape,
        scales.shape[1],
        bits,
        first,
        last,
        error.stride(0),
        *_backends.cuda_queue(w.device),
    )


def _launch_cuda(*args: Any) -> None:
    run_blocks(_launch_cuda_block, *args)


def _refuse_triton(w: Tensor, *args: Any) -> str | None:
    return _backends.refuse_triton(w.device)


def _launch_triton(*args: Any) -> None:
    from llmkern.triton_kernels.obs_quantize import launch_block

    run_blocks(launch_block, *args)


def _refuse_cpu(w: Tensor, *args: object) -> str | None:
    return _backends.refuse_cpu(w.device.type)


def _launch_cpu(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
    dynamic: bool,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
    *outputs: Tensor,
) -> None:
    module, _ = _backends.compiled_module("_cpu")
    assert module is not None
    addresses = [pointer(t) for t in (w, U, d, g_idx, *outputs)]
    grid = (bits, dynamic, symmetric, clip_search, DTYPE_CODES[scale_dtype])
    module.obs_quantize(*addresses, *w.shape, group_size, *grid)


BACKENDS = (
    Backend("cuda", _refuse_cuda, _launch_cuda),
    Backend("triton", _refuse_triton, _launch_triton),
    Backend("cpu", _refuse_cpu, _launch_cpu),
    Backend("reference", _backends.never_refuse, _launch_reference),
)


def _check(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
) -> None:
    op = "obs_quantize"
    expect(
        w.dim() == 2 and w.dtype == torch.float32 and w.is_contiguous(),
        op,
        "w",
        w,
        "a contiguous float32 [N, K]",
    )
    N, K = w.shape
    if group_size <= 0 or K % group_size:
        raise ValueError(f"{op}: group_size: got {group_size}, expected a divisor of K = {K}")
    shapes: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("U", U, (K, K), torch.float32),
        ("d", d, (K,), torch.float32),
        ("g_idx", g_idx, (K,), torch.int32),
    ]
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None:
            shapes.append((name, tensor, (N, K // group_size), torch.float32))
    for name, tensor, shape, dtype in shapes:
        expect(
            tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.is_contiguous(),
            op,
            name,
            tensor,
            f"a contiguous {str(dtype).removeprefix('torch.')} {list(shape)}",
        )
        expect(tensor.device == w.device, op, name, tensor, f"the device of w, {w.device}")
    if (scales is None) != (zeros is None):
        raise ValueError(f"{op}: scales and zeros: got only one of them, expected both or neither")
    if bits not in BITS:
        raise ValueError(f"{op}: bits: got {bits}, expected one of {BITS}")
    if scale_dtype not in FLOATS:
        raise ValueError(f"{op}: scale_dtype: got {scale_dtype}, expected one of {FLOATS}")


def _check_groups(g_idx: Tensor, group_size: int, dynamic: bool) -> None:
    """What g_idx holds; on the CPU only, because looking at a GPU tensor would stall its queue."""
    if g_idx.device.type != "cpu" or not len(g_idx):
        return
    low, high = (int(value) for value in g_idx.aminmax())
    groups = len(g_idx) // group_size
    if low < 0 or high >= groups:
        raise ValueError(
            f"obs_quantize: g_idx: got groups {low} to {high}, expected 0 to {groups - 1}"
        )
    if dynamic and not torch.equal(
        g_idx, torch.arange(len(g_idx), dtype=torch.int32) // group_size
    ):
        raise ValueError(
            "obs_quantize: g_idx: got columns out of order, expected k // group_size for dynamic scales"
        )


def _fake(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
) -> _Five:
    _check(w, U, d, g_idx, scales, zeros, bits, group_size, scale_dtype)
    N, K = w.shape
    grid = w.new_empty(N, K // group_size)
    codes = w.new_empty(N, K, dtype=torch.uint8)
    return codes, grid, torch.empty_like(grid), torch.empty_like(w), w.new_empty(N)


def _run(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    symmetric: bool,
    clip_search: bool,
    scale_dtype: torch.dtype,
) -> _Five:
    options = (bits, group_size, symmetric, clip_search, scale_dtype)
    codes, out_scales, out_zeros, w_hat, loss = _fake(w, U, d, g_idx, scales, zeros, *options)
    outputs = (codes, out_scales, out_zeros, w_hat, loss)
    if scales is not None and zeros is not None:
        out_scales.copy_(scales)
        out_zeros.copy_(zeros)
    _check_groups(g_idx, group_size, dynamic=scales is None)
    if w.numel() == 0:
        loss.zero_()
        return outputs
    args = (w, U, d, g_idx, scales is None, *options)
    _backends.choose("obs_quantize", BACKENDS, *args, *outputs).launch(*args, *outputs)
    return outputs


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
    _check_weight(w)
    N, K = w.shape
    group_size = fmt.groups(K)
    scales, zeros = _reference.group_grid(
        w.float().reshape(-1, group_size),
        fmt.bits,
        fmt.symmetric,
        clip_search,
        scale_dtype or w.dtype,
    )
    return scales.view(N, -1), zeros.view(N, -1)


def _check_weight(w: Tensor) -> None:
    expect(w.dim() == 2 and w.dtype in FLOATS, "obs_quantize", "w", w, "a float matrix [N, K]")
    # One pass and no temporary, unlike isfinite; aminmax propagates NaN.
    if w.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(w)):
        raise ValueError("obs_quantize: w: got NaN or Inf, expected finite weights")


def obs_quantize(
    w: Tensor,
    H: Tensor | HessianFactor,
    fmt: QuantFormat | None = None,
    *,
    group_scales: str = "dynamic",
    act_order: bool = False,
    damp: float = 0.01,
    clip_search: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> ObsResult:
    """Quantize w so that (w - w_hat) H (w - w_hat)ᵀ is small, one column at a time.

    Args:
        w: float32, bfloat16 or float16 [N, K].
        H: float32 [K, K], the Hessian 2/n XᵀX of the layer's inputs (lower triangle read), or its
            factor from `factorize_hessian`, which layers with the same input share; `act_order` and
            `damp` are then the factor's own.
        fmt: bits 2, 3, 4 or 8, group size, symmetry; 4 bits, 128, symmetric by default.
        group_scales: "dynamic" computes a group's grid from the weights as updated when the loop
            reaches it; "static" from the original weights.
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
            with dynamic scales, an unknown group_scales, damp out of range.

    Source: Frantar et al. 2022, arXiv 2210.17323; factor form of arXiv 2507.18553.
    """
    fmt = fmt or QuantFormat()
    _check_weight(w)
    if group_scales not in ("static", "dynamic"):
        raise ValueError(
            f"obs_quantize: group_scales: got {group_scales!r}, expected 'static' or 'dynamic'"
        )
    K = w.shape[1]
    group_size = fmt.groups(K)
    factor = (
        H if isinstance(H, HessianFactor) else factorize_hessian(H, damp=damp, act_order=act_order)
    )
    if tuple(factor.U.shape) != (K, K):
        raise ValueError(
            f"obs_quantize: H: got {list(factor.U.shape)}, expected [{K}, {K}] for w {list(w.shape)}"
        )
    dynamic = group_scales == "dynamic"
    if factor.order is not None and dynamic and group_size < K:
        raise ValueError(
            "obs_quantize: group_scales: got 'dynamic' with act-order, expected 'static': groups that "
            "follow the visiting order have no checkpoint format"
        )
    scale_dtype = scale_dtype or w.dtype
    work = w.float()
    if bool(factor.dead.any()):
        work = work.masked_fill(factor.dead, 0.0)
    g_idx = torch.arange(K, device=w.device, dtype=torch.int32) // group_size
    grid: tuple[Tensor | None, Tensor | None] = (None, None)
    if not dynamic:
        grid = quantize_grid(work, fmt, clip_search=clip_search, scale_dtype=scale_dtype)
    if factor.order is not None:
        work, g_idx = work[:, factor.order], g_idx[factor.order]
    codes, scales, zeros, w_hat, loss = _op(
        work.contiguous(),
        factor.U,
        factor.d,
        g_idx,
        *grid,
        fmt.bits,
        group_size,
        fmt.symmetric,
        clip_search,
        scale_dtype,
    )
    if factor.order is not None:
        back = torch.argsort(factor.order)
        codes, w_hat = codes[:, back], w_hat[:, back]
    return ObsResult(
        codes,
        scales.to(scale_dtype),
        None if fmt.symmetric else zeros.to(torch.uint8),
        w_hat,
        loss,
        factor.damp,
        factor.factored,
    )

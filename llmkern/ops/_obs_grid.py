"""What the OBS ops round to: a format as the ops take it, and checks of those arguments.

The ops take books sorted, [E or 1, N or 1, groups or 1, 16], and give ranks in them for codes; a book
that the caller gave in another order is met only here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _backends
from llmkern._dtypes import FLOAT_NAMES, FLOATS, dtype_name
from llmkern.formats.int4 import BITS, QuantFormat
from llmkern.formats.lut4 import CodebookFormat, LutFormat
from llmkern.ops._library import expect, pointer
from llmkern.reference.obs_quantize import group_grid

Format = QuantFormat | CodebookFormat | LutFormat


@dataclass(frozen=True)
class GridOptions:
    """A format over a weight [E, N, K], in the terms of the ops.

    Attributes:
        codebook: float32 [E or 1, N or 1, groups or 1, 16], ascending, or None for integers.
        codes: uint8 like `codebook`, the caller's code of each rank, or None.
        scaled: False if the book holds the weights' own values.
        bits, group_size, symmetric, clip_search, scale_dtype: as the ops take them.
    """

    codebook: Tensor | None
    codes: Tensor | None
    scaled: bool
    bits: int
    group_size: int
    symmetric: bool
    clip_search: bool
    scale_dtype: torch.dtype

    def options(self) -> tuple[int, int, bool, bool, torch.dtype]:
        """bits, group_size, symmetric, clip_search, scale_dtype."""
        return self.bits, self.group_size, self.symmetric, self.clip_search, self.scale_dtype

    def book_of(self, experts: slice) -> Tensor | None:
        """The books of a portion of the batch."""
        return None if self.codebook is None else _portion(self.codebook, experts)

    def caller_codes(self, ranks: Tensor, experts: slice) -> Tensor:
        """The caller's codes [E, N, K], columns in their original order, of what an op returned."""
        if self.codes is None:
            return ranks
        E, N, K = ranks.shape
        groups = K // self.group_size
        codes = _portion(self.codes, experts).expand(E, N, groups, 16)
        return codes.gather(3, ranks.reshape(E, N, groups, -1).long()).view(E, N, K)

    def fit(self, w: Tensor, experts: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Scales and zeros of every group of w float32 [E, N, K], [E, N, groups] each."""
        E, N, K = w.shape
        groups = K // self.group_size
        if not self.scaled:
            return w.new_ones(E, N, groups), w.new_zeros(E, N, groups)
        book = self.book_of(experts)
        if book is not None:
            book = book.expand(E, N, groups, 16).reshape(-1, 16)
        rows = w.reshape(-1, self.group_size)
        options = (self.bits, self.symmetric, self.clip_search, self.scale_dtype)
        scales, zeros = group_grid(rows, *options, book)
        return scales.view(E, N, groups), zeros.view(E, N, groups)


def _portion(book: Tensor, experts: slice) -> Tensor:
    return book if len(book) == 1 else book[experts].contiguous()


def grid_options(
    op: str, fmt: Format, w: Tensor, clip_search: bool, scale_dtype: torch.dtype, masked: bool
) -> GridOptions:
    """`fmt` for the weight w [N, K] or [E, N, K].

    Raises:
        ValueError: a group size that does not divide K, a book of another shape than w, or one without
            0 where weights are pruned.
    """
    K = w.shape[-1]
    group_size = fmt.groups(K)
    if fmt.book is None:
        return GridOptions(
            None, None, True, fmt.bits, group_size, fmt.symmetric, clip_search, scale_dtype
        )
    if K % group_size:
        raise ValueError(
            f"{op}: block_size: got {group_size}, expected a divisor of K = {K}: a scale must lie inside "
            "a row"
        )
    book = _four_axes(op, fmt.book.to(w.device), w, K // group_size)
    if masked and not bool((book == 0).any(-1).all()):
        raise ValueError(f"{op}: codebook: got a book without 0, which pruned weights need")
    values, order = book.sort(dim=-1, stable=True)
    # Of equal entries the first: its code is the one that is given out.
    first = torch.searchsorted(values, values)
    codes = order.gather(-1, first).to(torch.uint8)
    options = (fmt.bits, group_size, fmt.symmetric, clip_search, scale_dtype)
    return GridOptions(values, codes, fmt.scaled, *options)


def _four_axes(op: str, book: Tensor, w: Tensor, groups: int) -> Tensor:
    """A book of w [N, K] or [E, N, K] as [E or 1, N or 1, groups or 1, 16]."""
    shapes = ((16,), (*w.shape[:-1], 16), (*w.shape[:-1], groups, 16))
    expect(
        tuple(book.shape) in shapes,
        op,
        "codebook",
        book,
        " or ".join(str(list(shape)) for shape in shapes),
    )
    if book.dim() == 1:
        return book.view(1, 1, 1, 16)
    if book.dim() == w.dim():
        book = book[..., None, :]
    return book if w.dim() == 3 else book[None]


class Outputs(NamedTuple):
    """What the loops fill: uint8 [E, N, K], float32 [E, N, groups] twice, [E, N, K], [E, N].

    Where nothing is rounded, codes, scales and zeros are empty.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    w_hat: Tensor
    loss: Tensor


def check_loop(op: str, call: Any) -> None:
    """Refuse what is not a weight [E, N, K] with its factor and mask; `call` are the op's arguments."""
    w: Tensor = call.w
    expect(
        w.dim() == 3 and w.dtype == torch.float32 and w.is_contiguous(),
        op,
        "w",
        w,
        "a contiguous float32 [E, N, K]",
    )
    E, N, K = w.shape
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("U", call.U, (E, K, K), torch.float32),
        ("d", call.d, (E, K), torch.float32),
        ("mask", call.mask, (E, N, K), torch.bool),
    ]
    _expect_all(op, w, wanted)


def check_grid(op: str, call: Any) -> None:
    """Refuse what is not a grid of the weight w [E, N, K]; `call` are the op's arguments."""
    w, codebook, group_size = call.w, call.codebook, call.group_size
    E, N, K = w.shape
    if group_size <= 0 or K % group_size:
        raise ValueError(f"{op}: group_size: got {group_size}, expected a divisor of K = {K}")
    groups = K // group_size
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("g_idx", call.g_idx, (E, K), torch.int32),
        ("scales", call.scales, (E, N, groups), torch.float32),
        ("zeros", call.zeros, (E, N, groups), torch.float32),
    ]
    _expect_all(op, w, wanted)
    if codebook is not None:
        given = tuple(codebook.shape)
        expect(
            len(given) == 4
            and all(size in (1, full) for size, full in zip(given[:3], (E, N, groups), strict=True))
            and given[3] == 16
            and codebook.dtype == torch.float32
            and codebook.is_contiguous(),
            op,
            "codebook",
            codebook,
            f"a contiguous float32 [{E} or 1, {N} or 1, {groups} or 1, 16], ascending",
        )
        expect(
            codebook.device == w.device, op, "codebook", codebook, f"the device of w, {w.device}"
        )
    if (call.scales is None) != (call.zeros is None):
        raise ValueError(f"{op}: scales and zeros: got only one of them, expected both or neither")
    if call.bits not in BITS:
        raise ValueError(f"{op}: bits: got {call.bits}, expected one of {BITS}")
    if call.scale_dtype not in FLOATS:
        raise ValueError(f"{op}: scale_dtype: got {call.scale_dtype}, expected one of {FLOATS}")


def _expect_all(
    op: str,
    w: Tensor,
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]],
) -> None:
    for name, tensor, shape, dtype in wanted:
        if tensor is None:
            continue
        expect(
            tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.is_contiguous(),
            op,
            name,
            tensor,
            f"a contiguous {dtype_name(dtype)} {list(shape)}",
        )
        expect(tensor.device == w.device, op, name, tensor, f"the device of w, {w.device}")


def check_groups(op: str, call: Any) -> None:
    """What g_idx [E, K] holds; on the CPU only, because looking at a GPU tensor would stall its queue."""
    g_idx, group_size = call.g_idx, call.group_size
    if g_idx.device.type != "cpu" or not g_idx.numel():
        return
    K = g_idx.shape[1]
    low, high = (int(value) for value in g_idx.aminmax())
    groups = K // group_size
    if low < 0 or high >= groups:
        raise ValueError(f"{op}: g_idx: got groups {low} to {high}, expected 0 to {groups - 1}")
    natural = torch.arange(K, dtype=torch.int32) // group_size
    if call.scales is None and not torch.equal(g_idx, natural.expand_as(g_idx)):
        raise ValueError(
            f"{op}: g_idx: got columns out of order, expected k // group_size for dynamic scales"
        )


def given_scales(call: Any, out: Outputs) -> None:
    """Hand the loop the scales and zeros that it does not fit itself."""
    if call.scales is not None:
        out.scales.copy_(call.scales)
        out.zeros.copy_(call.zeros)


def refuse_cuda(call: Any, *_: object) -> str | None:
    """Why the CUDA kernels cannot serve a call, or None."""
    return _backends.refuse_cuda(call.w.device)


def refuse_triton(call: Any, *_: object) -> str | None:
    """Why the Triton kernels cannot serve a call, or None."""
    return _backends.refuse_triton(call.w.device)


def refuse_cpu(call: Any, *_: object) -> str | None:
    """Why the compiled CPU kernels cannot serve a call, or None."""
    return _backends.refuse_cpu(call.w.device.type)


def cpu_loops(call: Any, out: Outputs) -> Iterator[dict[str, Any]]:
    """What the compiled kernels take for the loop over each matrix of a batch.

    Without g_idx nothing is rounded.
    """
    w, codebook, g_idx, mask = call.w, call.codebook, call.g_idx, call.mask
    rows = groups = 1
    if codebook is not None:
        _, rows, groups, _ = codebook.shape
    for e in range(len(w)):
        book = None if codebook is None else codebook[e if len(codebook) > 1 else 0]
        tensors = {
            "w": w[e],
            "U": call.U[e],
            "d": call.d[e],
            "g_idx": None if g_idx is None else g_idx[e],
            "codes": None if g_idx is None else out.codes[e],
            "scales": None if g_idx is None else out.scales[e],
            "zeros": None if g_idx is None else out.zeros[e],
            "w_hat": out.w_hat[e],
            "loss": out.loss[e],
            "mask": None if mask is None else mask[e],
            "codebook": book,
        }
        yield {
            **{name: pointer(tensor) for name, tensor in tensors.items()},
            "N": w.shape[1],
            "K": w.shape[2],
            "group_size": call.group_size,
            "bits": call.bits,
            "dynamic": call.scales is None,
            "symmetric": call.symmetric,
            "clip_search": call.clip_search,
            "scales_dtype": FLOAT_NAMES[call.scale_dtype],
            "book_row_stride": groups * 16 if rows > 1 else 0,
            "book_group_stride": 16 if groups > 1 else 0,
        }

"""Device functions that put the kept half of a 2:4 sparse weight in its places, in registers.

The layout is the canonical one of llmkern/formats/sparse24.py. The four kept values and the byte of
metadata of 8 consecutive k have the same number in a row, so what gemm_common.py calls a word is both.
"""

import triton
import triton.language as tl

from .int4 import interleave


@triton.jit
def load_codes(weight_ptr, offsets, mask, zeros):
    """LOAD_WORDS of 4-bit codes: (codes as int16, metadata) to dense words as int4.py decodes them.

    Every code is first xored with its row's zero point, then shifted to its place, and the word xored
    with eight zero points: what is pruned is left with the zero point, which decodes to exactly 0.
    """
    codes_ptr, meta_ptr = weight_ptr
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0).to(tl.int32)
    meta = tl.load(meta_ptr + offsets, mask=mask, other=0).to(tl.int32)
    points = zeros.to(tl.int32) * 0x11111111
    kept = codes ^ points
    # A nibble of metadata holds the places of two codes; four times that is what they are shifted by.
    low = (kept & 0xF) << ((meta << 2) & 0xC)
    low ^= ((kept >> 4) & 0xF) << (meta & 0xC)
    high = ((kept >> 8) & 0xF) << ((meta >> 2) & 0xC)
    high ^= ((kept >> 12) & 0xF) << ((meta >> 4) & 0xC)
    return points ^ low ^ (high << 16)


@triton.jit
def no_params(param_ptr, rows, groups, num_groups, mask):
    """LOAD_PARAMS of values, which decoding takes nothing for."""
    return None


@triton.jit
def load_values(weight_ptr, offsets, mask, params):
    """LOAD_WORDS of 16- or 32-bit values: (values, metadata) to the 8 dense ones, as a tuple."""
    values_ptr, meta_ptr = weight_ptr
    meta = tl.load(meta_ptr + offsets, mask=mask, other=0).to(tl.int32)
    DTYPE: tl.constexpr = values_ptr.dtype.element_ty
    pieces = values_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    if DTYPE.primitive_bitwidth == 16:
        four = tl.load(pieces + offsets, mask=mask, other=0)
        low = _place_halves(four.to(tl.int32), meta, DTYPE)
        return low + _place_halves((four >> 32).to(tl.int32), meta >> 4, DTYPE)
    else:
        low = tl.load(pieces + 2 * offsets, mask=mask, other=0)
        high = tl.load(pieces + 2 * offsets + 1, mask=mask, other=0)
        return _place_words(low, meta, DTYPE) + _place_words(high, meta >> 4, DTYPE)


@triton.jit
def _place_halves(pair, meta, DTYPE: tl.constexpr):
    """The four dense values of a group from its two of 16 bits and its nibble, by shifts of 64 bits."""
    first = (pair & 0xFFFF).to(tl.int64) << ((meta << 4) & 0x30).to(tl.int64)
    second = ((pair >> 16) & 0xFFFF).to(tl.int64) << ((meta << 2) & 0x30).to(tl.int64)
    group = first | second
    values = ()
    for i in tl.static_range(4):
        values += ((group >> (16 * i)).to(tl.int16).to(DTYPE, bitcast=True),)
    return values


@triton.jit
def _place_words(pair, meta, DTYPE: tl.constexpr):
    """The four dense values of a group from its two of 32 bits and its nibble."""
    first, second = meta & 3, (meta >> 2) & 3
    low, high = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    values = ()
    for i in tl.static_range(4):
        value = tl.where(first == i, low, tl.where(second == i, high, 0))
        values += (value.to(DTYPE, bitcast=True),)
    return values


@triton.jit
def value_plane(words, params, I: tl.constexpr):  # noqa: E741 (place of the value, a constant)
    """Values, float32, at place I of every word."""
    return words[I].to(tl.float32)


@triton.jit
def value_tile(words, params, DTYPE: tl.constexpr):
    """Values of type DTYPE: words [N, W] to [N, 8 W]."""
    return interleave(
        words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]
    )

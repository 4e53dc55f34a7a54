"""Device functions that the 4-bit kernels share: exact codes from packed words, zero points.

The layout is the canonical one of llmkern/formats/int4.py: an int32 word holds the codes of 8
consecutive k, the first in its low bits. "Plane i" of a tile of words is code i of every word, the
weights at k = 8 j + i.
"""

import triton
import triton.language as tl

from .numerics import narrow


@triton.jit
def unpack_plane(words, zeros, I: tl.constexpr):  # noqa: E741 (code index, a constant)
    """code - zero at plane I of int32 `words`, exact, in float32; zeros broadcasts against words.

    The code's bits are put under the exponent of 2^23, which makes the float 2^23 + 16^SHIFT * code;
    one fused multiply-add takes both constants away. That is two instructions per weight, where an
    integer shift, mask and conversion would be three, one of them at a quarter of the rate.
    """
    SHIFT: tl.constexpr = I % 4
    halves = words if I < 4 else words >> 16
    biased = (halves & (0xF << (4 * SHIFT))) | 0x4B000000
    UNIT: tl.constexpr = 1.0 / 16**SHIFT
    BIAS: tl.constexpr = 8388608.0 / 16**SHIFT
    # UNIT * biased = BIAS + code; both it and BIAS + zero are integers below 2^24, so nothing rounds.
    return tl.fma(biased.to(tl.float32, bitcast=True), UNIT, -(zeros + BIAS))


@triton.jit
def load_zeros(zeros_ptr, rows, groups, NUM_GROUPS, mask):
    """Zero points of `rows` in `groups` as float32; 8, the symmetric one, where zeros_ptr is None."""
    if zeros_ptr is None:
        return tl.full(mask.shape, 8.0, tl.float32)
    words = tl.load(zeros_ptr + (rows // 8) * NUM_GROUPS + groups, mask=mask, other=0)
    return ((words >> ((rows % 8) * 4).to(tl.int32)) & 0xF).to(tl.float32)


@triton.jit
def dequantize_tile(words, scales, zeros, DTYPE: tl.constexpr):
    """scales * (code - zeros), formed in float32 and rounded once: words [N, W] to [N, 8 W].

    The codes of a word stay in the thread that holds the word, so no data moves between threads.
    scales and zeros broadcast against words.
    """
    w0 = narrow(scales * unpack_plane(words, zeros, 0), DTYPE)
    w1 = narrow(scales * unpack_plane(words, zeros, 1), DTYPE)
    w2 = narrow(scales * unpack_plane(words, zeros, 2), DTYPE)
    w3 = narrow(scales * unpack_plane(words, zeros, 3), DTYPE)
    w4 = narrow(scales * unpack_plane(words, zeros, 4), DTYPE)
    w5 = narrow(scales * unpack_plane(words, zeros, 5), DTYPE)
    w6 = narrow(scales * unpack_plane(words, zeros, 6), DTYPE)
    w7 = narrow(scales * unpack_plane(words, zeros, 7), DTYPE)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))  # [N, W, bit 2 of k, bit 1 of k]
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1] * 8))

"""Device functions that decode 4-bit integers: exact code - zero from packed words, zero points.

The layout is the canonical one of llmkern/formats/int4.py: an int32 word holds the codes of 8
consecutive k, the first in its low bits. "Plane i" of a tile of words is code i of every word, the
weights at k = 8 j + i.
"""

import triton
import triton.language as tl

from .numerics import INTERPRETED, narrow

# Codes 2j and 2j + 1 of a word into the halves of a register, under the exponent of 2^7 (bfloat16) or
# 2^10 (float16): each half is then 2^7 + code or 2^10 + code, and one packed multiply-add by 1 takes
# the constant and the zero point away, exactly. Bytes 1 and 3 of the prmt's result are masked off.
#
#     word        | c7 c6 | c5 c4 | c3 c2 | c1 c0 |      t = word >> 4
#     prmt j = 1  |   .   t.byte1 |   .   w.byte1 |  =  | .. .. .. c3 | .. .. .. c2 |
_UNPACK_PAIR = """
prmt.b32 p, $8, t, {select};
lop3.b32 p, p, 0x000f000f, {exponent}, 0xea;
fma.rn.{kind} p, p, one, $9;
mov.b32 {{${low}, ${high}}}, p;
"""


def _unpack_word(kind: str, exponent: str, one: str) -> tl.constexpr:
    pairs = (
        _UNPACK_PAIR.format(kind=kind, exponent=exponent, select=select, low=2 * j, high=2 * j + 1)
        for j, select in enumerate(("0x4400", "0x5511", "0x6622", "0x7733"))
    )
    head = f".reg .b32 t, p, one;\nmov.b32 one, {one};\nshr.u32 t, $8, 4;"
    return tl.constexpr("{\n" + head + "".join(pairs) + "}")


_UNPACK_BF16 = _unpack_word("bf16x2", "0x43004300", "0x3f803f80")
_UNPACK_F16 = _unpack_word("f16x2", "0x64006400", "0x3c003c00")


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
    else:  # without it, the compiler would go on to what follows a return
        words = tl.load(zeros_ptr + (rows // 8) * NUM_GROUPS + groups, mask=mask, other=0)
        return ((words >> ((rows % 8) * 4).to(tl.int32)) & 0xF).to(tl.float32)


@triton.jit
def interleave(w0, w1, w2, w3, w4, w5, w6, w7):
    """Planes [N, W] to the tile [N, 8 W]; what a thread holds stays with it."""
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))  # [N, W, bit 2 of k, bit 1 of k]
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (w0.shape[0], w0.shape[1] * 8))


@triton.jit
def unpack_tile(words, bias, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """code + bias by one of the sequences above: words [N, W] to [N, 8 W] in a type of 16 bits."""
    w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
        ASM,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [words, bias],
        dtype=(tl.int16,) * 8,
        is_pure=True,
        pack=1,
    )
    return interleave(w0, w1, w2, w3, w4, w5, w6, w7).to(DTYPE, bitcast=True)


@triton.jit
def integer_tile(words, zeros, DTYPE: tl.constexpr):
    """code - zero, exact in DTYPE: words [N, W] to [N, 8 W]; zeros, in float32, broadcasts."""
    if INTERPRETED or tl.float32 == DTYPE:
        return dequantize_tile(words, 1.0, zeros, DTYPE)
    elif tl.bfloat16 == DTYPE:
        bias = (zeros.to(tl.int32) | 0xC300) * 0x10001  # -(2^7 + zero), twice
        return unpack_tile(words, bias, _UNPACK_BF16, DTYPE)
    else:
        bias = (zeros.to(tl.int32) | 0xE400) * 0x10001  # -(2^10 + zero), twice
        return unpack_tile(words, bias, _UNPACK_F16, DTYPE)


@triton.jit
def dequantize_tile(words, scales, zeros, DTYPE: tl.constexpr):
    """scales * (code - zeros), formed in float32 and rounded once: words [N, W] to [N, 8 W].

    The codes of a word stay in the thread that holds the word, so no data moves between threads.
    scales and zeros broadcast against words.
    """
    return interleave(
        narrow(scales * unpack_plane(words, zeros, 0), DTYPE),
        narrow(scales * unpack_plane(words, zeros, 1), DTYPE),
        narrow(scales * unpack_plane(words, zeros, 2), DTYPE),
        narrow(scales * unpack_plane(words, zeros, 3), DTYPE),
        narrow(scales * unpack_plane(words, zeros, 4), DTYPE),
        narrow(scales * unpack_plane(words, zeros, 5), DTYPE),
        narrow(scales * unpack_plane(words, zeros, 6), DTYPE),
        narrow(scales * unpack_plane(words, zeros, 7), DTYPE),
    )

"""Conversions and products that round the same way on a GPU and in Triton's interpreter.

The interpreter keeps bfloat16 as raw 16-bit integers: it truncates where hardware rounds to nearest
even, and multiplies the integers in a dot. On a GPU these functions compile to the plain operation.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# 1.5 * 2^23: adding it leaves no fraction bits, so that subtracting it again rounds to nearest even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def round_even(x):
    """x rounded to an integer, ties to even, for |x| < 2^22; beyond that, within a few units."""
    return (x + _ROUND) - _ROUND


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, rounded to nearest even. x must be finite."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; never through TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee")

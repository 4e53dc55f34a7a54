"""How w4a16_gemm multiplies on a CUDA device: one pure function of the shape and the GPU."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_ROWS, CHUNK_COLUMNS = 64, 128
MAX_DECODE_ROWS = 32
# From here on a dense copy of the weight, made in pieces that stay in L2, and cuBLAS should take less
# time than 64 x 64 tiles that unpack the weight anew for every 64 rows: dequantizing costs 4.5 N K bytes
# of L2 traffic against 2 M N K flop, a third of cuBLAS's time at M = 1024. By calculation, not measured.
DENSE_ROWS = 1024
# Of one piece of the dense weight: half of the 50 MB of L2 of an H100 or H200.
DENSE_BYTES = 24 << 20
_MAX_SPLIT = 8  # the largest cluster that every GPU of sm_90 takes
_MIN_CHUNKS = 4  # per slice of K, so that the ring of copies fills
# CTAs that the decode tier wants: four on each of the 132 (sm_90) or 108 (sm_80) multiprocessors.
_WANTED_CTAS = {True: 4 * 132, False: 4 * 108}


@dataclass(frozen=True)
class Config:
    """What runs.

    Attributes:
        tier: "decode" or "tile", one kernel with different tiles; "dense", dequantize and cuBLAS.
        rows: of x per CTA, 8, 16, 32 or 64.
        split: slices of K, added in a fixed order.
        bulk: bulk copies, clusters and programmatic launch.
    """

    tier: str
    rows: int = 64
    split: int = 1
    bulk: bool = False


def select_config(M: int, N: int, K: int, group_size: int, sm: int) -> Config:
    """The tier and its tile. Within a tier the order of every sum follows from N, K and sm alone.

    Args:
        M: rows of x.
        N: columns of the product.
        K: columns of x.
        group_size: K-elements per scale; every one is served alike.
        sm: compute capability, 80 for 8.0.

    Returns:
        A config; not yet tuned on a GPU.
    """
    bulk = sm >= 90
    if M >= DENSE_ROWS:
        return Config("dense")
    if M > MAX_DECODE_ROWS:
        return Config("tile", 64, 1, bulk)
    return decode_config(M, N, K, bulk)


def decode_config(M: int, N: int, K: int, bulk: bool) -> Config:
    """The tile of up to `MAX_DECODE_ROWS` rows of x, with K split where N alone makes few CTAs."""
    tiles, chunks = -(-N // CHUNK_ROWS), -(-K // CHUNK_COLUMNS)
    split = 1
    while (
        split < _MAX_SPLIT
        and tiles * split < _WANTED_CTAS[bulk]
        and chunks // (2 * split) >= _MIN_CHUNKS
    ):
        split *= 2
    return Config("decode", 8 if M <= 8 else 16 if M <= 16 else 32, split, bulk)

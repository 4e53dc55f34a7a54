"""How 2:4 sparse weights are multiplied on a CUDA device: one pure function of the shape and the GPU."""

from __future__ import annotations

from llmkern.ops._w4a16_config import MAX_DECODE_ROWS, Config, decode_config

# From 257 rows on, 128 x 128 tiles of y, where these are enough for every multiprocessor of an A100 or
# H100: they read a weight once per 128 rows and x once per 128 columns, but less of them run at once.
# By calculation, not measured.
MAX_SMALL_TILE_ROWS = 256
_LARGE_TILE = 128
_SMS = {True: 132, False: 108}


def select_config(M: int, N: int, K: int, sm: int) -> Config:
    """The tier and its tile. Within a tier the order of every sum follows from N, K and sm alone.

    Args:
        M: rows of x.
        N: columns of the product.
        K: columns of x.
        sm: compute capability, 80 for 8.0.

    Returns:
        A config; its tier is "decode", "tile" (64 x 64) or "large" (128 x 128). Not yet tuned on a GPU.
    """
    bulk = sm >= 90
    if M <= MAX_DECODE_ROWS:
        return decode_config(M, N, K, bulk)
    large = -(-M // _LARGE_TILE) * -(-N // _LARGE_TILE)
    if M > MAX_SMALL_TILE_ROWS and large >= _SMS[bulk]:
        return Config("large", _LARGE_TILE)
    return Config("tile", 64, 1, bulk)

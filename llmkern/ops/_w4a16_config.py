"""How w4a16_gemm and lut4_gemm multiply on a CUDA device: one pure function of the shape and the GPU.

What the kernels of csrc/cuda/common/chunk_gemm.cuh take is here by calculation from sizes; nothing has
been tuned on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

CHUNK_ROWS, CHUNK_COLUMNS = 64, 128
MAX_DECODE_ROWS = 32
# From here on a dense copy of the weight, made in pieces that stay in L2, and cuBLAS should take less
# time than tiles that unpack the weight anew for every 128 rows: dequantizing costs 4.5 N K bytes of L2
# traffic against 2 M N K flop, a third of cuBLAS's time at M = 1024. By calculation, not measured.
DENSE_ROWS = 1024
# Of one piece of the dense weight: half of the 50 MB of L2 of an H100 or H200.
DENSE_BYTES = 24 << 20
MAX_STAGES = 16
# Bytes of weights that a multiprocessor of sm_90 should have under way: more than twice what 4.8 TB/s
# over 132 multiprocessors hold in a latency of 0.8 us.
WANTED_IN_FLIGHT = 64 << 10
_MAX_SPLIT = 8  # the largest cluster that every GPU of sm_90 takes
_MIN_CHUNKS = 4  # per slice of K, so that the ring of copies fills


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Gpu:
    """What a compute capability has: multiprocessors (of its largest GPU), shared memory in bytes."""

    multiprocessors: int
    shared_per_cta: int
    shared_per_multiprocessor: int


def gpu(sm: int) -> Gpu:
    """Sizes of a compute capability, 80 for 8.0, from the CUDA C++ Programming Guide's table."""
    if sm in (80, 87):
        return Gpu(108, 163 << 10, 164 << 10)
    if 90 <= sm < 120:
        return Gpu(132, 227 << 10, 228 << 10)
    return Gpu(132, 99 << 10, 100 << 10)


@dataclass(frozen=True)
class Chunks:
    """What of a weight's layout the choice depends on.

    Attributes:
        bytes: of one chunk.
        table_bytes: of a CTA's look-up table, for 64 rows of w and for 128.
    """

    bytes: int
    table_bytes: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Config:
    """What runs.

    Attributes:
        tier: "decode" or "tile", one kernel with different tiles; "large" for 2:4 sparse weights;
            "dense", dequantize and cuBLAS; "plain", a kernel of the canonical layout, which has no tiles
            to choose.
        rows: of x per CTA, 8, 16, 32, 64 or 128.
        split: slices of K, added in a fixed order.
        bulk: bulk copies, clusters and programmatic launch.
        stages: chunks in the ring of a CTA; 0: the kernel's own choice.
    """

    tier: str
    rows: int = 64
    split: int = 1
    bulk: bool = False
    stages: int = 0

    @property
    def columns(self) -> int:
        """Of out per CTA."""
        return 128 if self.rows == 128 else CHUNK_ROWS

    @property
    def x_stages(self) -> int:
        """Tiles of x in a CTA's ring."""
        return 3 if self.rows == 128 else 4

    def shared_bytes(self, chunks: Chunks) -> int:
        """Shared memory of a CTA, as csrc/cuda/common/chunk_gemm.cuh lays it out."""
        wide = self.columns // CHUNK_ROWS
        x = self.x_stages * self.rows * (CHUNK_COLUMNS + 8) * 2
        ring = self.stages * wide * _ceil_div(chunks.bytes, 128) * 128
        barriers = 8 * MAX_STAGES if self.bulk else 0
        return barriers + x + ring + chunks.table_bytes[wide - 1]

    def ctas(self, M: int, N: int) -> int:
        """Of one launch."""
        return _ceil_div(M, self.rows) * _ceil_div(N, self.columns) * self.split

    def bytes_in_flight(self, M: int, N: int, K: int, chunks: Chunks, sm: int) -> int:
        """Of weights, that the copies of one multiprocessor's CTAs have under way at once."""
        room = gpu(sm).shared_per_multiprocessor // (self.shared_bytes(chunks) + 1024)
        resident = min(room, _ceil_div(self.ctas(M, N), gpu(sm).multiprocessors))
        slice_chunks = _ceil_div(_ceil_div(K, CHUNK_COLUMNS), self.split)
        wide = self.columns // CHUNK_ROWS
        return resident * min(self.stages - 1, slice_chunks) * wide * chunks.bytes


@lru_cache(maxsize=1 << 12)
def select_config(M: int, N: int, K: int, chunks: Chunks, sm: int) -> Config:
    """The tier and its tile. Within a tier the order of every sum follows from N, K and sm alone.

    Args:
        M: rows of x.
        N: columns of the product.
        K: columns of x.
        chunks: of the weight.
        sm: compute capability, 80 for 8.0.

    Returns:
        A config whose shared memory the GPU has; not tuned on a GPU.
    """
    if M >= DENSE_ROWS:
        return Config("dense")
    bulk = sm >= 90
    if M <= MAX_DECODE_ROWS:
        config = decode_config(M, N, K, bulk, table=any(chunks.table_bytes))
    else:
        split = _split(_ceil_div(N, 128), K, gpu(sm).multiprocessors * 2 // 3)
        config = Config("tile", 64 if M <= 64 else 128, split, bulk)
    while config.rows >= 8:
        if found := _deepest(config, N, K, chunks, sm):
            return found
        # A tile of fewer rows, where a larger one does not fit, reads the weight more often.
        config = replace(config, rows=config.rows // 2)
    return Config("dense")


def decode_config(M: int, N: int, K: int, bulk: bool, table: bool = False) -> Config:
    """The tile and split of up to `MAX_DECODE_ROWS` rows: four CTAs on each multiprocessor, if N and K
    have them; with tables, which leave room for fewer, about two with slices that are twice as long.
    """
    rows = 8 if M <= 8 else 16 if M <= 16 else 32
    wanted = (9 if table else 20) * gpu(90 if bulk else 80).multiprocessors // 5
    split = _split(_ceil_div(N, CHUNK_ROWS), K, wanted)
    return Config("decode", rows, split, bulk)


def _split(tiles: int, K: int, wanted: int) -> int:
    """Slices of K, a power of two, that make `wanted` CTAs of one row of tiles if K allows it."""
    split, count = 1, _ceil_div(K, CHUNK_COLUMNS)
    while split < _MAX_SPLIT and tiles * split < wanted and count // (2 * split) >= _MIN_CHUNKS:
        split *= 2
    return split


def _deepest(config: Config, N: int, K: int, chunks: Chunks, sm: int) -> Config | None:
    """The config with the ring that has most bytes under way, or None if none fits.

    That of one row of tiles, so that it does not follow from M.
    """
    limit = gpu(sm).shared_per_cta
    # The ring has one chunk that is not under way, and no use for more than a slice of K has; without
    # bulk copies it is as deep as that of x.
    slice_chunks = _ceil_div(_ceil_div(K, CHUNK_COLUMNS), config.split)
    most = min(MAX_STAGES, slice_chunks + 1)
    depths = range(2, most + 1) if config.bulk else (config.x_stages,)
    each = (replace(config, stages=stages) for stages in depths)
    fitting = [c for c in each if c.shared_bytes(chunks) <= limit]
    # Of equals the shallower: it leaves room for more CTAs.
    return max(
        fitting,
        key=lambda c: (c.bytes_in_flight(c.rows, N, K, chunks, sm), -c.stages),
        default=None,
    )

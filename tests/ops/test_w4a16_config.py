"""The choice of tiles on CUDA devices: shared memory, waves and bytes in flight of real shapes."""

from __future__ import annotations

import itertools

import pytest

from llmkern.formats import int4_cuda, lut4_cuda
from llmkern.ops._w4a16_config import Chunks, Config, gpu, select_config

# (N, K) of Llama-3 8B and 70B: qkv, out, gate and up, down; k or v alone; the head.
LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 4096), (128256, 4096)]
LLAMA_70B = [
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
    (1024, 8192),
    (128256, 8192),
]
SHAPES = LLAMA_8B + LLAMA_70B
ROWS = (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 512, 1023)
# The kinds of chunks that there are, the largest of each.
CHUNKS = {
    "g128": Chunks(int4_cuda.chunk_bytes(128, 2, True)),
    "g32_float32_zeros": Chunks(int4_cuda.chunk_bytes(32, 4, False)),
    "nf4": Chunks(lut4_cuda.chunk_bytes(64, 4, False), (32768, 32768)),
    "row_books": Chunks(lut4_cuda.chunk_bytes(32, 4, False), (64 * 68, 128 * 68)),
    "group_books": Chunks(lut4_cuda.chunk_bytes(32, 4, True)),
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
def test_shared_memory_is_what_the_gpu_has(sm, chunks):
    limit = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[sm] << 10
    for (N, K), M in itertools.product([*SHAPES, (8, 128), (64, 32)], ROWS):
        config = select_config(M, N, K, chunks, sm)
        assert config.tier == ("decode" if M <= 32 else "tile")
        assert config.shared_bytes(chunks) <= limit
        assert config.rows in (8, 16, 32, 64, 128)
        assert 2 <= config.stages <= 16
        assert config.bulk == (sm >= 90)
        assert config.bulk or config.stages == config.x_stages


@pytest.mark.parametrize("sm", [80, 90])
def test_one_tile_holds_all_rows_of_x_up_to_128(sm):
    for (N, K), M in itertools.product(SHAPES, [M for M in ROWS if M <= 128]):
        config = select_config(M, N, K, CHUNKS["g128"], sm)
        assert config.rows == next(rows for rows in (8, 16, 32, 64, 128) if rows >= M)


@pytest.mark.parametrize("name", ["g128", "nf4", "row_books"])
def test_weights_under_way_on_sm_90(name):
    chunks = CHUNKS[name]
    for (N, K), M in itertools.product(SHAPES, [M for M in ROWS if M <= 32]):
        config = select_config(M, N, K, chunks, 90)
        # Of a small weight no multiprocessor has 64 KB: there nearly all of its share.
        share = N // 64 * (K // 128) * chunks.bytes / 132
        under_way = config.bytes_in_flight(M, N, K, chunks, 90)
        assert under_way >= min(64 << 10, 0.7 * share), (N, K, M, config, under_way)


@pytest.mark.parametrize("sm", [80, 90])
def test_ctas_fill_the_multiprocessors(sm):
    chunks = CHUNKS["g128"]
    for N, K in SHAPES:
        for M in ROWS:
            config = select_config(M, N, K, chunks, sm)
            waves = config.ctas(M, N) / gpu(sm).multiprocessors
            # One chunk row of k and v has too few columns for tiles of 128.
            least = 0.7 if config.rows < 128 else 0.3 if N == 1024 and M <= 200 else 0.6
            assert waves >= least, (N, K, M, config, waves)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_sums_never_follow_from_m_within_a_tier(chunks):
    for (N, K), sm in itertools.product([*SHAPES, (64, 128), (8, 100_000)], (80, 86, 90)):
        for rows in (range(1, 33), range(33, 1024, 7)):
            configs = [select_config(M, N, K, chunks, sm) for M in rows]
            assert len({(c.tier, c.split) for c in configs}) == 1
            assert configs[0].split <= max(1, K // 512)


def test_tiers_begin_where_documented():
    chunks = CHUNKS["g128"]
    configs = [select_config(M, 4096, 4096, chunks, 90) for M in (32, 33, 64, 65, 1023, 1024)]
    assert [(c.tier, c.rows) for c in configs[:-1]] == [
        ("decode", 32),
        ("tile", 64),
        ("tile", 64),
        ("tile", 128),
        ("tile", 128),
    ]
    assert configs[-1].tier == "dense"


def test_what_fits_nowhere_is_dequantized():
    assert select_config(1, 64, 128, Chunks(100_000), 86) == Config("dense")

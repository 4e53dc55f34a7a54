"""The table of tiles: every shape finds a row, and the rows are what their source says."""

from __future__ import annotations

import pytest
import tune_triton
from llmkern.triton_kernels import configs

ROWS = configs.parse(configs.PATH.read_text())


def test_the_file_is_what_the_tool_writes() -> None:
    assert configs.dump(ROWS) == configs.PATH.read_text()
    tuned = [row for row in ROWS if row.source != tune_triton.ESTIMATE]
    assert configs.dump(tune_triton.merged(tune_triton.all_estimates(), tuned)) == configs.dump(
        ROWS
    )


def test_no_class_of_shapes_has_two_rows() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("op", tune_triton.OPS)
@pytest.mark.parametrize("float32", [False, True])
def test_every_shape_has_a_config_whose_tiles_lie_in_one_group(op: str, float32: bool) -> None:
    for M in (1, 2, 3, 4, 5, 33, 64, 65, 4096):
        for N, K in ((1, 32), (1025, 4096), (14336, 4096), (4096, 14336), (128256, 28672)):
            for group_size in (32, 64, 96, 128, 160, 11008, 14336):
                for sms in (1, 82, 108, 132, 148):
                    config = configs.select_config(op, M, N, K, group_size, float32, sms)
                    assert config.kernel == "gemv" or group_size % config.BLOCK_K == 0
                    assert config.kernel == "tile" or M <= config.BLOCK_M


def test_the_merged_rows_give_what_each_class_was_estimated() -> None:
    for op in tune_triton.OPS:
        for x in tune_triton.KINDS:
            for M in tune_triton.m_limits(op, x):
                for N in tune_triton.N_LIMITS:
                    for K in tune_triton.K_LIMITS:
                        wanted = tune_triton.estimate(configs.Key(op, x, 132, M, N, K))
                        shape = (M or 10000, N or 100000, K or 100000)
                        got = configs.select_config(op, *shape, 4096, x == "float32", 132)
                        assert got == wanted


def test_the_tightest_row_serves_and_the_nearest_multiprocessors() -> None:
    def row(sms: int, M: int | None, N: int | None, warps: int) -> configs.Row:
        config = configs.Config("tile", 16, 64, 64, 1, True, warps, 3)
        return configs.Row(configs.Key("op", "16-bit", sms, M, N, None), config, "estimate")

    rows = [
        row(132, None, None, 1),
        row(132, 16, None, 2),
        row(132, 16, 1024, 3),
        row(58, None, None, 4),
    ]
    assert configs.lookup(rows, 16, 1024, 64, 132).num_warps == 3
    assert configs.lookup(rows, 1, 1025, 64, 132).num_warps == 2
    assert configs.lookup(rows, 17, 8, 64, 100).num_warps == 1
    assert configs.lookup(rows, 17, 8, 64, 80).num_warps == 4

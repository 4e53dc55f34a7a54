"""The tool that tunes the table of tiles, as far as it goes without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tune_triton
from llmkern.triton_kernels import configs
from llmkern.triton_kernels.configs import Config, Key, Row

ROOT = Path(__file__).resolve().parents[2]
KEYS = [
    Key(op, x, sms, M, N, K)
    for op in tune_triton.OPS
    for x in tune_triton.KINDS
    for sms in (108, 132)
    for M in tune_triton.m_limits(op, x)
    for N, K in ((1024, 4096), (4096, 1024), (None, None))
]


@pytest.mark.parametrize("op", tune_triton.OPS)
@pytest.mark.parametrize("x", tune_triton.KINDS)
def test_candidates_serve_their_class(op: str, x: str) -> None:
    keys = [key for key in KEYS if (key.op, key.x) == (op, x)]
    assert keys
    for key in keys:
        check_candidates(key)


def check_candidates(key: Key) -> None:
    M, N, K = tune_triton.shape_of(key)
    found = tune_triton.tiles(key)
    assert len(found) == len(set(found)), key
    assert found[0] == replace(tune_triton.estimate(key), SPLIT_K=1), f"{key}: the estimate first"
    for tile in found:
        assert tile.kernel == ("gemv" if M <= tune_triton.GEMV_ROWS else "tile"), (key, tile)
        assert tile.kernel == "tile" or tile.BLOCK_M >= M, (key, tile)
        each = tune_triton.splits(key, tile)
        assert each, (key, tile)
        for config in each:
            assert replace(config, SPLIT_K=1) == tile, (key, config)
            programs = -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N) * config.SPLIT_K
            assert config.SPLIT_K == 1 or programs <= 20 * key.sms, (key, config)
            assert config.SPLIT_K == 1 or K // config.SPLIT_K >= 2 * tile.BLOCK_K, (key, config)


def test_a_tuned_row_takes_the_place_of_the_estimate_and_the_others_stay() -> None:
    old = tune_triton.all_estimates()
    key, config = old[0].key, Config("gemv", 1, 8, 128, 4, True, 2, 2)
    rows = tune_triton.merged(old, [Row(key, config, "a GPU, a day")])
    assert len(rows) == len(old)
    assert [row for row in rows if row.source != "estimate"] == [Row(key, config, "a GPU, a day")]
    again = tune_triton.merged(rows, [Row(key, config, "a GPU, another day")])
    assert [row.source for row in again if row.source != "estimate"] == ["a GPU, another day"]


def test_a_gpu_of_another_size_gets_estimates_for_what_was_not_tuned() -> None:
    key = Key("lut4_gemm", "16-bit", 78, 1, 4096, 4096)
    config = Config("gemv", 1, 8, 128, 4, True, 2, 2)
    rows = tune_triton.merged(tune_triton.all_estimates(), [Row(key, config, "a GPU, a day")])
    mine = [row for row in rows if (row.key.op, row.key.x) == ("lut4_gemm", "16-bit")]
    assert configs.lookup(mine, 1, 4096, 4096, 78) == config
    for M, N, K in ((1, 64, 64), (7, 4096, 512), (5000, 200_000, 100_000)):
        assert configs.lookup(mine, M, N, K, 78)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "160"}
    command = [sys.executable, str(ROOT / "bench" / "tune_triton.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run_lists_candidates_and_what_the_compiler_says(tmp_path: Path) -> None:
    table = tmp_path / "configs.json"
    table.write_text(configs.PATH.read_text())
    one = ("--op", "w4a16_gemm", "--x", "16-bit", "--n", "4096", "--k", "4096", "--most", "2")
    result = run("tune", "--dry-run", *one, "--m", "2", "--m", "64", "--out", str(table))
    assert result.returncode == 0, result.stderr
    assert "w4a16_gemm 16-bit M=2 N=4096 K=4096, 132 multiprocessors" in result.stdout
    lines = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "to be timed" in line]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert [row[0] for row in rows] == ["gemv", "gemv", "tile", "tile"]
    assert rows[0][1] == "2x32x256"
    for row in rows:
        assert 16 <= int(row[6]) <= 255, "registers, from the machine code"
        assert 0 <= int(row[7]) <= 227 * 1024
    assert table.read_text() == configs.PATH.read_text(), "a dry run writes nothing"


@pytest.mark.slow
def test_what_does_not_fit_is_told_and_not_timed() -> None:
    # 128 x 128 with five stages of 128 columns each takes more than the 163 KB of sm_80.
    code = (
        "import tune_triton; from llmkern.triton_kernels.configs import Config, Key;"
        "tune_triton.tiles = lambda key: [Config('tile', 128, 128, 128, 1, False, 8, 5)];"
        "key = Key('w4a16_gemm', '16-bit', 108, None, 4096, 4096);"
        "print(next(tune_triton.candidates(key, 80, 1)).problem)"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'bench'}"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "bytes of shared memory, at most" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "gemm"), "got ['gemm']"),
        (("--m", "3", "--dry-run"), "got limits of no class"),
        (("--arch", "75", "--dry-run"), "got sm_75"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], message: str) -> None:
    result = run("tune", *arguments)
    assert result.returncode == 2
    assert message in result.stderr

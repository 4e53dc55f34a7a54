"""Every tile of every Triton kernel, compiled for sm_80 and sm_90 without a GPU (bench/triton_aot.py)."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from compiled import CACHE, compile_once
from llmkern.triton_kernels import configs, dequantize_int4, hessian_update, obs_quantize

ROOT = Path(__file__).resolve().parents[2]
ARCHS = (80, 90)
HESSIAN = "hessian_update_kernel"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes per block, CUDA C++ Programming Guide
GROUP_SIZES = (32, 64, 96, 128, 4096)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What the tool wrote, in processes of its own: Triton interprets in this one.

    They share a cache of kernels, by Triton's own hash of everything that went into one.
    """
    tool = ROOT / "bench" / "triton_aot.py"
    inputs = [tool, configs.PATH, *sorted((ROOT / "triton_kernels").glob("*.py"))]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def compile_for(arch: int) -> list[dict[str, Any]]:
        options = ["--arch", str(arch), "--quick", "--cache", CACHE / "triton-kernels"]
        command = [sys.executable, tool, *options, "--json", "{out}"]
        versions = f"triton {triton.__version__}, torch {torch.__version__}"
        made = compile_once(f"triton/sm_{arch}.json", command, inputs, versions, env)
        return list(json.loads(made.path.read_text()))

    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(compile_for, ARCHS) for row in rows]


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills_and_shared_memory_fits(rows: list[dict[str, Any]], arch: int) -> None:
    mine = [row for row in rows if row["arch"] == arch]
    assert mine
    for row in mine:
        assert row["stack_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_LIMIT[arch], row


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_16_bit_tiles_use_the_tensor_cores_and_float32_never_does(
    rows: list[dict[str, Any]], arch: int, instruction: str
) -> None:
    # In particular no float32 product goes through TF32.
    mine = [r for r in rows if r["arch"] == arch and r["kernel"] in ("tile_kernel", HESSIAN)]
    assert {"float32" in row["case"] for row in mine} == {True, False}
    for row in mine:
        used = [i for i in row["instructions"] if "mma" in i]
        if "float32" in row["case"]:
            assert used == [], row
        else:
            assert used, row
            assert all(i.startswith(instruction) and "tf32" not in i for i in used), row


@pytest.mark.parametrize(("kind", "packed"), [("bfloat16", "bf16x2"), ("float16", "f16x2")])
def test_integers_are_unpacked_two_at_a_time(
    rows: list[dict[str, Any]], kind: str, packed: str
) -> None:
    # The interpreter cannot run this branch: here it is seen to be compiled.
    mine = [
        row
        for row in rows
        if f"w4a16_gemm {kind} tile" in row["case"] and row["constants"].get("SCALE_SUMS")
    ]
    assert {row["arch"] for row in mine} == set(ARCHS)
    assert all(f"fma.rn.{packed}" in row["instructions"] for row in mine)


def compiled(rows: list[dict[str, Any]], kernel: str, arch: int, *names: str) -> set[Any]:
    """The constants `names` of every compiled variant of a kernel."""
    return {
        tuple(row["constants"][name] for name in names)
        for row in rows
        if row["kernel"] == kernel and row["arch"] == arch
    }


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", ["lut4_gemm", "sparse24_gemm", "sparse24_w4a16_gemm", "w4a16_gemm"])
def test_every_tile_of_the_table_is_compiled(
    rows: list[dict[str, Any]], arch: int, op: str
) -> None:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SCALE_SUMS", "num_warps", "num_stages")
    wanted: dict[str, set[Any]] = {"gemv": set(), "tile": set()}
    for row in configs.parse(configs.PATH.read_text()):
        if row.key.op == op:
            tile = tuple(getattr(row.config, name) for name in names)
            wanted[row.config.kernel].add(tile)
    mine = [row for row in rows if row["case"].startswith(f"{op} ")]
    for kernel, tiles in wanted.items():
        assert tiles <= compiled(mine, f"{kernel}_kernel", arch, *names)
    assert compiled(rows, "reduce_kernel", arch, "BLOCK")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_of_the_other_kernels_is_compiled(rows: list[dict[str, Any]], arch: int) -> None:
    configs = [dequantize_int4.select_config(4096, 4096, g) for g in GROUP_SIZES]
    tiles = {(c.BLOCK_N, c.BLOCK_K, c.num_warps) for c in configs}
    names = ("BLOCK_N", "BLOCK_K", "num_warps")
    assert compiled(rows, "dequantize_int4_kernel", arch, *names) == tiles

    updates = [
        hessian_update.select_config(K, float32)
        for K in (64, 1024, 4096, 28672)
        for float32 in (False, True)
    ]
    tiles = {(c.BLOCK_K, c.BLOCK_T, c.num_warps) for c in updates}
    names = ("BLOCK_K", "BLOCK_T", "num_warps")
    assert compiled(rows, "hessian_update_kernel", arch, *names) == tiles

    blocks = [obs_quantize.select_config(N) for N in (1, 1000, 2000, 4096, 28672)]
    assert compiled(rows, "obs_block_kernel", arch, "BLOCK_N", "num_warps") == {
        (c.BLOCK_N, c.num_warps) for c in blocks
    }

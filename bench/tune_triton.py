"""Make the table from which the Triton kernels choose their tiles (triton_kernels/configs.json).

python bench/tune_triton.py estimate

An estimate needs no GPU: it fills the GPU with programs where it can, and takes tiles that fit the
registers when they are compiled ahead of time (bench/triton_aot.py).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from llmkern.triton_kernels.configs import PATH, Config, Key, Row, dump, parse

OPS = ("lut4_gemm", "sparse24_gemm", "sparse24_w4a16_gemm", "w4a16_gemm")
SMS = (58, 108, 132)  # L4; A100; H100, H200
KINDS = ("16-bit", "float32")  # of x
N_LIMITS = (1024, 2048, 4096, 8192, 16384, None)
K_LIMITS = (1024, 4096, None)
ESTIMATE = "estimate"


def m_limits(op: str, x: str) -> tuple[int | None, ...]:
    """The numbers of rows of x that each have tiles of their own."""
    if x == "float32":
        return 1, 2, 4, 32, None
    # Putting values in their places costs more than multiplying: few rows leave that to tensor cores.
    few = () if op.startswith("sparse24") else (1, 2, 4)
    return *few, 16, 32, 64, 128, 512, None


def split_k(tiles: int, K: int, least_k: int, programs: int) -> int:
    """Programs along K: a power of two that makes about `programs` in all, least_k or more each."""
    wanted = min(programs // tiles, K // least_k, 16)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def estimate(key: Key) -> Config:
    """The tile that a class of shapes should do well with, from the sizes alone."""
    M, N, K = key.M or 4096, key.N or 32768, key.K or 16384
    if M <= 4:
        # 32 rows with a book each spill a register on sm_90, 16 rows of float32 on sm_80.
        lut4 = key.op == "lut4_gemm" and key.x == "16-bit"
        block_n = 32 if M <= 2 and not lut4 else 16
        split = split_k(-(-N // block_n), K, 256, 4 * key.sms)
        return Config("gemv", M, block_n, 256, split, True, 4, 3)
    if key.x == "float32":
        split = split_k(-(-N // 64), K, 256, 2 * key.sms) if M <= 32 else 1
        return Config("tile", 32, 64, 32, split, False, 4, 2)
    if M <= 64:
        split = split_k(-(-N // 64), K, 512, 2 * key.sms)
        # 64 columns and 128 codes per row do not fit the registers of 4 warps on sm_80.
        return Config("tile", M, 64, 128 if M < 64 else 64, split, True, 4, 4)
    blocks_n = -(-N // 128)
    block_m = 64 if key.sms > blocks_n * -(-M // 128) else 128
    split = split_k(blocks_n * -(-M // block_m), K, 1024, key.sms)
    return Config("tile", block_m, 128, 64, split, False, 8 if block_m == 128 else 4, 3)


def estimates(op: str, x: str, sms: int) -> list[Row]:
    """Rows for every class, where neighbours that agree are one."""
    rows = []
    for M in m_limits(op, x):
        kept: list[list[Row]] = []
        for N in N_LIMITS:
            by_k = [Row(k := Key(op, x, sms, M, N, K), estimate(k), ESTIMATE) for K in K_LIMITS]
            by_k = [a for a, b in pairwise(by_k) if a.config != b.config] + by_k[-1:]
            # The loosest of the rows that agree holds the shapes of the others.
            if kept and _same(kept[-1], by_k):
                kept.pop()
            kept.append(by_k)
        rows += [row for by_k in kept for row in by_k]
    return rows


def _same(a: list[Row], b: list[Row]) -> bool:
    return [(row.key.K, row.config) for row in a] == [(row.key.K, row.config) for row in b]


def all_estimates() -> list[Row]:
    return [row for op in OPS for x in KINDS for sms in SMS for row in estimates(op, x, sms)]


app = typer.Typer(add_completion=False)


@app.callback()
def _commands() -> None:
    """Make the table of tiles of the Triton kernels."""


@app.command("estimate")
def write_estimates(
    out: Annotated[Path, typer.Option(help="table to write; rows tuned there are kept")] = PATH,
) -> None:
    """Write the estimated rows, beside those that were tuned on a GPU."""
    tuned = (
        [row for row in parse(out.read_text()) if row.source != ESTIMATE] if out.exists() else []
    )
    out.write_text(dump(all_estimates() + tuned))


if __name__ == "__main__":
    app()

"""Make the table from which the Triton kernels choose their tiles (triton_kernels/configs.json).

python bench/tune_triton.py estimate
python bench/tune_triton.py tune [--op w4a16_gemm] [--m 1] [--n 4096] [--k 4096] [--dry-run]

`tune` compiles the candidates of each class of shapes, drops those that spill registers or need more
shared memory than the GPU has, checks and times the others on cold weights, interleaved, and writes the
fastest with the GPU's name and the date. With `--dry-run` it needs no GPU: it lists the candidates and
what the compiler says of each, and writes nothing.

An estimate needs no GPU either: it fills the GPU with programs where it can, and takes tiles that fit the
registers when they are compiled ahead of time (bench/triton_aot.py).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any

import typer
from llmkern.triton_kernels.configs import PATH, Config, Key, Row, dump, parse

OPS = ("lut4_gemm", "sparse24_gemm", "sparse24_w4a16_gemm", "w4a16_gemm")
SMS = (58, 108, 132)  # L4; A100; H100, H200
KINDS = ("16-bit", "float32")  # of x
N_LIMITS = (1024, 2048, 4096, 8192, 16384, None)
K_LIMITS = (1024, 4096, None)
ESTIMATE = "estimate"
GEMV_ROWS = 4  # up to here the gemv kernel serves
GROUP_SIZE = 128  # of the weights that are timed; tiles of smaller groups follow from the table's
# Programs per multiprocessor that a candidate may start: fewer leave it idle, more split K for nothing.
PROGRAMS = (0.4, 20)
SPLITS = (1, 2, 4, 8, 16)


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


def shape_of(key: Key) -> tuple[int, int, int]:
    """M, N and K that stand for a class of shapes."""
    return key.M or 4096, key.N or 32768, key.K or 16384


def estimate(key: Key) -> Config:
    """The tile that a class of shapes should do well with, from the sizes alone."""
    M, N, K = shape_of(key)
    if M <= GEMV_ROWS:
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


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """A table's rows with `new` ones in place of those of the same classes.

    A number of multiprocessors that the table lacks gets its estimates first: a shape that was not
    tuned must find a row too.
    """
    have = {(row.key.op, row.key.x, row.key.sms) for row in old}
    lacking = {(row.key.op, row.key.x, row.key.sms) for row in new} - have
    rows = [*old, *(row for kind in sorted(lacking) for row in estimates(*kind))]
    replaced = {row.key for row in new}
    return [row for row in rows if row.key not in replaced] + list(new)


def tiles(key: Key) -> list[Config]:
    """Tiles worth a try, SPLIT_K apart, those nearest to the estimate first."""
    M, _, _ = shape_of(key)
    found: list[Config] = []
    if M <= GEMV_ROWS:
        for block_n, block_k, warps, stages in product(
            (8, 16, 32), (128, 256, 512), (2, 4, 8), (2, 3, 4)
        ):
            found.append(Config("gemv", M, block_n, block_k, 1, True, warps, stages))
    else:
        rows = [r for r in (16, 32, 64, 128) if r < 2 * M] if key.x == "16-bit" else [16, 32, 64]
        for block_m, block_n, block_k in product(rows, (64, 128), (32, 64, 128)):
            # Group sums pay off where few rows of x share the scaling of a weight.
            sums = (False,) if key.x == "float32" else (True,) if block_m < 32 else (True, False)
            for scale_sums, warps, stages in product(sums, (4, 8), (2, 3, 4)):
                found.append(
                    Config("tile", block_m, block_n, block_k, 1, scale_sums, warps, stages)
                )
    first = replace(estimate(key), SPLIT_K=1)
    return sorted(found, key=lambda c: _distance(c, first))


def _distance(a: Config, b: Config) -> int:
    """How many doublings and switches lie between two tiles."""
    sizes = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps")
    steps = sum(
        abs(getattr(a, name).bit_length() - getattr(b, name).bit_length()) for name in sizes
    )
    return steps + abs(a.num_stages - b.num_stages) + (a.SCALE_SUMS != b.SCALE_SUMS)


def splits(key: Key, tile: Config) -> list[Config]:
    """A tile with every SPLIT_K that gives the multiprocessors something to do, and not too much."""
    M, N, K = shape_of(key)
    programs = -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N) / key.sms
    fits = [
        s for s in SPLITS if s == 1 or (K // s >= 2 * tile.BLOCK_K and programs * s <= PROGRAMS[1])
    ]
    enough = [s for s in fits if programs * s >= PROGRAMS[0]]
    return [replace(tile, SPLIT_K=s) for s in enough or fits[-1:]]


@dataclass(frozen=True)
class Candidate:
    """A tile, its splits of K, and what the compiler says."""

    tile: Config
    splits: list[int]
    registers: int
    shared_bytes: int
    problem: str | None


def candidates(key: Key, arch: int, most: int) -> Iterator[Candidate]:
    """Compile tiles for sm_<arch> and say which can run.

    Args:
        key: a class of shapes.
        arch: compute capability, 90 for 9.0.
        most: tiles to compile, those nearest to the estimate.
    """
    # Imported here: it turns Triton's interpreter off, which is for good.
    import triton_aot

    for tile in tiles(key)[:most]:
        each = splits(key, tile)
        try:
            rows = triton_aot.compile_tile(
                key.op, key.x, replace(tile, SPLIT_K=2), GROUP_SIZE, arch
            )
        except Exception as error:  # of Triton's compiler: a tile that it cannot make
            yield Candidate(
                tile, [c.SPLIT_K for c in each], 0, 0, f"{type(error).__name__}: {error}"
            )
            continue
        yield Candidate(
            tile,
            [c.SPLIT_K for c in each],
            max(row.registers for row in rows),
            max(row.shared_bytes for row in rows),
            next((problem for row in rows if (problem := row.problem())), None),
        )


def classes(
    ops: Sequence[str], xs: Sequence[str], sms: int, limits: Sequence[Sequence[int]]
) -> list[Key]:
    """The classes of the table, of which M, N and K are among `limits` where these are given."""
    m, n, k = ([None if value == 0 else value for value in given] for given in limits)
    return [
        Key(op, x, sms, M, N, K)
        for op, x in product(ops, xs)
        for M, N, K in product(m_limits(op, x), N_LIMITS, K_LIMITS)
        if (not m or M in m) and (not n or N in n) and (not k or K in k)
    ]


def time_candidates(key: Key, configs: Sequence[Config], rounds: int) -> list[tuple[float, Config]]:
    """Seconds per call on the current GPU, cold, of those configs whose result is right."""
    import _gpu
    import harness
    import torch

    M, N, K = shape_of(key)
    dtype = torch.float32 if key.x == "float32" else torch.bfloat16
    weight, dense = _weight(key, dtype)
    x = torch.randn(M, K, dtype=dtype, device="cuda")
    spec = x.double() @ dense.t()
    size = sum(t.nbytes for t in weight if t is not None)
    number = harness.copies(size, harness.ring_bytes())
    ring = [tuple(None if t is None else t.clone() for t in weight) for _ in range(number)]
    contenders = [
        harness.Contender(
            str(config),
            _call(key.op, config, x, ring, N),
            harness.close_to(spec, 1e-5 if dtype == torch.float32 else 1e-2),
            copies=number,
        )
        for config in configs
    ]
    right = [
        (contender, config)
        for contender, config in zip(contenders, configs, strict=True)
        if _problem(contender) is None
    ]
    visits = _gpu.visit([contender for contender, _ in right], rounds, kernels=1)
    times = [
        (statistics.median(visit.samples), config)
        for visit, (_, config) in zip(visits, right, strict=True)
        if visit.samples
    ]
    # Of equals the one with fewer splits: it needs no second pass.
    return sorted(times, key=lambda pair: (pair[0], pair[1].SPLIT_K))


def _problem(contender: Any) -> str | None:
    """What is wrong with a candidate's result; one that cannot be launched has no number."""
    try:
        mismatch: str | None = contender.mismatch(contender.run(0))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return mismatch


def _weight(key: Key, dtype: Any) -> tuple[tuple[Any, ...], Any]:
    """A random weight of the class in the canonical layout, and what it stands for in float64."""
    import torch

    from llmkern.testing import CodeCase, Sparse24Case

    M, N, K = shape_of(key)
    if key.op.startswith("sparse24"):
        sparse = Sparse24Case(
            M, N, K, None if key.op == "sparse24_gemm" else GROUP_SIZE, True, torch.bfloat16
        )
        parts = tuple(None if t is None else t.cuda() for t in sparse.weight(dtype))
        return parts, sparse.dense(parts, torch.float64)
    values = "symmetric" if key.op == "w4a16_gemm" else "nf4"
    case = CodeCase(M, N, K, GROUP_SIZE, values, torch.bfloat16)
    weight = case.weight("cuda")
    return weight, case.dense(weight)


def _call(op: str, config: Config, x: Any, ring: Sequence[tuple[Any, ...]], N: int) -> Any:
    import importlib

    launch = importlib.import_module(f"llmkern.triton_kernels.{op}").launch
    out = x.new_empty(x.shape[0], N)
    # Values of 2:4 weights have no groups.
    group = () if op == "sparse24_gemm" else (GROUP_SIZE,)
    fitted = config.for_groups(GROUP_SIZE) if group else config

    def run(i: int) -> Any:
        launch(x, *ring[i % len(ring)], None, *group, "canonical", out, fitted)
        return out

    return run


def tune_class(key: Key, arch: int, most: int, rounds: int, source: str) -> Row | None:
    """The fastest candidate of a class on the current GPU, or None if none is right."""
    usable = [c for c in candidates(key, arch, most) if c.problem is None]
    configs = [replace(c.tile, SPLIT_K=split) for c in usable for split in c.splits]
    if estimate(key) not in configs:
        configs.append(estimate(key))
    times = time_candidates(key, configs, rounds)
    if not times:
        return None
    (best, config), first = times[0], {c: t for t, c in times}.get(estimate(key))
    gain = f", {first / best:.2f} times as fast as the estimate" if first else ""
    print(f"{key}: {config}: {best * 1e6:.1f} us{gain}", flush=True)
    return Row(key, config, source)


def show(key: Key, found: Sequence[Candidate]) -> None:
    """One table of candidates."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{key.op} {key.x} M={key.M} N={key.N} K={key.K}, {key.sms} multiprocessors"
    )
    for title in (
        "kernel",
        "tile",
        "sums",
        "warps",
        "stages",
        "splits",
        "registers",
        "shared",
        "verdict",
    ):
        table.add_column(title, no_wrap=title != "verdict")
    for each in found:
        tile = each.tile
        size = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
        counts = (tile.num_warps, tile.num_stages, each.splits, each.registers, each.shared_bytes)
        table.add_row(
            tile.kernel,
            size,
            str(tile.SCALE_SUMS),
            *map(str, counts),
            each.problem or "to be timed",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


app = typer.Typer(add_completion=False)


@app.callback()
def _commands() -> None:
    """Make the table of tiles of the Triton kernels."""


Out = Annotated[Path, typer.Option(help="table to write; rows tuned there are kept")]


@app.command("estimate")
def write_estimates(out: Out = PATH) -> None:
    """Write the estimated rows, beside those that were tuned on a GPU."""
    tuned = (
        [row for row in parse(out.read_text()) if row.source != ESTIMATE] if out.exists() else []
    )
    out.write_text(dump(merged(all_estimates(), tuned)))


@app.command()
def tune(
    op: Annotated[list[str] | None, typer.Option(help="one of the table's, repeatable")] = None,
    x: Annotated[list[str] | None, typer.Option(help="of 16-bit and float32")] = None,
    m: Annotated[list[int] | None, typer.Option(help="limits of M to tune; 0: the last")] = None,
    n: Annotated[list[int] | None, typer.Option(help="limits of N to tune; 0: the last")] = None,
    k: Annotated[list[int] | None, typer.Option(help="limits of K to tune; 0: the last")] = None,
    most: Annotated[int, typer.Option(help="tiles to try per class")] = 24,
    rounds: Annotated[int, typer.Option(help="visits per candidate")] = 9,
    dry_run: Annotated[bool, typer.Option(help="compile and list only; needs no GPU")] = False,
    arch: Annotated[int, typer.Option(help="compute capability of a dry run")] = 90,
    out: Out = PATH,
) -> None:
    """Choose tiles by time on this machine's GPU; every class of shapes unless some are named."""
    import torch
    import triton_aot

    if unknown := {*(op or ()), *(x or ())} - {*OPS, *KINDS}:
        raise typer.BadParameter(f"got {sorted(unknown)}, expected of {[*OPS, *KINDS]}")
    if not dry_run:
        if not torch.cuda.is_available():
            raise typer.BadParameter("got no CUDA device, expected one (or --dry-run)")
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    if arch not in triton_aot.SHARED_LIMIT:
        raise typer.BadParameter(f"got sm_{arch}, expected of {sorted(triton_aot.SHARED_LIMIT)}")
    sms = {80: 108, 90: 132}[arch]
    if not dry_run:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
    keys = classes(op or OPS, x or KINDS, sms, (m or (), n or (), k or ()))
    if not keys:
        raise typer.BadParameter("got limits of no class, expected some of the table's")
    if dry_run:
        for key in keys:
            show(key, list(candidates(key, arch, most)))
        return
    torch.set_default_device("cuda")
    source = f"{torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}"
    for key in keys:
        row = tune_class(key, arch, most, rounds, source)
        if row is not None:  # after each class, so that what was measured stays if the rest fails
            out.write_text(dump(merged(parse(out.read_text()), [row])))


if __name__ == "__main__":
    app()

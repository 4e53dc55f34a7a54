"""Compile the Triton kernels ahead of time, without a GPU, and show what each configuration needs.

python bench/triton_aot.py [--arch 80 --arch 90] [--json out.json]

The kernels' own launch functions run, on tensors of real layer shapes, but what they launch is only
compiled: so the table shows exactly what a GPU would run. The exit code is 1 if a kernel spills
registers or needs more shared memory than the architecture has.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# The interpreter replaces the compiler; Triton reads this when it is first imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import typer
from llmkern.triton_kernels import (
    configs,
    dequantize_int4,
    hessian_update,
    kd_loss,
    lut4_gemm,
    obs_prune,
    obs_quantize,
    sparse24_gemm,
    sparse24_w4a16_gemm,
    w4a16_gemm,
)
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Row:
    """One compiled kernel: its constants, and what the assembler gave it."""

    case: str
    arch: int
    kernel: str
    constants: dict[str, Any]
    registers: int
    stack_bytes: int  # where spilled registers go
    shared_bytes: int
    instructions: list[str]  # PTX that the kernels rely on, by mnemonic
    seconds: float

    def problem(self) -> str | None:
        if self.stack_bytes:
            return f"{self.stack_bytes} bytes of stack: registers are spilled"
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            return f"{self.shared_bytes} bytes of shared memory, at most {SHARED_LIMIT[self.arch]}"
        return None


class CompileOnly:
    """Stands in for Triton's GPU driver: has a target, but no device."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"sm_{self._target.arch}"  # a key of Triton's cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compile_only(arch: int) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Within the block, launching a kernel compiles it for sm_<arch>.

    Yields:
        List of (compiled kernel, keyword arguments of the launch), which grows with each launch.
    """
    compiled: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((kernel, kwargs))
        return kernel

    JITFunction.run = compile_it
    triton.runtime.driver.set_active(CompileOnly(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        if torch.cuda.is_available():
            triton.runtime.driver.reset_active()


def resources(kernel: Any) -> tuple[int, int]:
    """Registers per thread and bytes of stack of a compiled kernel, as its machine code says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: got no resource usage in {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def instructions(kernel: Any) -> list[str]:
    """Mnemonics of tensor-core and of packed 16-bit instructions in a compiled kernel's PTX."""
    wanted = r"\bw?g?mma[\w.]*\.m\d+n\d+k\d+[\w.]*|\bfma\.rn\.b?f16x2"
    return sorted(set(re.findall(wanted, kernel.asm["ptx"])))


def _weight(N: int, K: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = K // group_size
    qweight = torch.empty(N, K // 8, dtype=torch.int32)
    return (
        qweight,
        torch.empty(N, groups, dtype=BF16),
        torch.empty(-(-N // 8), groups, dtype=torch.int32),
    )


def _gemm(
    M: int,
    N: int,
    K: int,
    group_size: int,
    dtype: torch.dtype,
    config: configs.Config | None = None,
    symmetric: bool = False,
) -> None:
    x, bias = torch.empty(M, K, dtype=dtype), torch.empty(N, dtype=dtype)
    qweight, scales, zeros = _weight(N, K, group_size)
    weight = (qweight, scales, None if symmetric else zeros)
    out = torch.empty(M, N, dtype=dtype)
    w4a16_gemm.launch(x, *weight, bias, group_size, "canonical", out, config)


def _lut4(
    M: int,
    N: int,
    K: int,
    group_size: int,
    dtype: torch.dtype,
    config: configs.Config | None = None,
    books: tuple[int, ...] = (),
    scaled: bool = True,
) -> None:
    x, bias = torch.empty(M, K, dtype=dtype), torch.empty(N, dtype=dtype)
    qweight, weight_scales, _ = _weight(N, K, group_size)
    scales = weight_scales if scaled else None
    book = torch.empty(*books, 16)
    out = torch.empty(M, N, dtype=dtype)
    lut4_gemm.launch(x, qweight, book, scales, bias, group_size, "canonical", out, config)


def _sparse24(
    M: int,
    N: int,
    K: int,
    group_size: int,
    dtype: torch.dtype,
    config: configs.Config | None = None,
) -> None:
    """Values have no groups."""
    x, bias = torch.empty(M, K, dtype=dtype), torch.empty(N, dtype=dtype)
    values, meta = torch.empty(N, K // 2, dtype=dtype), torch.empty(N, K // 8, dtype=torch.uint8)
    out = torch.empty(M, N, dtype=dtype)
    sparse24_gemm.launch(x, values, meta, bias, "canonical", out, config)


def _sparse24_codes(
    M: int,
    N: int,
    K: int,
    group_size: int,
    dtype: torch.dtype,
    config: configs.Config | None = None,
) -> None:
    x, bias = torch.empty(M, K, dtype=dtype), torch.empty(N, dtype=dtype)
    _, *grids = _weight(N, K, group_size)
    qvalues = torch.empty(N, K // 16, dtype=torch.int32)
    meta = torch.empty(N, K // 8, dtype=torch.uint8)
    out = torch.empty(M, N, dtype=dtype)
    weight = (qvalues, meta, *grids)
    sparse24_w4a16_gemm.launch(x, *weight, bias, group_size, "canonical", out, config)


GEMMS: dict[str, Callable[..., None]] = {
    "w4a16_gemm": _gemm,
    "lut4_gemm": _lut4,
    "sparse24_gemm": _sparse24,
    "sparse24_w4a16_gemm": _sparse24_codes,
}


def _table_cases() -> dict[str, Callable[[], None]]:
    """Every tile in the table of configs, in each group size that makes it another one."""
    cases: dict[str, Callable[[], None]] = {}
    for (op, x), rows in configs.table().items():
        launch = GEMMS[op]
        dtypes = (F32,) if x == "float32" else (BF16, F16)
        for tile in dict.fromkeys(replace(row.config, SPLIT_K=2) for row in rows):
            for group_size in (128,) if op == "sparse24_gemm" else (128, 64, 32):
                config = tile.for_groups(group_size)
                if group_size < 128 and config in (tile, tile.for_groups(2 * group_size)):
                    continue
                for dtype in dtypes:
                    kind = str(dtype).removeprefix("torch.")
                    name = f"{op} {kind} {config.kernel} {config.BLOCK_M} g{group_size}"
                    name += f" {config.BLOCK_N}x{config.BLOCK_K}"
                    shape = (config.BLOCK_M, 4096, 4096)
                    cases[name] = partial(launch, *shape, group_size, dtype, config)
    return cases


def _dequantize(
    N: int, K: int, group_size: int, dtype: torch.dtype, symmetric: bool = False
) -> None:
    out = torch.empty(N, K, dtype=dtype)
    qweight, scales, zeros = _weight(N, K, group_size)
    weight = (qweight, scales, None if symmetric else zeros)
    dequantize_int4.launch(*weight, group_size, "canonical", out)


def _hessian(K: int, dtype: torch.dtype, T: int = 8192, experts: int | None = None) -> None:
    H, offsets = torch.empty(experts or 1, K, K), None
    if experts:
        offsets = torch.empty(experts + 1, dtype=torch.int64)
    hessian_update.launch(H if experts else H[0], torch.empty(T, K, dtype=dtype), 0.1, offsets)


def _obs(
    N: int,
    groups: int = 32,
    columns: int = 128,
    grid: str | None = "integer",
    mask: bool = False,
    pattern: tuple[int, int] = (0, 0),
    experts: int = 1,
) -> None:
    K = 4096
    w, scales = torch.empty(experts, N, K), torch.empty(experts, N, groups)
    book = torch.empty(experts, N, 1, 16) if grid == "book" else None
    g_idx = torch.empty(experts, K, dtype=torch.int32)
    codes = torch.empty(experts, N, K, dtype=torch.uint8)
    obs_quantize.launch_block(
        *(w, torch.empty(experts, K, K), torch.empty(experts, K)),
        (g_idx, book, scales, torch.empty_like(scales)) if grid else None,
        (16 * N, 16, 0) if grid == "book" else (0, 0, 0),
        4,
        torch.empty(experts, N, K, dtype=torch.bool) if mask or pattern[1] else None,
        *pattern,
        codes if grid else None,
        torch.empty(experts, N, K),
        torch.empty(experts, N) if grid else None,
        torch.empty(experts, N, 128),
        *(128, 128 + columns, 128),
    )


def _select(N: int, columns: int, per_row: bool) -> None:
    mask = torch.empty(8, N, columns, dtype=torch.bool)
    obs_prune.select(torch.empty(8, N, columns), torch.empty(8, columns), 1, per_row, mask)


def _kd(V: int, divergence: str, dtype: torch.dtype, alpha: float = 0.5) -> None:
    logits, labels = torch.empty(8, V, dtype=dtype), torch.empty(8, dtype=torch.int64)
    teacher = logits if alpha else None
    counts = torch.empty(8, dtype=torch.bool)
    rest = (alpha, 2.0, divergence, 0.5, torch.empty(2, 8))
    kd_loss.launch(logits, teacher, None if alpha == 1 else labels, counts, *rest)


# Every tile that the table and the select_config functions have, in shapes of Llama-3-8B's layers.
CASES: dict[str, Callable[[], None]] = {
    **_table_cases(),
    **{
        f"lut4_gemm bfloat16 {books} M={M}": partial(_lut4, M, 4096, 4096, 64, BF16, None, shape)
        for M in (1, 2, 4, 16, 128)
        for books, shape in (("row", (4096,)), ("group", (4096, 64)))
    },
    # What may be absent is an argument of another type: None.
    **{
        f"w4a16_gemm bfloat16 symmetric M={M}": partial(
            _gemm, M, 4096, 4096, 128, BF16, symmetric=True
        )
        for M in (1, 16, 128)
    },
    **{
        f"lut4_gemm bfloat16 unscaled M={M}": partial(
            _lut4, M, 4096, 4096, 128, BF16, books=(4096,), scaled=False
        )
        for M in (1, 16, 128)
    },
    "dequantize symmetric": partial(_dequantize, 4096, 4096, 128, BF16, symmetric=True),
    "dequantize g128": partial(_dequantize, 4096, 4096, 128, BF16),
    "dequantize g64": partial(_dequantize, 4096, 4096, 64, F16),
    "dequantize g32": partial(_dequantize, 4096, 4096, 32, F32),
    "hessian": partial(_hessian, 4096, BF16),
    "hessian small": partial(_hessian, 1024, F16),
    "hessian float32": partial(_hessian, 4096, F32),
    "hessian of experts": partial(_hessian, 2048, BF16, 8192, 64),
    "obs": partial(_obs, 4096),
    "obs, fewer rows": partial(_obs, 1536),
    "obs, few rows": partial(_obs, 256),
    **{
        f"obs of {grid}, {name}": partial(_obs, 4096, grid=grid, **options)
        for grid in (None, "integer", "book")
        for name, options in {
            "all kept": {},
            "a mask": {"mask": True},
            "2:4": {"pattern": (2, 4)},
            "4:8": {"pattern": (4, 8)},
        }.items()
        if grid or options
    },
    "obs of experts": partial(_obs, 1024, experts=64),
    "obs, mask of a layer": partial(_select, 4096, 128, False),
    "obs, mask of each row": partial(_select, 4096, 128, True),
    **{
        f"kd_loss {divergence} alpha={alpha}": partial(_kd, 128256, divergence, BF16, alpha)
        for divergence in kd_loss.DIVERGENCES
        for alpha in (0.0, 0.5, 1.0)
    },
    "kd_loss float32": partial(_kd, 32000, "jsd", F32),
    "kd_loss of a small vocabulary": partial(_kd, 33, "jsd", F16),
    # Triton turns arguments of value 1 into constants, which have no methods.
    "lut4_gemm bfloat16, one output": partial(_lut4, 1, 1, 32, 32, BF16),
    "lut4_gemm bfloat16, one row of w": partial(_lut4, 5, 1, 32, 32, BF16),
    "w4a16 one output": partial(_gemm, 1, 1, 4096, 4096, BF16),
    "w4a16 one row of w": partial(_gemm, 2, 1, 32, 32, BF16),
    "w4a16 float32, one row of w": partial(_gemm, 5, 1, 32, 32, F32),
    # The last tile of K is cut off.
    "sparse24_gemm bfloat16 tile 16 odd K": partial(_sparse24, 16, 4096, 4104, 0, BF16),
    "sparse24_gemm float32 gemv 1 odd K": partial(_sparse24, 1, 4096, 4104, 0, F32),
    "sparse24_gemm bfloat16, one output": partial(_sparse24, 1, 1, 8, 0, BF16),
    "sparse24_w4a16_gemm float32, one row of w": partial(_sparse24_codes, 5, 1, 32, 32, F32),
    "dequantize one row": partial(_dequantize, 1, 32, 32, BF16),
    "hessian of one number": partial(_hessian, 1, BF16, 1),
    "obs of one number": partial(_obs, 1, 1, 1),
    "obs, mask of one row": partial(_select, 1, 2, False),
    "obs, mask of one column": partial(_select, 2, 1, True),
}


# Tiles that only differ in the type of x or the size of a group: left out of a quick run.
QUICK = re.compile(r"^(?!.*(float16 .* g(64|32)|bfloat16 .* g64|sparse24\w* float16)).*$")


def compile_case(case: str, launch: Callable[[], None], arch: int) -> list[tuple[str, Row]]:
    """What `launch` compiles for sm_<arch>, with a hash of each kernel."""
    with compile_only(arch) as compiled:
        start = time.perf_counter()
        launch()
        seconds = time.perf_counter() - start
    rows = []
    for kernel, kwargs in compiled:
        constants = {k: v for k, v in kwargs.items() if isinstance(v, int | float | bool)}
        registers, stack = resources(kernel)
        name, shared = kernel.metadata.name, kernel.metadata.shared
        numbers = (registers, stack, shared, instructions(kernel), round(seconds, 2))
        rows.append((kernel.hash, Row(case, arch, name, constants, *numbers)))
    return rows


def compile_tile(op: str, x: str, config: configs.Config, group_size: int, arch: int) -> list[Row]:
    """The kernels of one tile of an op of the table; x is "16-bit" or "float32"."""
    launch = GEMMS[op]
    dtype = F32 if x == "float32" else BF16
    shape = (config.BLOCK_M, 4096, 4096)
    fitted = config if op == "sparse24_gemm" else config.for_groups(group_size)
    work = partial(launch, *shape, group_size, dtype, fitted)
    return [row for _, row in compile_case(op, work, arch)]


def compile_all(archs: list[int], quick: bool = False) -> list[Row]:
    rows = []
    seen = set()
    cases = {name: case for name, case in CASES.items() if not quick or QUICK.match(name)}
    for arch in archs:
        for case, launch in cases.items():
            for kernel, row in compile_case(case, launch, arch):
                if (arch, kernel) not in seen:
                    seen.add((arch, kernel))
                    rows.append(row)
    return rows


def main(
    arch: Annotated[list[int] | None, typer.Option(help="compute capability, e.g. 90")] = None,
    quick: Annotated[bool, typer.Option(help="leave out variants of group size and type")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    kept: Annotated[
        Path | None, typer.Option("--cache", help="keep kernels here and compile what is not there")
    ] = None,
) -> None:
    archs = arch or sorted(SHARED_LIMIT)
    if unknown := set(archs) - set(SHARED_LIMIT):
        raise typer.BadParameter(f"got {sorted(unknown)}, expected some of {sorted(SHARED_LIMIT)}")
    with tempfile.TemporaryDirectory() as empty:  # compile here and now, and leave nothing behind
        triton.knobs.cache.dir = str(kept or empty)
        rows = compile_all(archs, quick)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    table = Table(title=f"Triton {triton.__version__}, ahead of time")
    for title in ("case", "arch", "kernel", "tile", "registers", "stack", "shared", "problem"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        tile = " ".join(
            f"{k.removeprefix('BLOCK_')}={v}"
            for k, v in row.constants.items()
            if k.startswith("BLOCK_") or k == "num_warps"
        )
        numbers = map(str, (row.registers, row.stack_bytes, row.shared_bytes))
        table.add_row(row.case, f"sm_{row.arch}", row.kernel, tile, *numbers, row.problem() or "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if any(row.problem() for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

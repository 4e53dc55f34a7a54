"""Run every benchmark, one after the other, and keep the results in one file.

python bench/run_all.py                    writes bench/results/<machine>-<date>.json
python bench/run_all.py --only bench_w4a16_gemm --extra "--shape 4096x4096 --m 1"
                                           measures these cases anew and keeps the file's others
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import _report
import torch
import typer

from llmkern._json import to_json

HERE = Path(__file__).parent
BENCHES = (
    "bench_w4a16_gemm",
    "bench_lut4_gemm",
    "bench_sparse24_gemm",
    "bench_sparse24_w4a16_gemm",
    "bench_chain",
    "bench_hessian",
    "bench_obs",
)


def main(
    output: Annotated[Path | None, typer.Option(help="Result file.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Names of benches, repeatable.")] = None,
    extra: Annotated[str, typer.Option(help="Arguments for the benches, as '--m 1 --m 4'.")] = "",
) -> None:
    """Run the benches in fresh processes and merge what they write."""
    on_gpu = torch.device(device).type == "cuda"
    found = _report.environment(on_gpu)
    machine = found["gpu"] if on_gpu else found["cpu"]
    name = (
        f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}-{time.strftime('%Y%m%d')}.json"
    )
    output = output or HERE / "results" / name
    output.parent.mkdir(exist_ok=True)
    results = json.loads(output.read_text()) if output.is_file() else {}
    failed = []
    for bench in only or BENCHES:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, str(HERE / f"{bench}.py"), "--json", file.name]
            command += ["--device", device, *shlex.split(extra)]
            if extra and bench in results:  # a part of a bench: the file's other cases stay
                Path(file.name).write_text(to_json(results[bench]))
                command.append("--merge")
            if subprocess.run(command).returncode:
                failed.append(bench)  # the others still get their numbers
                continue
            results[bench] = json.loads(Path(file.name).read_text())
        output.write_text(to_json(results, indent=1) + "\n")
    print(f"wrote {output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    raise typer.Exit(len(failed) > 0)


if __name__ == "__main__":
    typer.run(main)

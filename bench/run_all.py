"""Run every benchmark, one after the other, and keep the results in one file.

python bench/run_all.py                    writes bench/results/<machine>-<date>.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import _report
import torch
import typer

HERE = Path(__file__).parent
BENCHES = ("bench_w4a16_gemm", "bench_lut4_gemm", "bench_chain", "bench_hessian", "bench_obs")


def main(
    output: Annotated[Path | None, typer.Option(help="Result file.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Names of benches, repeatable.")] = None,
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
    for bench in only or BENCHES:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, str(HERE / f"{bench}.py"), "--json", file.name]
            command += ["--device", device]
            subprocess.run(command, check=True)
            results[bench] = json.loads(Path(file.name).read_text())
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)

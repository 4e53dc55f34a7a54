"""A script run by `accelerate launch` on two CPU processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_in_two_processes(script: str, folder: Path) -> list[str]:
    """What each process printed; the package and the helpers of the tests can be imported in it."""
    path = folder / "train.py"
    path.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n{script}"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", "1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # On CPUs accelerate leaves the starting of several processes to MPI, which sets these.
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [
        subprocess.Popen(
            [*command, str(path)],
            env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank in ("0", "1")
    ]
    outputs = [run.communicate(timeout=300) for run in runs]
    for run, (_, error) in zip(runs, outputs, strict=True):
        assert run.returncode == 0, error[-2000:]
    return [out for out, _ in outputs]

"""Run the CUDA kernels' GPU tests under compute-sanitizer: memory errors, then shared-memory races.

    python scripts/sanitize_cuda.py [pytest arguments]

Only the cuda backend's small cases run: the sanitizer slows kernels down a hundredfold. Exits with 1 if
a tool reports anything; without compute-sanitizer it says so and exits with 0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "cuda" / "test_gpu.py"
# Of test_gpu.py, less its large matrices. A graph cannot be captured without torch's memory caching.
SUBSET = "not triton and not large and not graph"


def find() -> str | None:
    """compute-sanitizer on PATH, or beside the toolkit that CUDA_HOME or nvcc points to."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(1, str(Path(nvcc).resolve().parents[1]))
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *places]))


def main() -> int:
    tool = find()
    if tool is None:
        print("sanitize: skipped, compute-sanitizer was not found (it comes with the CUDA toolkit)")
        return 0
    # Each tensor in an allocation of its own, so that running past its end is seen.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--require-gpu", str(TESTS), "-k", SUBSET]
    failed = 0
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--report-api-errors", "no", "--error-exitcode", "1"]
        print("sanitize:", check, flush=True)
        failed |= subprocess.run([*command, *pytest, *sys.argv[1:]], cwd=ROOT, env=env).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())

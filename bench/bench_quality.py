"""What each quantization option costs in quality: KL and perplexity on the bundled model.

python bench/bench_quality.py                                   every variant, 4 and 3 bits, 3 seeds
python bench/bench_quality.py --bits 3 --only defaults --only dynamic --seeds 5

A seed chooses other calibration windows; shown are the mean over the seeds and, for KL, the spread
(largest minus smallest). Time is that of quantizing alone.
"""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkern import evaluate, quantize
from llmkern.assets import bundled_model_dir, calibration_text, evaluation_text
from llmkern.calibrate import load_tokens

MODEL, CALIBRATION, EVALUATION = bundled_model_dir(), calibration_text(), evaluation_text()

PLAIN = {"clip_search": False}

# Beside the plain methods: the defaults, and the defaults with one thing changed.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", PLAIN),
    "rtn asymmetric": ("rtn", PLAIN | {"symmetric": False}),
    "rtn clip_search": ("rtn", {"clip_search": True}),
    "plain, natural order, static": ("gptq", PLAIN | {"act_order": False}),
    "plain, natural order, dynamic": ("gptq", PLAIN | {"group_scales": "dynamic"}),
    "plain, act_order": ("gptq", PLAIN),
    "defaults": ("gptq", {}),
    "natural order": ("gptq", {"act_order": False}),
    "dynamic": ("gptq", {"group_scales": "dynamic"}),
    "one pass": ("gptq", {"true_sequential": False}),
    "asymmetric": ("gptq", {"symmetric": False}),
    "damp 0.003": ("gptq", {"damp": 0.003}),
    "damp 0.03": ("gptq", {"damp": 0.03}),
    "damp 0.1": ("gptq", {"damp": 0.1}),
    "per channel": ("gptq", {"group_size": None}),
}


def main(
    *,
    model_dir: Annotated[Path, typer.Option("--model")] = MODEL,
    calibration: Annotated[Path, typer.Option(help="text")] = CALIBRATION,
    text: Annotated[Path, typer.Option(help="text to evaluate on")] = EVALUATION,
    bits: Annotated[list[int] | None, typer.Option(help="[default: 4 and 3]")] = None,
    only: Annotated[list[str] | None, typer.Option(help="variants whose name holds this")] = None,
    seeds: int = 3,
    samples: int = 128,
    windows: Annotated[int, typer.Option(help="evaluation windows")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Quantize the model with every variant and compare with the original."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    held_out = load_tokens(text, reference, tokenizer)[:windows]
    console = Console()
    rows = []
    for width in bits or (4, 3):
        for name, (method, options) in VARIANTS.items():
            if only and not any(part in name for part in only):
                continue
            settings = {"bits": width, "calibration": calibration, "samples": samples, **options}
            runs = [
                _measure(reference, held_out, method, tokenizer=tokenizer, seed=seed, **settings)
                for seed in range(1 if method == "rtn" else seeds)
            ]
            rows.append({"bits": width, "variant": name, "runs": runs})
            console.print(f"{width} bits, {name}: KL {statistics.mean(r[0] for r in runs):.5f}")
    original = evaluate(reference, held_out, speed=False).perplexity
    title = (
        f"{model_dir.name}: {held_out.numel()} held-out tokens, perplexity {original:.3f} before; "
        f"{samples} calibration windows of {held_out.shape[1]}"
    )
    console.print(_table(title, rows))
    if json_file is not None:
        json_file.write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")


def _measure(reference: nn.Module, held_out: Tensor, method: str, **options: Any) -> list[float]:
    """KL, perplexity, top-1 agreement and seconds of one quantization."""
    model = copy.deepcopy(reference)
    report = quantize(model, method, **options)
    result = evaluate(model, held_out, reference=reference, speed=False)
    return [result.kl, result.perplexity, result.top1_agreement, report.seconds]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in ("bits", "variant", "KL", "spread", "perplexity", "top-1", "seconds"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        kl, perplexity, top1, seconds = zip(*row["runs"], strict=True)
        table.add_row(
            str(row["bits"]),
            row["variant"],
            f"{statistics.mean(kl):.5f}",
            f"{max(kl) - min(kl):.5f}",
            f"{statistics.mean(perplexity):.3f}",
            f"{statistics.mean(top1):.4f}",
            f"{statistics.median(seconds):.1f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)

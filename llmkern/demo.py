"""The demo: the bundled model quantized by RTN and GPTQ to 4 and 3 bits, measured, saved, reloaded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from rich.console import Console
from rich.table import Table

import llmkern
from llmkern import assets, env
from llmkern.calibrate import load_tokens
from llmkern.evaluate import evaluate

REPORT = Path("demo-report.json")
PLOT = Path("demo-report.png")
SEQ_LEN = 512
SAMPLES = 64
EVALUATION_WINDOWS = 64
PROMPT = "def read_lines(path):\n"


def run(output: Path, console: Console) -> None:
    """Quantize, evaluate, save, reload and generate; print a table and write the report and its plot.

    Args:
        output: directory for the compressed models; one folder each, replaced on every run.
        console: where to print.
    """
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.bundled_model_dir())
    original = _bundled()
    size = sum(parameter.numel() for parameter in original.parameters())
    console.print(f"bundled model: {size / 1e6:.1f} M parameters")
    text = assets.evaluation_text()
    tokens = load_tokens(text, original, tokenizer, seq_len=SEQ_LEN)[:EVALUATION_WINDOWS]

    rows = [_measure("fp32", original, tokens, None, 0.0)]
    rows[0]["file_bytes"] = rows[0]["weight_bytes"]
    sample = ""
    for method in ("rtn", "gptq"):
        for bits in (4, 3):
            directory = output / f"{method}-{bits}bit"
            started = time.perf_counter()
            model = _bundled()
            options: dict[str, Any] = {}
            if method == "gptq":
                options = {"calibration": assets.calibration_text(), "tokenizer": tokenizer}
                options |= {"samples": SAMPLES, "seq_len": SEQ_LEN}
            llmkern.quantize(model, method, bits=bits, group_size=128, progress=True, **options)
            seconds = time.perf_counter() - started
            llmkern.save(model, directory, tokenizer=tokenizer, overwrite=True)
            reloaded = llmkern.load(directory, dtype=torch.float32)
            _check_reload(model, reloaded, tokens[:1])
            rows.append(_measure(f"{method} {bits}-bit", reloaded, tokens, original, seconds))
            rows[-1]["file_bytes"] = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
            if (method, bits) == ("gptq", 4):
                sample = _generate(reloaded, tokenizer)
    console.print(_table(rows))
    console.print(f"\n4-bit GPTQ, reloaded from {output / 'gptq-4bit'}, continues {PROMPT!r}:\n")
    console.print(sample, markup=False, highlight=False)
    report = {
        "protocol": f"{tokens.numel()} held-out tokens in windows of {SEQ_LEN}, group size 128",
        "versions": env.versions(),
        "hardware": env.hardware(),
        "models": rows,
        "sample": sample,
    }
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    _plot(rows)
    console.print(f"\nwrote {REPORT}, {PLOT} and the models in {output}/")


def _bundled() -> Any:
    return llmkern.load(assets.bundled_model_dir(), dtype=torch.float32)


def _measure(
    name: str, model: Any, tokens: torch.Tensor, reference: Any, seconds: float
) -> dict[str, Any]:
    result = evaluate(model, tokens, seq_len=SEQ_LEN, reference=reference)
    return {"name": name, "seconds": seconds, **result.to_dict()}


def _check_reload(saved: Any, reloaded: Any, tokens: torch.Tensor) -> None:
    """What was written must be what was quantized: the logits agree bit for bit."""
    with torch.inference_mode():
        if not torch.equal(saved(tokens).logits, reloaded(tokens).logits):
            raise RuntimeError("the reloaded model's logits differ from those of the model saved")


def _generate(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=80,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "model",
        "perplexity",
        "KL to fp32 (nats)",
        "file (MB)",
        "decode (tokens/s)",
        "quantize (s)",
    )
    for row in rows:
        kl = f"{row['kl']:.4f}" if row["kl"] is not None else "-"
        table.add_row(
            row["name"],
            f"{row['perplexity']:.3f}",
            kl,
            f"{row['file_bytes'] / 1e6:.2f}",
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['seconds']:.1f}",
        )
    return table


def _plot(rows: list[dict[str, Any]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        size = row["file_bytes"] / 1e6
        axes.scatter(size, row["perplexity"], s=40)
        axes.annotate(
            row["name"], (size, row["perplexity"]), xytext=(6, 4), textcoords="offset points"
        )
    axes.set_xlabel("weights on disk (MB)")
    axes.set_ylabel("perplexity on held-out text")
    axes.set_title("Bundled model: size against perplexity (lower left is better)")
    axes.grid(alpha=0.3)
    figure.savefig(PLOT, dpi=150)
    pyplot.close(figure)

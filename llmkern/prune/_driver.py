"""`prune`: checks what was asked, hands it to the method, completes the report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from llmkern.calibrate.data import Source
from llmkern.drive import find_method, sort_options
from llmkern.models import left_share
from llmkern.prune import depth, glu, heads, magnitude, sparsegpt, taylor, wanda
from llmkern.prune._amount import Amount, Pattern, check_fraction, parse_pattern
from llmkern.prune._method import PruneJob, PruneMethod
from llmkern.prune._report import PruneReport

METHODS: list[PruneMethod] = [
    sparsegpt.METHOD,
    wanda.METHOD,
    magnitude.METHOD,
    glu.GLU,
    glu.MLP,
    heads.METHOD,
    depth.METHOD,
    taylor.METHOD,
]


def prune(
    model: nn.Module,
    method: str = "sparsegpt",
    *,
    sparsity: float | None = None,
    pattern: str | tuple[int, int] | Pattern | None = None,
    ratio: float | None = None,
    calibration: Source = None,
    tokenizer: Any = None,
    rules: Mapping[str, Any] | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> PruneReport:
    """Remove weights from the decoder blocks of `model`, in place.

    Embeddings, norms and the head stay as they are. A method that needs to know the inputs of a layer
    walks the blocks in order, each calibrated on the output of the pruned ones before it, and holds one
    block's statistics and the hidden states of the calibration windows beyond the model itself.

    Args:
        model: a causal language model in float32, bfloat16 or float16.
        method: the name of one of `METHODS`.
        sparsity: for single weights: the fraction of each layer's weights to set to zero, in [0, 1).
        pattern: for single weights: n kept of every m along K, as "2:4" or (2, 4), 1 <= n < m <= 8.
        ratio: for whole structures (neurons, heads, blocks): the fraction of them to take out, in
            [0, 1); or give target_params, an option of those methods.
        calibration: text, path, tokens or dataset (see `llmkern.calibrate.data`); None takes the text
            that comes with llmkern.
        tokenizer: needed where the calibration is text.
        rules: glob over full layer names -> a sparsity or pattern for those layers, or None to leave
            them as they are; the last that matches counts.
        progress: say on standard error how far it is: a bar on a terminal, a line a minute elsewhere.
        checkpoint: directory for the state of the work, kept after each decoder block (and during a
            recovery); new or empty. The caller deletes it when it is of no more use.
        resume: the same call, on the same model as it was before, goes on at the block after the last
            one that `checkpoint` holds, with the same bits as without the interruption. What a method
            finds out beforehand (outliers, costs, gradients, which blocks go) it finds out again.
        options: those of the method (see its dataclass in `llmkern.prune`), and those of
            `DataOptions`: samples, seq_len, seed, batch_size, compute_dtype,
            text_field.

    Returns:
        The report: per layer its zeros, loss, damping and time; what was kept and why.

    Raises:
        ValueError: an unknown method or option, an amount that the method does not take or out of
            range, a pattern that does not divide a layer's K, a rule that matches nothing, NaN or Inf
            in a weight (the layer is named), bad calibration data or data that the method does not
            need, a checkpoint that holds state without resume, or of other settings: all before the
            model is touched. NaN or Inf in a layer's calibration activations.
        NotImplementedError: an encoder-decoder model.

    Warns:
        RuntimeWarning: a layer that had to be pruned by a simpler method because no token reached it or
            its Hessian could not be factored; after an error in the middle, which layers were pruned.
    """
    start = time.perf_counter()
    kind = find_method(METHODS, method)
    settings, data = sort_options(kind, options)
    asked = {"sparsity": sparsity, "pattern": pattern, "ratio": ratio}
    amount, described = sort_amount(kind, asked)
    report = PruneReport(method, described, dataclasses.asdict(settings))
    report.parameters_before = _parameters(model)
    job = PruneJob(model, settings, data, amount, dict(rules or {}), report, progress)
    job.checkpoint, job.resume = checkpoint, resume
    job.calibration, job.tokenizer = calibration, tokenizer
    job.data_given = tuple(name for name in vars(data) if name in options)
    kind.work.run(job)
    report.parameters_after = _parameters(model)
    if report.layers:
        report.notes.append(left_share(model, [line.name for line in report.layers]))
    report.seconds = time.perf_counter() - start + (job.journal.seconds if job.journal else 0.0)
    return report


def sort_amount(kind: PruneMethod, asked: dict[str, Any]) -> tuple[Amount | None, dict[str, Any]]:
    """The amount that was asked for, checked, and its entry in the report."""
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if name not in kind.amounts:
            raise ValueError(
                f"{name}: got {value!r}, expected {' or '.join(kind.amounts)} for method {kind.name!r}"
            )
    if len(given) > 1 or (kind.needs_amount and not given):
        raise ValueError(
            f"{', '.join(kind.amounts)}: got {'several' if given else 'none'} of them, expected one"
        )
    for name, value in given.items():
        if name == "pattern":
            wanted = parse_pattern(value)
            return wanted, {name: str(wanted)}
        fraction = check_fraction(value, name)
        return fraction, {name: fraction}
    return None, {}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

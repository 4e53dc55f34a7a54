"""`quantize`: checks, the plan, and the work, one decoder block at a time."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from llmkern._dtypes import dtype_name
from llmkern.calibrate import load_windows
from llmkern.calibrate.data import Source, teller
from llmkern.drive import (
    Layer,
    LayerRun,
    Lines,
    Progress,
    find_method,
    open_journal,
    sort_options,
)
from llmkern.formats import WeightFormat
from llmkern.masks import forget_filled
from llmkern.models import compute_dtype, compute_note, left_share
from llmkern.models.linears import shape_of
from llmkern.patch import winning_pattern
from llmkern.quantize import gptq, rtn, tables
from llmkern.quantize._formats import check_held
from llmkern.quantize._method import QuantizeMethod, Result
from llmkern.quantize._report import QuantizedLayer, QuantizeReport
from llmkern.wire import record_formats

METHODS: list[QuantizeMethod] = [gptq.METHOD, rtn.METHOD, tables.NF4, tables.FP4]

_Plan = dict[str, WeightFormat]


def quantize(
    model: nn.Module,
    method: str = "gptq",
    *,
    bits: int = 4,
    group_size: int | Literal["auto"] | None = "auto",
    symmetric: bool = True,
    rules: Mapping[str, WeightFormat | None] | None = None,
    calibration: Source = None,
    tokenizer: Any = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> QuantizeReport:
    """Quantize the linears in the decoder blocks of `model`, in place.

    Every linear becomes an `IntLinear`, or a `Lut4Linear` with the tables NF4 and FP4; embeddings, norms
    and the head stay as they are. A method that calibrates walks
    the blocks in order, each calibrated on the output of the compressed ones before it, and holds one
    block's statistics and the hidden states of the calibration windows beyond the model itself.

    Args:
        model: a causal language model in float32, bfloat16 or float16.
        method: the name of one of `METHODS`: "gptq", or without calibration "rtn" (round to nearest),
            "nf4" or "fp4" (bitsandbytes' tables).
        bits: 2, 3 or 4; 4 for the tables.
        group_size: K-elements per scale, a divisor of every layer's K; None for one scale per row. For
            the tables: elements of the flattened weight. "auto" is 128 where it divides K, else 64, 32
            or a whole row, and 64 for the tables.
        symmetric: no zero points; the tables have none.
        rules: glob over full layer names -> `QuantFormat` (`LutFormat` with the tables) for those
            layers, or None to leave them dense; the last that matches counts.
        calibration: text, path, tokens or dataset (see `llmkern.calibrate.data`); None takes the text
            that comes with llmkern. Methods without calibration read none.
        tokenizer: needed where the calibration is text.
        progress: say on standard error how far it is: a bar on a terminal, a line a minute elsewhere.
        checkpoint: directory for the state of the work, kept after each decoder block; new or empty.
            The caller deletes it when it is of no more use.
        resume: the same call, on the same model as it was before, goes on at the block after the last
            one that `checkpoint` holds, with the same bits as without the interruption.
        options: those of the method (`GptqOptions`: damp, act_order, group_scales, clip_search,
            true_sequential, keep_zeros; `RtnOptions`: clip_search), and where it calibrates those of
            `DataOptions`: samples, seq_len, seed, batch_size, compute_dtype,
            text_field.

    Returns:
        The report: per layer its format, loss, damping and time; what stayed dense and why.

    Raises:
        ValueError: an unknown method or option, a group size that does not divide a layer's K, a rule
            that matches nothing, NaN or Inf in a weight (the layer is named), bad calibration data,
            a checkpoint that holds state without resume, or of other settings: all before the model is
            touched. NaN or Inf in a layer's calibration activations.
        NotImplementedError: 8 bits, or an encoder-decoder model.

    Warns:
        RuntimeWarning: experts that stay dense; a layer that had to be rounded to nearest because its
            Hessian could not be factored; after an error in the middle, which layers were replaced.
    """
    start = time.perf_counter()
    kind = find_method(METHODS, method)
    settings, data = sort_options(kind, options)
    default = kind.formats.choose(bits, group_size, symmetric)
    rules, auto = dict(rules or {}), group_size == "auto"
    forget_filled(model, "quantize")
    plan, dense = plan_formats(kind, model, default, rules, auto=auto)
    report = QuantizeReport(method, dataclasses.asdict(settings), dense=dense)
    report.notes += size_notes(model, default, plan, rules)
    windows: Tensor | None = None
    dtype = compute_dtype(model, data.compute_dtype)
    if kind.work.needs(settings).tokens:
        windows = load_windows(
            calibration,
            model,
            tokenizer,
            seq_len=data.seq_len,
            samples=data.samples,
            seed=data.seed,
            text_field=data.text_field,
            said=teller(report.notes, shown=progress),
        )
        report.tokens, report.window = windows.numel(), windows.shape[1]
        note = compute_note(model, dtype)
        report.notes += [] if note is None else [note]
    asked = {
        "driver": "quantize",
        "method": method,
        "options": report.options,
        "batch_size": None if windows is None else data.batch_size,
        "compute_dtype": None if windows is None else dtype_name(dtype),
        "formats": {name: repr(fmt) for name, fmt in plan.items()},
    }
    journal = open_journal(model, asked, windows, checkpoint=checkpoint, resume=resume)
    bar = Progress(
        "quantize", "quantized", len(plan), shown=progress, record=partial(record_formats, model)
    )
    with bar:
        if journal is not None:
            lines = Lines(bar, report.layers, QuantizedLayer)
            journal.note(lines.take, lines.give)
        driver = _Driver(report, bar)
        run = LayerRun(
            model,
            settings,
            plan,
            driver,
            bar,
            windows,
            batch_size=data.batch_size,
            compute_dtype=data.compute_dtype,
            journal=journal,
        )
        kind.work.run(run)
    report.notes.append(left_share(model, [line.name for line in report.layers]))
    report.seconds = time.perf_counter() - start + (journal.seconds if journal else 0.0)
    return report


class _Driver:
    """Replaces layers one by one; keeps the report."""

    def __init__(self, report: QuantizeReport, progress: Progress) -> None:
        self._report, self._progress = report, progress
        self._shapes: dict[str, tuple[int, int]] = {}

    def place(self, layer: Layer, result: Result) -> None:
        """Put what the method made in the layer's place."""
        self._shapes[layer.name] = _matrix(layer.module)
        made = result.module(layer)
        if made is not layer.module:
            layer.replace(made)

    def report(self, layer: Layer, result: Result, seconds: float) -> None:
        """Add the layer's line."""
        if not result.factored:
            warnings.warn(
                f"{layer.name}: rounded to nearest, because no token reached it or its Hessian could not "
                "be factored at any damping",
                RuntimeWarning,
                stacklevel=2,
            )
        fmt: WeightFormat = layer.wanted
        N, K = self._shapes[layer.name]
        line = QuantizedLayer(
            name=layer.name,
            shape=(N, K),
            bits=fmt.bits,
            group_size=fmt.groups(K),
            symmetric=fmt.symmetric,
            loss=result.loss,
            relative_loss=result.relative_loss,
            damp=result.damp,
            factored=result.factored,
            zeros=result.zero_fraction(layer),
            seconds=seconds,
        )
        self._report.layers.append(line)
        self._progress.finish(line.name, loss=f"{line.relative_loss:.2e}")


def _matrix(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear; rows and columns of an embedding; (0, 0) of what has no matrix."""
    weight = module._parameters.get("weight")
    return shape_of(module) if weight is not None and weight.dim() == 2 else (0, 0)


def plan_formats(
    method: QuantizeMethod,
    model: nn.Module,
    default: WeightFormat,
    rules: Mapping[str, WeightFormat | None],
    *,
    auto: bool = False,
    values: bool = True,
) -> tuple[_Plan, dict[str, str]]:
    """Format of each layer to quantize, all of it checked, and why each other one stays dense.

    With `auto`, a layer that no rule names and that the default does not fit gets the next that does.
    """
    kind = type(default)
    for pattern, fmt in rules.items():
        if fmt is None:
            continue
        if type(fmt) is not kind:
            raise ValueError(
                f"rules: got {fmt!r} for {pattern!r}, expected a {kind.__name__} or None"
            )
        check_held(fmt, f"rules[{pattern!r}]")
    return method.work.plan(
        model,
        {"*": default, **rules},
        what="quantize",
        check=check_formats,
        fitted=method.formats.fitted if auto and "*" not in rules else None,
        values=values,
    )


def size_notes(
    model: nn.Module,
    default: WeightFormat,
    plan: Mapping[str, WeightFormat],
    rules: Mapping[str, object],
) -> list[str]:
    """One sentence for each format that layers got in place of the default, because it did not fit."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, fmt in plan.items():
        N, K = _matrix(model.get_submodule(name))
        odd = default.misfit(N, K)
        if odd is not None and winning_pattern(rules, name) is None:
            size = "one scale per row" if fmt.groups(K) == K else f"groups of {fmt.groups(K)}"
            found.setdefault((size, f"{odd.got} {odd.why}"), []).append(name)
    notes = []
    for (size, why), names in found.items():
        more = f" and {len(names) - 1} more layers" if len(names) > 1 else ""
        notes.append(f"{names[0]}{more}: {size}, because {why}")
    return notes


def check_formats(asked: Mapping[str, tuple[tuple[int, int], WeightFormat]]) -> None:
    """Refuse layers that their format does not fit: (N, K) and format by full name.

    Raises:
        ValueError: names the first, and how many more there are.
    """
    bad = [(n, odd) for n, (shape, fmt) in asked.items() if (odd := fmt.misfit(*shape))]
    if bad:
        name, odd = bad[0]
        more = f" and {len(bad) - 1} more layers" if len(bad) > 1 else ""
        raise ValueError(
            f"{odd.option}: got {odd.got}, which {odd.why} of {name}{more}; expected {odd.wanted}, or "
            f"rules={{{name!r}: None}} to leave the layer dense"
        )

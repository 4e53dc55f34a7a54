"""`quantize`: checks, the plan, and the work, one decoder block at a time."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from llmkern._drive import Lines, Work, for_each_layer, layer_stage, plan_layers, sort_options
from llmkern._journal import Journal, open_journal
from llmkern.calibrate import Block, HessianStatistic, load_windows, walk
from llmkern.calibrate.data import Source
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import GROUP_UNIT, LutFormat
from llmkern.masks import kept_mask, recorded_layers, zero_fraction
from llmkern.models.linears import dense_weight
from llmkern.nn import Int4Linear
from llmkern.nn.int4_linear import BITS
from llmkern.quantize._report import LayerReport, QuantizedWeight, QuantizeReport
from llmkern.quantize.gptq import GptqOptions, gptq
from llmkern.quantize.rtn import RtnOptions, rtn
from llmkern.quantize.tables import BLOCK_SIZE, TableOptions, table_linear
from llmkern.wire import record_formats

METHODS: dict[str, type] = {
    "gptq": GptqOptions,
    "rtn": RtnOptions,
    "nf4": TableOptions,
    "fp4": TableOptions,
}

_Format = QuantFormat | LutFormat
_Formats = dict[str, _Format]


def quantize(
    model: nn.Module,
    method: str = "gptq",
    *,
    bits: int = 4,
    group_size: int | Literal["auto"] | None = "auto",
    symmetric: bool = True,
    rules: Mapping[str, QuantFormat | LutFormat | None] | None = None,
    calibration: Source = None,
    tokenizer: Any = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> QuantizeReport:
    """Quantize the linears in the decoder blocks of `model`, in place.

    Every linear becomes an `Int4Linear`, or a `Lut4Linear` with the tables NF4 and FP4; embeddings, norms
    and the head stay as they are. GPTQ walks
    the blocks in order, each calibrated on the output of the compressed ones before it, and holds one
    block's statistics and the hidden states of the calibration windows beyond the model itself.

    Args:
        model: a causal language model in float32, bfloat16 or float16.
        method: "gptq", or without calibration "rtn" (round to nearest), "nf4" or "fp4"
            (bitsandbytes' tables).
        bits: 2, 3 or 4; 4 for the tables.
        group_size: K-elements per scale, a divisor of every layer's K; None for one scale per row. For
            the tables: elements of the flattened weight. "auto" is 128, and 64 for the tables.
        symmetric: no zero points; the tables have none.
        rules: glob over full layer names -> `QuantFormat` (`LutFormat` with the tables) for those
            layers, or None to leave them dense; the last that matches counts.
        calibration: text, path, tokens or dataset (see `llmkern.calibrate.data`); None takes the text
            that comes with llmkern. Methods without calibration read none.
        tokenizer: needed where the calibration is text.
        progress: show a progress bar with the layer, its loss and the time left.
        checkpoint: directory for the state of the work, kept after each decoder block; new or empty.
            The caller deletes it when it is of no more use.
        resume: the same call, on the same model as it was before, goes on at the block after the last
            one that `checkpoint` holds, with the same bits as without the interruption.
        options: those of the method (`GptqOptions`: damp, act_order, group_scales, clip_search,
            true_sequential, keep_zeros; `RtnOptions`: clip_search), and for GPTQ those of
            `DataOptions`: samples, seq_len, seed, batch_size.

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
    settings, data = sort_options(method, METHODS, options)
    plan, dense = plan_formats(
        model, choose_format(method, bits, group_size, symmetric), dict(rules or {})
    )
    report = QuantizeReport(method, dataclasses.asdict(settings), dense=dense)
    windows: Tensor | None = None
    if isinstance(settings, GptqOptions):
        windows = load_windows(
            calibration,
            model,
            tokenizer,
            seq_len=data.seq_len,
            samples=data.samples,
            seed=data.seed,
        )
        report.tokens, report.window = windows.numel(), windows.shape[1]
    asked = {
        "driver": "quantize",
        "method": method,
        "options": report.options,
        "batch_size": None if windows is None else data.batch_size,
        "formats": {name: repr(fmt) for name, fmt in plan.items()},
    }
    journal = open_journal(model, asked, windows, checkpoint=checkpoint, resume=resume)
    with _Work(model, plan, report, progress) as work:
        if journal is not None:
            lines = Lines(work, report.layers, LayerReport)
            journal.note(lines.take, lines.give)
        _run(work, settings, windows, data.batch_size, journal)
    report.seconds = time.perf_counter() - start + (journal.seconds if journal else 0.0)
    return report


def _run(
    work: _Work, settings: Any, windows: Tensor | None, batch_size: int, journal: Journal | None
) -> None:
    """All blocks, by the method that the settings belong to."""
    if isinstance(settings, RtnOptions):
        simple = partial(work.compress, method=partial(rtn, options=settings))
        for_each_layer(work.model, work.plans, simple, journal=journal)
    elif isinstance(settings, TableOptions):
        for_each_layer(work.model, work.plans, work.look_up, journal=journal)
    else:
        assert windows is not None
        stage = _gptq_stage(work, settings, windows.numel())
        walk(work.model, windows, stage, batch_size=batch_size, journal=journal)


def _gptq_stage(work: _Work, settings: GptqOptions, tokens: int) -> Callable[[Block], None]:
    """GPTQ of one block: statistics and layers in the order of execution."""

    def empty(weight: Tensor) -> HessianStatistic:
        return HessianStatistic(weight.shape[1], tokens=tokens, device=weight.device)

    recorded = recorded_layers(work.model)

    def apply(prefix: str, block: nn.Module, name: str, statistic: HessianStatistic) -> None:
        mask = kept_mask(
            dense_weight(block.get_submodule(name)),
            recorded=f"{prefix}.{name}" in recorded,
            keep_zeros=settings.keep_zeros,
        )
        method = partial(gptq, statistic=statistic, options=settings, mask=mask)
        work.compress(prefix, block, name, method)

    return layer_stage(work, work.plans, empty, apply, sequential=settings.true_sequential)


class _Work(Work):
    """Replaces planned layers one by one; keeps the report."""

    def __init__(
        self, model: nn.Module, plan: _Formats, report: QuantizeReport, progress: bool
    ) -> None:
        super().__init__(
            "quantize",
            "quantized",
            len(plan),
            progress=progress,
            record=partial(record_formats, model),
        )
        self.model = model
        self._plan = plan
        self._report = report

    def __enter__(self) -> _Work:
        return self

    def plans(self, full: str) -> bool:
        """Whether the layer of this full name is to be quantized."""
        return full in self._plan

    def compress(
        self,
        prefix: str,
        block: nn.Module,
        name: str,
        method: Callable[[Tensor, QuantFormat], QuantizedWeight],
    ) -> None:
        """Replace the linear `name` of a block by its packed form."""
        full = f"{prefix}.{name}"
        fmt = self._plan[full]
        assert isinstance(fmt, QuantFormat)
        start = time.perf_counter()
        linear = block.get_submodule(name)
        weight = dense_weight(linear)
        with self.layer(full):
            result = method(weight, fmt)
            packed = _pack(linear, weight, result, fmt)
        block.set_submodule(name, packed)
        if not result.factored:
            warnings.warn(
                f"{full}: rounded to nearest, because no token reached it or its Hessian could not be "
                "factored at any damping",
                RuntimeWarning,
                stacklevel=2,
            )
        N, K = weight.shape
        self._report_line(
            LayerReport(
                name=full,
                shape=(N, K),
                bits=fmt.bits,
                group_size=fmt.groups(K),
                symmetric=fmt.symmetric,
                loss=result.loss,
                relative_loss=result.relative_loss,
                damp=result.damp,
                factored=result.factored,
                zeros=_zeros(result, fmt),
                seconds=time.perf_counter() - start,
            )
        )

    def look_up(self, prefix: str, block: nn.Module, name: str) -> None:
        """Replace the linear `name` of a block by its form in the table's entries."""
        full = f"{prefix}.{name}"
        fmt = self._plan[full]
        assert isinstance(fmt, LutFormat)
        start = time.perf_counter()
        with self.layer(full):
            packed, loss, relative = table_linear(block.get_submodule(name), fmt)
        block.set_submodule(name, packed)
        self._report_line(
            LayerReport(
                name=full,
                shape=(packed.out_features, packed.in_features),
                bits=4,
                group_size=fmt.block_size,
                symmetric=True,
                loss=loss,
                relative_loss=relative,
                damp=None,
                factored=True,
                zeros=zero_fraction(packed.dequantize()),
                seconds=time.perf_counter() - start,
            )
        )

    def _report_line(self, line: LayerReport) -> None:
        self._report.layers.append(line)
        self.finish(line.name, loss=f"{line.relative_loss:.2e}")


def _zeros(result: QuantizedWeight, fmt: QuantFormat) -> float:
    """Fraction of a result's weights that are exactly zero."""
    N, K = result.codes.shape
    groups = result.codes.view(N, -1, fmt.groups(K))
    zero = 1 << (fmt.bits - 1) if result.zeros is None else result.zeros[..., None]
    return int((groups == zero).sum()) / max(1, N * K)


def _pack(
    linear: nn.Module, weight: Tensor, result: QuantizedWeight, fmt: QuantFormat
) -> Int4Linear:
    packed = Int4Linear.from_parts(
        result.codes,
        result.scales,
        result.zeros,
        getattr(linear, "bias", None),
        bits=fmt.bits,
        group_size=fmt.group_size,
        dtype=weight.dtype,
    )
    return packed.train(linear.training)


def choose_format(
    method: str, bits: int, group_size: int | Literal["auto"] | None, symmetric: bool
) -> _Format:
    if METHODS[method] is TableOptions:
        if bits != 4 or not symmetric:
            got = f"bits: got {bits}" if bits != 4 else f"symmetric: got {symmetric}"
            raise ValueError(f"{got}, expected {4 if bits != 4 else True} for method {method!r}")
        if group_size is None:
            raise ValueError(f"group_size: got None, expected a block size for method {method!r}")
        return LutFormat(method, BLOCK_SIZE if group_size == "auto" else group_size)
    fmt = QuantFormat(bits, 128 if group_size == "auto" else group_size, symmetric)
    _check_bits(fmt, "bits")
    return fmt


def _check_bits(fmt: QuantFormat, argument: str) -> None:
    if fmt.bits not in BITS:
        raise NotImplementedError(
            f"{argument}: got {fmt.bits} bits, expected one of {BITS}: no packed linear layer holds "
            "other widths yet"
        )


def plan_formats(
    model: nn.Module, default: _Format, rules: Mapping[str, _Format | None], *, values: bool = True
) -> tuple[_Formats, dict[str, str]]:
    """Format of each layer to quantize, all of it checked, and why each other one stays dense."""
    kind = type(default)
    for pattern, fmt in rules.items():
        if fmt is not None and not isinstance(fmt, kind):
            raise ValueError(
                f"rules: got {fmt!r} for {pattern!r}, expected a {kind.__name__} or None"
            )
        if isinstance(fmt, QuantFormat):
            _check_bits(fmt, f"rules[{pattern!r}]")
    return plan_layers(
        model, {"*": default, **rules}, what="quantize", check=check_groups, values=values
    )


def check_groups(asked: Mapping[str, tuple[int, _Format]]) -> None:
    bad = []
    for name, (K, fmt) in asked.items():
        size = fmt.block_size if isinstance(fmt, LutFormat) else fmt.group_size
        if size is not None and not _fits(fmt, size, K):
            bad.append((name, K, size, isinstance(fmt, LutFormat)))
    if bad:
        name, K, size, table = bad[0]
        fits = [str(g) for g in (128, 64, 32) if K % g == 0] or ["None (one scale per row)"]
        more = f" and {len(bad) - 1} more layers" if len(bad) > 1 else ""
        why, wanted = f"does not divide K = {K} of", f"a divisor such as {fits[0]}"
        if table:
            why, wanted = f"in rows of K = {K} splits 32 columns of", "K a multiple of 32"
        raise ValueError(
            f"group_size: got {size}, which {why} {name}{more}; expected {wanted}, or "
            f"rules={{{name!r}: None}} to leave the layer dense"
        )


def _fits(fmt: _Format, size: int, K: int) -> bool:
    # Blocks run over the flattened weight; the kernels read 32 columns of a row at a time.
    return math.gcd(size, K) % GROUP_UNIT == 0 if isinstance(fmt, LutFormat) else K % size == 0

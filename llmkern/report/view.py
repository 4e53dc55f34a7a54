"""What a report says, before it is laid out: columns, cells, and what each stage bought and cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmkern.report.records import PipelineReport, StageRecord

# Speeds in an evaluation, in the order in which `llmkern.evaluate.speeds` returns them.
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")
_LISTED = 6  # entries of a list that an option shows
# Changes below it are not worth a line: a reader would take them for something.
_NOTICEABLE = 0.005


@dataclass(frozen=True)
class Column:
    """One measured figure.

    Attributes:
        key: its name in the page.
        title: of the column.
        help: what it is, with its unit.
        value: the figure of a record; None where it was not measured.
        show: a figure for a reader.
        better: "low", "high", or "" for what was spent.
        phrase: in a sentence after a change: "on disk".
    """

    key: str
    title: str
    help: str
    value: Callable[[StageRecord], float | None]
    show: Callable[[float], str]
    better: str
    phrase: str


@dataclass(frozen=True)
class Cell:
    """One figure of one row.

    Attributes:
        value: for sorting; None where it was not measured.
        text: for reading; "–" where it was not measured.
        note: compared with the original: "−75 %", "1.80×"; may be empty.
        share: of the original's value in [0, 1], to be drawn as a bar; None for no bar.
        tone: "good", "bad" or "".
    """

    value: float | None
    text: str
    note: str = ""
    share: float | None = None
    tone: str = ""


@dataclass(frozen=True)
class Row:
    """One stage: its record, its cells in the order of the columns, what to know of it."""

    record: StageRecord
    cells: list[Cell]
    options: str
    best: bool


@dataclass(frozen=True)
class Line:
    """One thing that changed: "−75 %", "on disk", "11.5 MB → 2.88 MB"."""

    change: str
    phrase: str
    path: str

    def __str__(self) -> str:
        return f"{self.change} {self.phrase} ({self.path})"


@dataclass(frozen=True)
class Step:
    """What a stage bought and cost, compared with the model before it, and what was spent on it."""

    record: StageRecord
    bought: list[Line]
    cost: list[Line]
    spent: list[str]


@dataclass(frozen=True)
class Tile:
    """One figure that sums up the whole report."""

    title: str
    figure: str
    detail: str
    tone: str


def digits(value: float) -> str:
    """Three significant digits, and all of a larger number's: "1.70", "11.5", "4,100"."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:,.0f}"


def _scaled(value: float, units: Sequence[str]) -> str:
    """With the largest unit that leaves at least 1, of units that are thousands of each other."""
    for power in range(len(units) - 1, 0, -1):
        if value >= 1000**power:
            return f"{digits(value / 1000**power)} {units[power]}"
    return f"{value:.0f} {units[0]}".rstrip()


def size(value: float) -> str:
    """Bytes, decimal units: "11.5 MB"."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: float) -> str:
    """A number of parameters: "2.89 M"."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def duration(value: float) -> str:
    """Seconds, minutes or hours: "12.3 s", "4 min 10 s", "2 h 5 min"."""
    if value < 59.95:
        return f"{digits(value)} s" if value >= 0.01 else "< 0.01 s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _measured(name: str) -> Callable[[StageRecord], float | None]:
    return lambda record: record.evaluation.get(name)


COLUMNS = (
    Column(
        "parameters",
        "Parameters",
        "weights of the model; those of packed layers count as weights, zeros too",
        lambda record: record.parameters,
        count,
        "low",
        "parameters",
    ),
    Column(
        "disk",
        "On disk",
        "bytes of the safetensors files",
        lambda record: record.disk_bytes or None,  # a model in memory has no files
        size,
        "low",
        "on disk",
    ),
    Column(
        "memory",
        "In memory",
        "bytes of all weights as the kernels hold them",
        _measured("weight_bytes"),
        size,
        "low",
        "in memory",
    ),
    Column(
        "perplexity",
        "Perplexity",
        "of the evaluation text; lower is better",
        _measured("perplexity"),
        lambda value: f"{value:.4g}" if value >= 1000 else f"{value:.3f}",
        "low",
        "perplexity",
    ),
    Column(
        "kl",
        "KL",
        "divergence from the original, nats per token; 0 is the original",
        _measured("kl"),
        lambda value: f"{value:.4f}",
        "low",
        "KL to the original",
    ),
    Column(
        "top1",
        "Top-1",
        "tokens where the original's likeliest token is this model's too",
        _measured("top1_agreement"),
        lambda value: f"{100 * value:.1f} %",
        "high",
        "top-1 agreement",
    ),
    Column(
        "prefill",
        "Prefill",
        "tokens per second of one window, batch 1",
        _measured(RATES[0]),
        digits,
        "high",
        "prefill",
    ),
    Column(
        "decode",
        "Decode",
        "tokens per second of greedy decoding, batch 1",
        _measured(RATES[1]),
        digits,
        "high",
        "decode",
    ),
    Column(
        "seconds",
        "Time",
        "that the stage took, measuring not included",
        lambda record: record.seconds or None,
        duration,
        "",
        "of work",
    ),
    Column(
        "peak",
        "Peak memory",
        "largest memory of the process during the stage",
        lambda record: record.peak_memory_bytes,
        size,
        "",
        "of memory at the peak",
    ),
)

BY_KEY = {column.key: column for column in COLUMNS}
_BARS = ("parameters", "disk", "memory")
_SPEEDS = ("prefill", "decode")
# Their value says by itself how far the model is from the original.
_ABSOLUTE = ("kl", "top1")


def distinct_labels(report: PipelineReport) -> PipelineReport:
    """The report with no two stages of one label: the number of the stage is added to such ones."""
    labels = [record.label for record in report.stages]
    stages = [
        record
        if labels.count(record.label) == 1
        else dataclasses.replace(record, label=f"{record.label} ({index})")
        for index, record in enumerate(report.stages)
    ]
    return dataclasses.replace(report, stages=stages)


def used_columns(report: PipelineReport) -> list[Column]:
    """The columns of which at least one stage has a figure."""
    return [c for c in COLUMNS if any(c.value(record) is not None for record in report.stages)]


def rows(report: PipelineReport, columns: Sequence[Column]) -> list[Row]:
    """One row per stage, compared with the original."""
    original = report.stages[0]
    front = _front(report)
    return [
        Row(
            record,
            [_cell(column, record, None if record is original else original) for column in columns],
            ", ".join(f"{name} {_option(value)}" for name, value in record.options.items()),
            record.name in front,
        )
        for record in report.stages
    ]


def _option(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_option(entry)}" for name, entry in value.items()) + ")"
    if isinstance(value, list | tuple) and len(value) > _LISTED:
        return f"{len(value)} entries"
    return str(value)


def _cell(column: Column, record: StageRecord, original: StageRecord | None) -> Cell:
    value = column.value(record)
    if value is None:
        return Cell(None, "–")
    old = None if original is None else _original_value(column, record, original)
    bar = column.key in _BARS
    share = min(1.0, value / old) if bar and old else 1.0 if bar and original is None else None
    if not old or column.better == "" or column.key in _ABSOLUTE:
        return Cell(value, column.show(value), "", share)
    change = _change_of(old, value)
    note = f"{value / old:.2f}×" if column.key in _SPEEDS else percent(change)
    return Cell(value, column.show(value), note, share, _tone(column, change))


def _original_value(column: Column, record: StageRecord, original: StageRecord) -> float | None:
    """The original's figure; its speed as measured beside the record's model, if it was."""
    beside = record.evaluation.get("original") or {}
    if column.key in _SPEEDS and beside:
        rate: float | None = beside.get(RATES[_SPEEDS.index(column.key)])
        return rate
    return column.value(original)


def _same(old: float, new: float) -> bool:
    """Whether two figures are one; those of broken models are inf or NaN."""
    return new == old or (math.isnan(new) and math.isnan(old))


def _change_of(old: float, new: float) -> float:
    """Relative change of a figure, which may be inf or NaN."""
    return 0.0 if _same(old, new) else new / old - 1


def percent(change: float) -> str:
    """A relative change with its sign: "−75 %", "+4.5 %", "±0 %", "+∞ %"; "–" where there is none."""
    if not math.isfinite(change):
        return "–" if math.isnan(change) else "+∞ %"
    number = f"{100 * abs(change):.1f}" if abs(change) < 0.0995 else f"{100 * abs(change):,.0f}"
    if float(number.replace(",", "")) == 0:
        return "±0 %"
    return f"{'−' if change < 0 else '+'}{number} %"


def _tone(column: Column, change: float) -> str:
    if abs(change) < _NOTICEABLE or not column.better:
        return ""
    if math.isnan(change):
        return "bad"
    return "good" if (change < 0) == (column.better == "low") else "bad"


def _front(report: PipelineReport) -> set[str]:
    """Names of the models of a comparison that no other one beats in bytes on disk and KL alike."""
    if report.in_sequence:
        return set()
    points = [
        (record.name, record.disk_bytes, kl)
        for record in report.stages[1:]
        if (kl := BY_KEY["kl"].value(record)) is not None and not math.isnan(kl)
    ]
    return {
        name
        for name, disk, kl in points
        if not any(d <= disk and k <= kl and (d < disk or k < kl) for _, d, k in points)
    }


def steps(report: PipelineReport) -> list[Step]:
    """What each stage bought and cost; none for a comparison."""
    if not report.in_sequence:
        return []
    pairs = zip(report.stages, report.stages[1:], strict=False)
    return [_step(before, after) for before, after in pairs]


def _step(before: StageRecord, after: StageRecord) -> Step:
    step = Step(after, [], [], [])
    lines = {"good": step.bought, "bad": step.cost}
    for column in COLUMNS:
        new, old = column.value(after), column.value(before)
        if new is None:
            continue
        if column.better == "":
            step.spent.append(f"{column.show(new)} {column.phrase}")
            continue
        if old is None:
            # The original was compared with nothing.
            old = {"kl": 0.0, "top1": 1.0}.get(column.key)
        tone, line = _change(column, old, new)
        if tone:
            lines[tone].append(line)
    return step


def _change(column: Column, old: float | None, new: float) -> tuple[str, Line]:
    """(tone, line) of one figure that went from `old` to `new`."""
    if old is None or (not old and column.key not in _ABSOLUTE):
        return "", Line("", column.phrase, "")
    path = f"{column.show(old)} → {column.show(new)}"
    if column.key in _ABSOLUTE:
        moved = 0.0 if _same(old, new) else new - old
        digits, unit, scale = (1, "points", 100) if column.key == "top1" else (4, "nats", 1)
        number = f"{scale * abs(moved):.{digits}f}"
        tone = (
            ""
            if float(number) == 0
            else "good"
            if (moved < 0) == (column.better == "low")
            else "bad"
        )
        return tone, Line(f"{'−' if moved < 0 else '+'}{number} {unit}", column.phrase, path)
    change = _change_of(old, new)
    figure = f"{new / old:.2f}×" if column.key in _SPEEDS else percent(change)
    return _tone(column, change), Line(figure, column.phrase, path)


def tiles(report: PipelineReport) -> list[Tile]:
    """The figures that sum up the report: the last model against the original, or the winners."""
    if len(report.stages) < 2:
        return []
    made = _totals(report) if report.in_sequence else _winners(report)
    return [tile for tile in made if tile is not None]


def _totals(report: PipelineReport) -> list[Tile | None]:
    first, last = report.stages[0], report.stages[-1]

    def tile(key: str, title: str, words: tuple[str, str] | None) -> Tile | None:
        column = BY_KEY[key]
        old, new = column.value(first), column.value(last)
        if not old or not new:
            return None
        change = _change_of(old, new)
        if words is None:
            figure = percent(change)
        else:
            factor, word = (new / old, words[0]) if new >= old else (old / new, words[1])
            figure = f"{factor:.2f}× {word}" if factor < 10 else f"{factor:.0f}× {word}"
        path = f"{column.show(old)} → {column.show(new)}"
        return Tile(title, figure, path, _tone(column, change))

    kl = BY_KEY["kl"].value(last)
    top1 = BY_KEY["top1"].value(last)
    distance = None
    if kl is not None:
        agreed = "" if top1 is None else f"{BY_KEY['top1'].show(top1)} top-1 agreement"
        distance = Tile("KL to the original", f"{kl:.4f} nats", agreed, "")
    spent = sum(record.seconds for record in report.stages[1:])
    return [
        tile("disk", "Size on disk", ("larger", "smaller"))
        or tile("memory", "Size in memory", ("larger", "smaller")),
        tile("perplexity", "Perplexity", None),
        distance,
        tile("decode", "Decoding", ("faster", "slower")),
        Tile("Time spent", duration(spent), f"in {len(report.stages) - 1} stages", ""),
    ]


def _winners(report: PipelineReport) -> list[Tile | None]:
    def best(key: str, title: str) -> Tile | None:
        column = BY_KEY[key]
        measured = [(column.value(record), record) for record in report.stages[1:]]
        found = [(v, r) for v, r in measured if v is not None and not math.isnan(v)]
        if not found:
            return None
        pick = min if column.better == "low" else max
        value, record = pick(found, key=lambda entry: entry[0])
        return Tile(title, record.label, column.show(value), "")

    return [
        best("disk", "Smallest on disk"),
        best("memory", "Smallest in memory"),
        best("kl", "Closest to the original (KL)"),
        best("decode", "Fastest decoding"),
    ]


def protocol(report: PipelineReport) -> str:
    """What was evaluated on, in one line; empty where it is not known."""
    for record in report.stages:
        entry = record.evaluation.get("protocol") or {}
        if "tokens" in entry and "window" in entry:
            dtype = f", computed in {entry['compute_dtype']}" if "compute_dtype" in entry else ""
            windows = f"{entry['tokens']:,} tokens in windows of {entry['window']}"
            return f"{windows}{dtype}; speed: batch 1, medians"
    return ""


def calibrations(report: PipelineReport) -> list[str]:
    """What each stage was calibrated on, for those that were."""
    lines = []
    for record in report.stages:
        tokens, window = record.driver.get("tokens"), record.driver.get("window")
        if tokens and window:
            lines.append(f"{record.label}: {tokens:,} tokens in windows of {window}")
    return lines

"""Preflight: what a pipeline will need and what will be refused, found before any work.

The stages are planned by their drivers' own functions on a skeleton of the model that holds no data
(`Stage.plan`), and memory and disk are estimated from its shapes (`Stage.memory`). The model is not
changed, copied or loaded. Impossible is what a driver would refuse, what cannot fit the machine's memory
or the free space of the disk, and data that is missing, too short or of another vocabulary; all else that
is odd is a warning, and what stays as it is, a note.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern._files import free_space
from llmkern.calibrate import check_runs, load_tokens
from llmkern.calibrate.data import DEFAULT_SEQ_LEN, TOKEN_FILES, Source, is_stream, is_turns
from llmkern.drive import Findings, Shapes, Tokens
from llmkern.hf import load_tokenizer
from llmkern.models import check_writes_text, chosen_dtype, context_length, vocabulary_size
from llmkern.pipeline._shapes import read_shapes, tied_embeddings
from llmkern.pipeline.stages import Stage, fit_to_later, source_of

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEASURED_BATCH = 4  # windows, see `llmkern.pipeline.measure`


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        stage: "2-quantize", or "model" and "output" for the run as a whole.
        text: the layer or argument, its value and what would fit.
    """

    stage: str
    text: str

    def __str__(self) -> str:
        own = f"{self.stage}: "
        return self.text if self.text.startswith(own) else f"{own}{self.text}"


@dataclass(frozen=True)
class StageFigures:
    """What a stage will need, estimated.

    Attributes:
        name: "2-quantize".
        label: for people.
        memory_bytes: at the peak, the measuring after it included; the interpreter not counted.
        weight_bytes: of its checkpoint.
        disk_bytes: of its checkpoint and of the state that it keeps until it is done.
    """

    name: str
    label: str
    memory_bytes: int
    weight_bytes: int
    disk_bytes: int


@dataclass
class Preflight:
    """What was found.

    Attributes:
        errors: what makes the run impossible.
        warnings: what may not be what is wanted.
        notes: what to know.
        figures: one entry per stage that could be planned.
        memory_total, memory_available: of the machine or GPU, in bytes.
        disk_bytes: that the whole run needs at its peak.
        disk_free: where the output will be; None without an output.
    """

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    figures: list[StageFigures] = field(default_factory=list)
    memory_total: int | None = None
    memory_available: int | None = None
    disk_bytes: int = 0
    disk_free: int | None = None

    def refuse(self) -> None:
        """Do nothing if the run is possible.

        Raises:
            ValueError: lists all errors.
        """
        if self.errors:
            raise ValueError("; ".join(map(str, self.errors)))

    def table(self) -> Any:
        """For rich: the figures, and the findings below them."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self._machine(), caption_justify="left")
        for heading in ("stage", "", "peak memory", "checkpoint", "disk, unfinished"):
            justify = "right" if table.columns[2:] or heading.startswith("peak") else "left"
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for row in self.figures:
            sizes = (row.memory_bytes, row.weight_bytes, row.disk_bytes)
            table.add_row(row.name, row.label, *(shown(size) for size in sizes))
        lines = []
        for kind, style in (("errors", "red"), ("warnings", "yellow"), ("notes", "dim")):
            word = kind.removesuffix("s")
            lines += [Text(f"{word}: {finding}", style=style) for finding in getattr(self, kind)]
        return Group(table, *lines)

    def _machine(self) -> str:
        parts = [f"estimates; disk in all {shown(self.disk_bytes)}"]
        if self.disk_free is not None:
            parts.append(f"free {shown(self.disk_free)}")
        if self.memory_total is not None and self.memory_available is not None:
            parts.append(
                f"memory {shown(self.memory_available)} free of {shown(self.memory_total)}"
            )
        return ", ".join(parts)


def check(
    model: Any,
    stages: Sequence[Stage[Any]],
    *,
    calibration: Source | str = None,
    text_field: str | None = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Preflight:
    """Check a pipeline before any work.

    Args:
        model: a transformers model, its config, or a directory.
        stages: of the pipeline.
        calibration: for the stages that need data and name none, as for `Pipeline.run`.
        text_field: of the rows of `calibration`.
        tokenizer: of the model; None takes the one in its directory.
        output: where the run will be written; None leaves out the check of the disk.
        dtype: that a directory will be loaded in; None is the checkpoint's own.
        device: that the work will be done on; None takes a GPU if there is one.

    Returns:
        The findings. Nothing is raised for what they hold.
    """
    result = Preflight()
    found = Findings()
    original: Shapes | None = None
    with found.refusals():
        original = read_shapes(model, dtype)
        check_writes_text(original.model)  # each stage's result is measured on text
    if original is None or found.errors:
        result.errors += [Finding("model", text) for text in found.errors]
        return result
    if tokenizer is None and isinstance(model, str | Path):
        tokenizer = load_tokenizer(model)
    tied = tied_embeddings(original.model)
    if tied:
        result.notes.append(Finding("model", tied))
    data = _Data(calibration, text_field, tokenizer)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    before = original
    for index, stage in enumerate(fit_to_later(stages), 1):
        name, found = f"{index}-{stage.name}", Findings()
        tokens = data.of(stage, before, found)
        tokens.device = place
        if stage.needs_calibration:
            asked = stage.options.get("compute_dtype", "auto")
            tokens.dtype = chosen_dtype(before.dtype, place.type, asked)
        after = _after(stage, before, original, found)
        result.errors += [Finding(name, text) for text in found.errors]
        result.warnings += [Finding(name, text) for text in found.warnings]
        result.notes += [Finding(name, text) for text in found.notes]
        result.figures.append(_figures(name, stage, (before, after, original), tokens))
        before = after
    _check_memory(result, place)
    _check_disk(result, output)
    return result


def _after(stage: Stage[Any], before: Shapes, original: Shapes, found: Findings) -> Shapes:
    """The shapes that a stage leaves; what its driver will refuse goes to `found`."""
    if (before.packed or before.formats) and not stage.keeps_packed:
        found.notes.append("its packed layers are expanded to dense ones first")
    after = before
    with found.refusals():
        after = stage.plan(before, original, found)
        if stage.walks:
            check_runs(before.model)
    return after


def _figures(
    name: str, stage: Stage[Any], shapes: tuple[Shapes, Shapes, Shapes], tokens: Tokens
) -> StageFigures:
    before, after, original = shapes
    window = min(DEFAULT_SEQ_LEN, context_length(after.model) or DEFAULT_SEQ_LEN)
    work = stage.memory(before, after, original, tokens)
    measured = _measuring(before, after, original, window)
    written = after.on_disk()
    return StageFigures(
        name=name,
        label=stage.label,
        memory_bytes=max(work, measured),
        weight_bytes=written,
        disk_bytes=written + stage.journal(after, tokens),
    )


def _measuring(before: Shapes, after: Shapes, original: Shapes, window: int) -> int:
    """Bytes at the peak of what follows a stage: both models' logits of a batch, and the models."""
    vocabulary = vocabulary_size(after.model) or 0
    logits = 2 * _MEASURED_BATCH * window * vocabulary * after.dtype.itemsize
    return after.weights() + max(before.weights(), original.weights()) + logits


def shown(count: int) -> str:
    """Bytes for people."""
    if count < 1 << 20:
        return f"{count / 1024:.0f} KiB"
    power = 3 if count >= 1 << 30 else 2
    return f"{count / 1024**power:.{1 if power == 3 else 0}f} {'GiB' if power == 3 else 'MiB'}"


class _Data:
    """The data of the stages, each source read once."""

    def __init__(self, calibration: Source | str, text_field: str | None, tokenizer: Any) -> None:
        self._calibration, self._tokenizer = calibration, tokenizer
        self._text_field = text_field
        self._read: dict[tuple[Any, ...], tuple[Tensor, list[str]]] = {}

    def of(self, stage: Stage[Any], shapes: Shapes, found: Findings) -> Tokens:
        """The windows that a stage will read, and what is wrong with them."""
        samples = int(stage.options.get("samples") or stage.usual_samples)
        seq_len = stage.options.get("seq_len")
        usual = min(DEFAULT_SEQ_LEN, context_length(shapes.model) or DEFAULT_SEQ_LEN)
        tokens = Tokens(samples, seq_len or usual)
        if not stage.needs_calibration:
            return tokens
        if stage.own_data is None and self._calibration is None:
            found.errors.append(
                f"calibration: got none for {stage.label}, expected text, tokens or a dataset like those "
                "that the model is for, or 'builtin', the text that comes with llmkern"
            )
            return tokens
        source = source_of(self._calibration if stage.own_data is None else stage.own_data)
        if is_stream(source):
            name = source if isinstance(source, str) else type(source).__name__
            found.notes.append(f"the dataset {name} is looked at when the stage begins")
            return tokens
        with found.refusals():
            field = stage.text_field(self._text_field)
            windows, said = self._windows(source, shapes, seq_len, field)
            found.notes += said
            tokens = Tokens(min(samples, len(windows)), windows.shape[1])
            if _in_windows(source):
                if len(windows) < samples and "samples" in stage.options:
                    found.warnings.append(
                        f"samples: got {samples}, and the data has {len(windows)} windows: all of them"
                    )
            elif len(windows) < samples and stage.repeats:
                tokens = Tokens(samples, windows.shape[1])
                found.warnings.append(
                    f"samples: got {samples} windows of {windows.shape[1]} tokens, and the data has "
                    f"{len(windows)} that do not overlap: the others repeat parts of them"
                )
        return tokens

    def _windows(
        self, source: Source, shapes: Shapes, seq_len: int | None, text_field: str | None
    ) -> tuple[Tensor, list[str]]:
        """The windows, and what is said about them."""
        name = id(self._calibration) if source is self._calibration else str(source)
        key = name, seq_len, text_field
        if key not in self._read:
            said: list[str] = []
            windows = load_tokens(
                source,
                shapes.model,
                self._tokenizer,
                seq_len=seq_len,
                text_field=text_field,
                argument="calibration",
                said=said.append,
            )
            self._read[key] = windows, said
        return self._read[key]


def _in_windows(source: Any) -> bool:
    """Whether a source gives its windows itself; what a file of tokens holds is taken to be some."""
    if isinstance(source, Tensor):
        return source.dim() == 2
    if not isinstance(source, str | Path):
        if isinstance(source, Mapping):
            return "input_ids" in source
        return isinstance(source, Sequence) and _is_row(source[0])
    return Path(str(source)).suffix in TOKEN_FILES


def _is_row(entry: Any) -> bool:
    """Whether an entry of a list is tokens."""
    return isinstance(entry, Tensor | list | tuple) and not is_turns(entry)


def _check_memory(result: Preflight, device: torch.device) -> None:
    result.memory_total, result.memory_available = _memory(device)
    what = "memory" if device.type == "cpu" else "GPU memory"
    here = _resident() if device.type == "cpu" else 0
    for row in result.figures:
        need = shown(row.memory_bytes)
        if result.memory_total is not None and row.memory_bytes + here > result.memory_total:
            beside = f" beside the {shown(here)} in use by this process" if here else ""
            total = shown(result.memory_total)
            result.errors.append(
                Finding(
                    row.name, f"{what}: needs about {need}{beside}, and the machine has {total}"
                )
            )
        elif result.memory_available is not None and row.memory_bytes > result.memory_available:
            free = shown(result.memory_available)
            result.warnings.append(
                Finding(row.name, f"{what}: needs about {need}, and {free} are free now")
            )


def _resident() -> int:
    """Bytes that this process holds, a model that it was given among them."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _memory(device: torch.device) -> tuple[int, int]:
    """(total, available) bytes; a container's limit counts."""
    if device.type == "cuda":
        available, total = torch.cuda.mem_get_info(device)
        return total, available
    import psutil

    state = psutil.virtual_memory()
    total, available = state.total + psutil.swap_memory().total, state.available
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit = int(_CGROUP_LIMIT.read_text())
        total, available = min(total, limit), min(available, limit)
    return total, available


def _check_disk(result: Preflight, output: str | Path | None) -> None:
    kept = 0
    for row in result.figures:
        result.disk_bytes = max(result.disk_bytes, kept + row.disk_bytes)
        kept += row.weight_bytes
    if output is None:
        return
    place, result.disk_free = free_space(Path(output))
    if result.disk_bytes > result.disk_free:
        need, free = shown(result.disk_bytes), shown(result.disk_free)
        result.errors.append(
            Finding(
                "output", f"disk: {output} needs about {need}, and {place} has {free} of free space"
            )
        )

"""Write a report: report.html, one file that opens offline; report.md; report.json."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import takewhile
from pathlib import Path

from llmkern._json import to_json
from llmkern.report import view
from llmkern.report.records import PipelineReport


def write_report(report: PipelineReport, directory: str | Path) -> list[Path]:
    """Write a report into a directory, in place of one that is there.

    Each file is complete or not there: it is written beside its place and renamed.

    Args:
        report: with at least one stage.
        directory: made if it is missing.

    Returns:
        The paths of report.html (one file, without a reference to any other), report.md and
        report.json (`PipelineReport.from_dict` reads it).

    Raises:
        ValueError: a report without stages.
        OSError: it could not be written.
    """
    if not report.stages:
        raise ValueError("report: got no stages, expected the original at least")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shown = view.distinct_labels(report)
    # The figures first: what draws them is more likely to fail.
    makers: dict[str, Callable[[], str]] = {
        "report.json": lambda: to_json(report.to_dict(), indent=2, ensure_ascii=False) + "\n",
        "report.md": lambda: markdown(shown),
        "report.html": lambda: html(shown),
    }
    for name, make in makers.items():
        text = make()
        partial_file = directory / f".{name}.{secrets.token_hex(4)}"
        try:
            partial_file.write_text(text, encoding="utf-8")
            os.replace(partial_file, directory / name)
        finally:
            partial_file.unlink(missing_ok=True)
    return [directory / name for name in reversed(makers)]


@dataclass(frozen=True)
class _Text:
    """A continuation: what it has in common with the original's, and the rest."""

    label: str
    same: str
    different: str = ""

    @property
    def text(self) -> str:
        return self.same + self.different


@dataclass(frozen=True)
class _Generation:
    prompt: str
    original: _Text
    others: list[_Text]


def _generations(report: PipelineReport) -> list[_Generation]:
    """The continuations of each prompt, of the models that have one."""
    made = []
    for index, prompt in enumerate(report.prompts):
        texts = [
            (record.label, record.generations[index])
            for record in report.stages
            if index < len(record.generations)
        ]
        if not texts:
            continue
        (label, first), *rest = texts
        others = []
        for other, text in rest:
            pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, text, strict=False))
            same = "".join(a for a, _ in pairs)
            others.append(_Text(other, same, text[len(same) :]))
        made.append(_Generation(prompt, _Text(label, first), others))
    return made


def _recipe(report: PipelineReport) -> str:
    import yaml

    if not report.recipe:
        return ""
    text: str = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=88)
    return text.rstrip()


def html(report: PipelineReport) -> str:
    """The page: everything in it, styles, scripts and drawings; all texts escaped."""
    import jinja2

    from llmkern.report.plots import plots

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = resources.files("llmkern.report").joinpath("assets/report.html.j2")
    columns = view.used_columns(report)
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        report=report,
        tiles=view.tiles(report),
        steps=view.steps(report),
        columns=columns,
        rows=view.rows(report, columns),
        protocol=view.protocol(report),
        calibrations=view.calibrations(report),
        plots=plots(report),
        generations=_generations(report),
        recipe=_recipe(report),
    )


def markdown(report: PipelineReport) -> str:
    """The same without plots, for a terminal or a repository."""
    columns = view.used_columns(report)
    parts = [f"# {_md(report.title)}", f"Model: {_md(report.model)}"]
    for heading, entries in (
        ("Warnings", [_md(warning) for warning in report.warnings]),
        ("Not applied", [f"{_md(k)}: {_md(v)}" for k, v in report.left_out.items()]),
    ):
        if entries:
            parts.append(f"**{heading}**\n\n" + "\n".join(f"- {entry}" for entry in entries))
    name = "stage" if report.in_sequence else "method"
    head = [name, *(column.title for column in columns)]
    table = [head, ["---", *("---:" for _ in columns)]]
    for row in view.rows(report, columns):
        cells = [cell.text + (f" ({cell.note})" if cell.note else "") for cell in row.cells]
        table.append([_md(row.record.label) + (" ◆" if row.best else ""), *cells])
    parts.append("\n".join("| " + " | ".join(line) + " |" for line in table))
    parts.append(_legend(report))
    for step in view.steps(report):
        lines = [f"- bought: {line}" for line in step.bought]
        lines += [f"- cost: {line}" for line in step.cost]
        lines += [f"- spent: {line}" for line in step.spent]
        parts.append(f"## {_md(step.record.label)}\n\n" + "\n".join(lines))
    for generation in _generations(report):
        parts.append("## Continuations\n\n" + _fenced(generation.prompt))
        parts += [
            f"**{_md(text.label)}**\n\n{_fenced(text.text)}"
            for text in (generation.original, *generation.others)
        ]
    parts.append("## The run\n\n" + _fenced(report.command))
    if report.recipe:
        parts.append(_fenced(_recipe(report), "yaml"))
    facts = {**report.versions, **report.hardware}
    parts.append("\n".join(f"- {_md(key)}: {_md(value)}" for key, value in facts.items()))
    return "\n\n".join(parts) + "\n"


def _legend(report: PipelineReport) -> str:
    lines = ["In brackets: compared with the original."]
    if view.protocol(report):
        lines.append(f"Measured on {view.protocol(report)}.")
    lines += [f"Calibration, {_md(line)}." for line in view.calibrations(report)]
    if not report.in_sequence:
        lines.append("Speeds compare with the original measured beside each method.")
        lines.append("◆: no other method is both smaller on disk and closer to the original.")
    return " ".join(lines)


def _md(text: str) -> str:
    """One line in which nothing means anything to Markdown or HTML."""
    line = escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", line)


def _fenced(text: str, language: str = "") -> str:
    """A block of code that no run of backticks inside ends."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"

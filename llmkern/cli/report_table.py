"""A report's table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from llmkern.cli._shared import console

if TYPE_CHECKING:
    from llmkern.pipeline import PipelineReport

_TONES = {"good": "green", "bad": "red"}
# What a narrow terminal does without, first to last.
_SPARED = ("peak", "parameters", "memory", "prefill", "top1")


def print_report(report: PipelineReport) -> None:
    """Print one row per stage, with as many columns as the terminal has room for."""
    # Where nobody looks at it, such as in a log, a table is not squeezed into 80 columns.
    wide = console if console.is_terminal else Console(file=console.file, width=160)
    unlimited = wide.options.update(max_width=1000)
    for spared in range(len(_SPARED) + 1):
        table = report_table(report, _SPARED[:spared])
        if Measurement.get(wide, unlimited, table).maximum <= wide.width:
            break
    wide.print(table)


def report_table(report: PipelineReport, without: tuple[str, ...] = ()) -> Table:
    """One row per stage, below each figure how it compares with the original's.

    Args:
        report: with the original first.
        without: keys of columns to leave out.
    """
    from llmkern.report import view

    columns = [c for c in view.used_columns(report) if c.key not in without]
    table = Table(header_style="bold")
    name = "stage" if report.in_sequence else "method"
    table.add_column(name, min_width=14, max_width=28, overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row in view.rows(report, columns):
        cells = []
        for cell in row.cells:
            tone = _TONES.get(cell.tone, "dim")
            cells.append(cell.text + (f"\n[{tone}]{cell.note}[/]" if cell.note else ""))
        table.add_row(escape(row.record.label) + (" ◆" if row.best else ""), *cells)
    return table

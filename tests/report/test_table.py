"""A report's table in terminals of several widths."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from llmkern.cli import report_table
from llmkern.report import PipelineReport


@pytest.mark.parametrize("width", [80, 100, 160])
def test_figures_are_whole_at_every_width(
    sample: PipelineReport, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    terminal = Console(width=width, file=out, force_terminal=True, color_system=None)
    monkeypatch.setattr(report_table, "console", terminal)
    report_table.print_report(sample)
    text = out.getvalue()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for figure in ("11.5 MB", "3.01 MB", "−74 %", "0.1200", "9.500", "300", "3.00×", "42.0 s"):
        assert figure in text
    assert ("1.20 GB" in text) == (width == 160)
    assert "distill" in text
    sample.stages[3] = dataclasses.replace(sample.stages[3], label="[bold]x")  # no markup
    report_table.print_report(sample)
    assert "[bold]x" in out.getvalue()

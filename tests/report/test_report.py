"""The report: what it says, what it must not say, and that nothing in it can leave the page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmkern.report import PipelineReport, StageRecord, view
from llmkern.report.plots import layer_errors, loss_curves, plots
from llmkern.report.write import html, markdown, write_report


class Page(HTMLParser):
    """Elements and attributes of a page, and the text of its table, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "action", "data", "srcset"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
        if tag == "tr":
            self.rows.append([])
        self._in_cell = self._in_cell or tag in ("td", "th")
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell and self.rows:
            self.rows[-1][-1] += data


def minimal(**changes: object) -> PipelineReport:
    record = StageRecord("original", "original", "original", {}, None, None, 10, 40, {}, 0.0, None)
    fields = {"title": "t", "command": "c", "model": "m", "recipe": [], "versions": {}}
    return PipelineReport(**{**fields, "hardware": {}, "stages": [record], **changes})


def test_three_files_and_the_json_reads_back(sample: PipelineReport, tmp_path: Path) -> None:
    paths = write_report(sample, tmp_path / "new" / "out")
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    assert sorted(os.listdir(tmp_path / "new" / "out")) == sorted(path.name for path in paths)
    entry = json.loads(paths[2].read_text())
    assert PipelineReport.from_dict(entry) == sample
    assert set(entry) == {field.name for field in dataclasses.fields(PipelineReport)}
    assert set(entry["stages"][1]) == {field.name for field in dataclasses.fields(StageRecord)}


def test_a_json_of_before_the_newer_keys_still_reads(sample: PipelineReport) -> None:
    entry = sample.to_dict()
    del entry["in_sequence"], entry["left_out"]
    assert PipelineReport.from_dict(entry) == sample


def test_page_refers_to_nothing_outside(sample: PipelineReport) -> None:
    text = html(sample)
    page = Page(text)
    assert len(page.links) > 10  # glyphs and clip paths of the plots
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert "://" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    used = {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)}
    assert used <= set(ids)


def test_texts_are_escaped_everywhere(sample: PipelineReport, evil: str) -> None:
    text = html(sample)
    page = Page(text)
    assert page.tags.count("script") == 1
    assert evil not in text
    assert page.handlers == []
    assert text.count("&lt;script&gt;alert") >= 4  # model, warning, label, continuation
    assert "<script" not in re.sub(r"^(`{3,}).*?^\1$", "", markdown(sample), flags=re.M | re.S)


def test_table_has_a_row_per_stage_and_compares_with_the_original(sample: PipelineReport) -> None:
    columns = view.used_columns(sample)
    assert [column.key for column in columns] == list(view.BY_KEY)
    rows = view.rows(sample, columns)
    assert [row.record.name for row in rows] == [record.name for record in sample.stages]
    cells = dict(zip(view.BY_KEY, rows[2].cells, strict=True))
    assert (cells["disk"].text, cells["disk"].note, cells["disk"].tone) == (
        "3.01 MB",
        "−74 %",
        "good",
    )
    assert cells["disk"].share == pytest.approx(3.01 / 11.54)
    assert (cells["perplexity"].note, cells["perplexity"].tone) == ("+11 %", "bad")
    assert (cells["decode"].note, cells["decode"].tone) == ("1.50×", "good")
    assert (cells["kl"].text, cells["kl"].note) == ("0.1200", "")
    assert (cells["seconds"].text, cells["peak"].text) == ("1 min 58 s", "–")
    page = Page(html(sample))
    assert len(page.rows) == 5
    assert [row[0].split("method")[0].strip() for row in page.rows[1:]] == [
        record.label for record in sample.stages
    ]


def test_each_stage_is_compared_with_the_one_before(sample: PipelineReport) -> None:
    prune, quantize, distill = view.steps(sample)
    assert str(prune.bought[0]) == "−14 % parameters (2.89 M → 2.49 M)"
    assert str(prune.cost[1]) == "+0.1000 nats KL to the original (0.0000 → 0.1000)"
    assert prune.spent == ["9.30 s of work", "812 MB of memory at the peak"]
    assert str(quantize.bought[0]) == "−70 % on disk (9.96 MB → 3.01 MB)"
    assert str(quantize.cost[-1]) == "−2.0 points top-1 agreement (90.0 % → 88.0 %)"
    assert "parameters" not in " ".join(map(str, quantize.bought + quantize.cost))  # the same
    assert str(distill.cost[0]) == "+126 % on disk (3.01 MB → 6.81 MB)"
    assert "−5.0 % perplexity (10.000 → 9.500)" in map(str, distill.bought)


def test_tiles_compare_the_last_model_with_the_original(sample: PipelineReport) -> None:
    tiles = {tile.title: (tile.figure, tile.tone) for tile in view.tiles(sample)}
    assert tiles == {
        "Size on disk": ("1.69× smaller", "good"),
        "Perplexity": ("+5.6 %", "bad"),
        "KL to the original": ("0.0800 nats", ""),
        "Decoding": ("3.00× faster", "good"),
        "Time spent": ("2 min 49 s", ""),
    }


def test_plots_follow_the_figures(sample: PipelineReport) -> None:
    titles = ["Size against perplexity", "Sensitivity by block", "Loss of training"]
    assert [plot.title for plot in plots(sample)] == [*titles, "Error by layer"]
    assert plots(sample) == plots(sample)
    for record in sample.stages:
        record.driver.clear()
        record.sensitivity.clear()
    assert [plot.title for plot in plots(sample)] == titles[:1]
    assert all("var(--ink)" in plot.svg for plot in plots(sample))


def test_layers_without_a_loss_are_left_out_of_the_plot(sample: PipelineReport) -> None:
    record = sample.stages[2]
    assert layer_errors(record)["q_proj"] == [(0, 0.001), (1, 0.002)]
    record.driver["layers"] = [
        {"name": "model.layers.0.a", "relative_loss": None},
        {"name": "model.layers.0.b", "relative_loss": 0.0},
        {"name": "model.layers.0.c", "relative_loss": float("nan")},
        {"name": "no_number", "relative_loss": 0.5},
    ]
    assert layer_errors(record) == {}
    assert "Error by layer" in [plot.title for plot in plots(sample)]  # that of the pruned widths


def test_a_model_without_files_has_no_size_on_disk(sample: PipelineReport) -> None:
    sample.stages[0] = dataclasses.replace(sample.stages[0], disk_bytes=0)
    cells = dict(zip(view.BY_KEY, view.rows(sample, view.COLUMNS)[0].cells, strict=True))
    assert (cells["disk"].value, cells["disk"].text) == (None, "–")
    assert view.tiles(sample)[0].title == "Size in memory"
    assert plots(sample)[0].title == "Size against perplexity"


def test_stages_of_one_label_are_told_apart(sample: PipelineReport, tmp_path: Path) -> None:
    sample.stages[1] = dataclasses.replace(sample.stages[1], label="quantize $x$ 4-bit")
    paths = write_report(sample, tmp_path)
    labels = ["original", "quantize $x$ 4-bit (1)", "quantize $x$ 4-bit (2)"]
    shown = [row[0].split("method")[0].strip() for row in Page(paths[0].read_text()).rows[1:]]
    assert shown[:3] == labels
    assert json.loads(paths[2].read_text())["stages"][1]["label"] == "quantize $x$ 4-bit"


def test_no_plot_stands_alone_beside_a_hole(sample: PipelineReport) -> None:
    assert [plot.wide for plot in plots(sample)] == [False, False, False, False]
    sample.stages.append(dataclasses.replace(sample.stages[2], name="4-quantize"))
    assert [plot.wide for plot in plots(sample)] == [False, False, True, True]


def test_losses_of_training_and_recovery_are_found(sample: PipelineReport) -> None:
    assert loss_curves(sample.stages[1]) == {"recovery": [(1, 3.0), (2, 2.5)]}
    curves = loss_curves(sample.stages[3])
    assert set(curves) == {"loss", "ce"}
    assert curves["loss"][:2] == [(1, 5.0), (2, 2.5)]


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    report = minimal()
    text = html(report)
    assert plots(report) == []
    assert Page(text).rows == [["Stage", "Parameters", "On disk"], ["original", "10", "40 B"]]
    for heading in ("Plots", "Continuations", "Warnings", "Recipe", "What each stage"):
        assert f">{heading}" not in text
    assert write_report(report, tmp_path)
    with pytest.raises(ValueError, match="report: got no stages"):
        write_report(minimal(stages=[]), tmp_path)


def test_markdown_table_keeps_its_columns(sample: PipelineReport) -> None:
    text = markdown(sample)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 6
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "````\ndef f():\n```\n" in text  # a longer fence than the prompt's own


def test_a_comparison_names_the_models_that_no_other_one_beats(sample: PipelineReport) -> None:
    sample.in_sequence = False
    sample.left_out = {"mlp": "no plain MLP"}
    assert view.steps(sample) == []
    best = {row.record.name for row in view.rows(sample, view.used_columns(sample)) if row.best}
    assert best == {"2-quantize", "3-distill"}  # the first is larger and farther away than the last
    tiles = {tile.title: tile.figure for tile in view.tiles(sample)}
    assert tiles["Smallest on disk"] == "quantize $x$ 4-bit"
    assert tiles["Closest to the original (KL)"].startswith("distill")
    assert "<strong>mlp</strong>: no plain MLP" in html(sample)
    assert "mlp: no plain MLP" in markdown(sample)


def test_a_failed_write_leaves_the_old_report(
    sample: PipelineReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(sample, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sample.title = "another"

    def broken(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        write_report(sample, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (view.size, 999, "999 B"),
        (view.size, 1_700_000, "1.70 MB"),
        (view.size, 123_456_789, "123 MB"),
        (view.size, 0, "0 B"),
        (view.count, 7_000_000_000, "7.00 B"),
        (view.count, 12, "12"),
        (view.duration, 0.001, "< 0.01 s"),
        (view.duration, 59.97, "1 min 0 s"),
        (view.duration, 3725, "1 h 2 min"),
        (view.digits, 4100, "4,100"),
        (view.percent, -0.001, "−0.1 %"),
        (view.percent, 0.0, "±0 %"),
        (view.percent, 1.26, "+126 %"),
    ],
)
def test_figures_are_written_for_a_reader(show: object, value: float, text: str) -> None:
    assert show(value) == text  # type: ignore[operator]


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=["inf", "nan"])
@pytest.mark.parametrize("in_sequence", [True, False], ids=["pipeline", "comparison"])
def test_a_broken_model_is_shown_as_one(
    sample: PipelineReport, value: float, in_sequence: bool, tmp_path: Path
) -> None:
    sample.in_sequence = in_sequence
    for record in sample.stages[2:]:
        record.evaluation.update(perplexity=value, kl=value)
    sample.stages[1].sensitivity["model.layers.1"] = value
    sample.stages[1].driver["recovery_loss"] = [value, value]
    sample.stages[3].driver["training"]["steps"][0]["metrics"]["ce"] = value
    write_report(sample, tmp_path)
    text = (tmp_path / "report.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = PipelineReport.from_dict(json.loads(text, parse_constant=refuse))
    assert repr(read.stages) == repr(sample.stages)
    shown = "inf" if value == math.inf else "nan"
    columns = view.used_columns(sample)
    cells = {
        column.key: cell
        for row in view.rows(sample, columns)[2:]
        for column, cell in zip(columns, row.cells, strict=True)
    }
    assert cells["perplexity"].text == cells["kl"].text == shown
    assert cells["perplexity"].tone == "bad"
    assert cells["perplexity"].note == ("+∞ %" if value == math.inf else "–")
    assert f"| {shown} ({cells['perplexity'].note}) |" in markdown(sample)
    assert f"({shown})" in "".join(plot.caption for plot in plots(sample))
    if in_sequence:
        (line,) = (line for line in view.steps(sample)[1].cost if line.phrase == "perplexity")
        assert line.path == f"9.900 → {shown}"
        last = view.steps(sample)[2]
        assert not {"perplexity", "KL to the original"} & {
            line.phrase for line in (*last.bought, *last.cost)
        }
    else:
        tiles = {tile.title: tile.figure for tile in view.tiles(sample)}
        assert tiles["Closest to the original (KL)"] == sample.stages[1].label

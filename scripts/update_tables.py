"""Rewrite the documents' tables, so that none is typed by hand: numbers from bench/results/, methods from
what the drivers list, models from tests/real/outcomes.json.

python scripts/update_tables.py            rewrites README.md, docs/benchmarks.md and docs/models.md
python scripts/update_tables.py --check    fails if they are not what the results say

A table stands between `<!-- results: FILE BENCH -->`, `<!-- methods -->` or `<!-- models: VERB, VERB
-->` and `<!-- end -->`; "models: reasons" lists what the cells of such tables number. BENCH:grid has a
column per number of rows of x instead of a row per case, BENCH:grid:4096x14336 of this weight (K x N)
only; BENCH:short is that without the other contenders. "quality:SUITE" is a suite of bench/quality.py,
"quality:SUITE:TEXT" its variants whose name holds the text, "quality:order" its orders; "stages" a
pipeline's report.json.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/models.md")
OUTCOMES = ROOT / "tests" / "real" / "outcomes.json"
METHODS = re.compile(r"(<!-- methods -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = re.compile(r"(<!-- models: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def bench_table(record: dict[str, Any]) -> str:
    """One bench's record as a Markdown table, with commands and machines below it."""
    table = Table(box=box.MARKDOWN)
    unit, factor = ("µs", 1e6) if record["runs"][0]["gpu"] else ("ms", 1e3)
    titles = (
        "case",
        "contender",
        f"median {unit}",
        "% of floor",
        f"× {record['baseline']}",
        "× best other",
    )
    for title in titles:
        table.add_column(title, no_wrap=True)
    case = None
    for row in record["results"]:
        label, case = ("" if row["case"] == case else row["case"]), row["case"]
        if row["median"] is None:
            table.add_row(label, row["contender"], "–", "", "", row["problem"])
            continue
        share = f"{100 * row['floor'] / row['median']:.0f}" if row["ours"] else ""
        name = f"**{row['contender']}**" if row["ours"] else row["contender"]
        ratios = [_ratio(row["times_baseline"]), _ratio(row["times_best_other"])]
        table.add_row(label, name, f"{factor * row['median']:.3f}", share, *ratios)
    return f"{_render(table)}\n{_runs(record)}"


def grid_table(record: dict[str, Any], shape: str = "", short: bool = False) -> str:
    """One bench's record with a column per number of rows M; the fastest of a column is bold.

    Below each shape: how the first of ours compares with the baseline, the best other, the floor. With
    `short`, of the contenders only this first one.
    """
    unit, factor = ("µs", 1e6) if record["runs"][0]["gpu"] else ("ms", 1e3)
    rows = record["results"]
    columns = list(dict.fromkeys(row["case"].partition(" ")[0] for row in rows))
    places = dict.fromkeys(row["case"].partition(" ")[2] for row in rows)
    if shape:
        places = [place for place in places if re.findall(r"\d+", place) == shape.split("x")]
    table = Table("weight", f"median {unit}", *columns, box=box.MARKDOWN)
    for place in places:
        cells: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            column, _, where = row["case"].partition(" ")
            if where == place and row["median"] is not None:
                cells.setdefault(row["contender"], {})[column] = row
        best = {c: min(by[c]["median"] for by in cells.values() if c in by) for c in columns}
        label = place
        for name, by in cells.items():
            ours = next(iter(by.values()))["ours"]
            if short and label != place:
                break
            shown = [_cell(by.get(c), best[c], factor) for c in columns]
            table.add_row(label, f"**{name}**" if ours else name, *shown)
            label = ""
        name, ours = next((n, by) for n, by in cells.items() if next(iter(by.values()))["ours"])
        for heading, key in (
            (record["baseline"], "times_baseline"),
            ("best other", "times_best_other"),
        ):
            table.add_row(
                "", f"{name} × {heading}", *(_ratio(ours[c][key]) for c in columns if c in ours)
            )
        floors = (f"{100 * ours[c]['floor'] / ours[c]['median']:.0f}" for c in columns if c in ours)
        table.add_row("", f"{name}, % of floor", *floors)
    remarks = "" if short else _remarks(rows)
    return f"{_render(table)}\n{remarks}{_runs(record)}"


def _remarks(rows: list[dict[str, Any]]) -> str:
    """Who has no number and why, and how others' jobs differ; those of one remark together."""
    remarks: dict[str, dict[str, None]] = {}
    for row in rows:
        for text in (row["problem"], row.get("note")):
            if text:
                remarks.setdefault(text, {})[row["contender"]] = None
    return "".join(f"{', '.join(names)}: {text}. " for text, names in remarks.items())


def _cell(row: dict[str, Any] | None, best: float, factor: float) -> str:
    if row is None:
        return "–"
    seconds = row["median"]
    text = f"{factor * seconds:.3g}" if factor * seconds < 100 else f"{factor * seconds:.0f}"
    return f"**{text}**" if seconds == best else text


def _runs(record: dict[str, Any]) -> str:
    """The commands that measured the record, and on what."""
    lines = []
    for run in record["runs"]:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        command = re.sub(
            r" --json \S+| --merge| --device cpu",
            "",
            re.sub(r"\S*/(bench/)", r"\1", run["command"]),
        )
        lines.append(
            f"`python {command}`, {run['gpu'] or run['cpu']}, {run['threads']} threads, {run['isa']}, "
            f"{versions}, {run['time'][:10]}, commit {run['commit']}."
        )
    return "\n".join(lines) + "\n"


def stages_table(report: dict[str, Any]) -> str:
    """A pipeline's report.json as a Markdown table: what each stage bought and cost."""
    table = Table(
        "after",
        "parameters",
        "file (MB)",
        "perplexity",
        "KL (nats)",
        "top-1",
        "decode (tokens/s)",
        "seconds",
        box=box.MARKDOWN,
    )
    for stage in report["stages"]:
        result = stage["evaluation"]
        first = result["kl"] is None
        table.add_row(
            stage["label"],
            f"{stage['parameters'] / 1e6:.2f} M",
            f"{stage['disk_bytes'] / 1e6:.2f}",
            f"{result['perplexity']:.3f}",
            "–" if first else f"{result['kl']:.4f}",
            "–" if first else f"{result['top1_agreement']:.3f}",
            f"{result['decode_tokens_per_s']:.0f}",
            f"{stage['seconds']:.0f}",
        )
    protocol = report["stages"][0]["evaluation"]["protocol"]
    return (
        f"{_render(table)}\n`make demo`: {protocol['tokens']} held-out tokens in windows of "
        f"{protocol['window']}; {report['hardware']['cpu']}, torch {report['versions']['torch']}.\n"
    )


def order_table(record: dict[str, Any]) -> str:
    """The orders of bench/quality.py as a Markdown table."""
    titles = ("order", "KL (nats)", "perplexity", "top-1 agreement", "parameters", "file (MB)")
    table = Table(*titles, box=box.MARKDOWN)
    for row in record["rows"]:
        run = row["run"]
        table.add_row(
            row["variant"],
            f"{run['kl']:.4f}",
            f"{run['perplexity']:.3f}",
            f"{run['top1']:.3f}",
            f"{run['parameters'] / 1e6:.2f} M",
            f"{run['file_bytes'] / 1e6:.2f}",
        )
    steps = f"{record['steps']} steps of distillation"
    return f"{_render(table)}\n{_quality_source(record, steps)}"


def quality_table(record: dict[str, Any], text: str = "") -> str:
    """One suite of bench/quality.py as a Markdown table; the protocol and the command below it."""
    titles = ("variant", "KL (nats)", "perplexity", "top-1 agreement", "parameters", "zeros")
    table = Table(*titles, box=box.MARKDOWN)
    table.add_row("original", "–", f"{record['perplexity']:.3f}", "–", "", "")
    for row in (row for row in record["rows"] if text in row["variant"]):
        mean = {key: fmean(run[key] for run in row["runs"]) for key in row["runs"][0]}
        table.add_row(
            row["variant"],
            f"{mean['kl']:.4f}",
            f"{mean['perplexity']:.3f}",
            f"{mean['top1']:.3f}",
            f"{mean['parameters'] / 1e6:.2f} M",
            f"{100 * mean['zeros']:.0f} %",
        )
    return f"{_render(table)}\n{_quality_source(record)}"


def _quality_source(record: dict[str, Any], *more: str) -> str:
    """The protocol of a record of bench/quality.py, its command and machine."""
    protocol = "; ".join((record["protocol"], *more))
    return f"{record['model']}: {protocol}. {_runs({'runs': [record['run']]})}"


def _render(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=400).print(table)
    lines = (re.sub(r" +", " ", line).strip() for line in out.getvalue().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def methods_table() -> str:
    """Every method of every driver, with what it says of itself and needs by default."""
    table = Table("", "method", "", "needs", box=box.MARKDOWN)
    for driver in ("prune", "quantize", "distill"):
        label = f"`{driver}`"
        for method in importlib.import_module(f"llmkern.{driver}").METHODS:
            # Students learn from text or from prompts: there is no default to ask.
            work = getattr(method, "work", None)
            needs = "" if work is None else str(work.needs(method.options()))
            table.add_row(label, f"`{method.name}`", method.about, needs)
            label = ""
    return _render(table)


def models_table(what: str) -> str:
    """What each architecture can do: a column per verb of `what`, or the reasons that cells number."""
    made = json.loads(OUTCOMES.read_text())
    rows: dict[str, dict[str, str]] = made["outcomes"]
    reasons = dict.fromkeys(_reason(rows[name].get(v, "")) for v in made["verbs"] for name in rows)
    numbers = {reason: str(i) for i, reason in enumerate(filter(None, reasons), 1)}
    if what == "reasons":
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        listed = "".join(f"{number}. `{reason}`\n" for reason, number in numbers.items())
        return f"{listed}\nMade with {versions}.\n"
    verbs = what.split(", ")
    signs = {"works": "✓", "none": "–", "": "✗"}
    table = Table("", *verbs, box=box.MARKDOWN)
    for name, row in rows.items():
        cells = (row.get(verb, "") for verb in verbs)
        table.add_row(name, *(numbers.get(_reason(c)) or signs[c.partition(":")[0]] for c in cells))
    return _render(table)


def _reason(outcome: str) -> str:
    """Why a cell is refused; a dry run names the stages, too, and is then of the same reason."""
    refused, _, reason = outcome.partition("refused: ")
    return "" if refused else re.sub(r"(?<!\S)(\d+-\w+|model): (?=\S+: )", "", reason)


def _block(match: re.Match[str]) -> str:
    start, file, bench, end = match.groups()
    record = json.loads((ROOT / "bench" / "results" / file).read_text())
    name, form, shape, *_ = *bench.split(":"), "", ""
    if name == "stages":
        body = stages_table(record)
    elif form == "order":
        body = order_table(record[form])
    elif name == "quality":
        body = quality_table(record[form], shape.replace("_", " "))
    elif form in ("grid", "short"):
        body = grid_table(record[name], shape, form == "short")
    else:
        body = bench_table(record[name])
    return f"{start}{body}{end}"


def main(check: Annotated[bool, typer.Option(help="Only compare.")] = False) -> None:
    """Rewrite (or check) the tables of the documents."""
    for name in DOCUMENTS:
        document = ROOT / name
        old = document.read_text(encoding="utf-8")
        new = METHODS.sub(lambda m: f"{m[1]}{methods_table()}{m[2]}", BLOCK.sub(_block, old))
        new = MODELS.sub(lambda m: f"{m[1]}{models_table(m[2])}{m[3]}", new)
        if check and new != old:
            raise SystemExit(
                f"{name}: its tables are not those of bench/results/, the methods and the tested models; "
                "run update_tables.py"
            )
        document.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

"""Rewrite the README's tables of numbers from bench/results/, so that none is typed by hand.

python scripts/update_readme.py            rewrites README.md
python scripts/update_readme.py --check    fails if README.md is not what the results say

A table stands between `<!-- results: FILE BENCH -->` and `<!-- end -->`.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def bench_table(record: dict[str, Any]) -> str:
    """One bench's record as a Markdown table, with the command and the machine below it."""
    table = Table(box=box.MARKDOWN)
    titles = (
        "case",
        "contender",
        "median ms",
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
        table.add_row(label, name, f"{1e3 * row['median']:.3f}", share, *ratios)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    command = re.sub(r" --json \S+", "", re.sub(r"\S*/(bench/)", r"\1", record["command"]))
    return (
        f"{_render(table)}\n`python {command}`, {record['cpu']}, {record['threads']} threads, "
        f"{record['isa']}, {versions}, {record['time'][:10]}, commit {record['commit']}.\n"
    )


def demo_table(report: dict[str, Any]) -> str:
    """The demo's report as a Markdown table."""
    titles = (
        "model",
        "perplexity",
        "KL to fp32 (nats)",
        "file (MB)",
        "decode (tokens/s)",
        "seconds",
    )
    table = Table(*titles, box=box.MARKDOWN)
    for row in report["models"]:
        table.add_row(
            row["name"],
            f"{row['perplexity']:.3f}",
            "–" if row["kl"] is None else f"{row['kl']:.4f}",
            f"{row['file_bytes'] / 1e6:.2f}",
            f"{row['decode_tokens_per_s']:.0f}",
            f"{row['seconds']:.1f}",
        )
    return f"{_render(table)}\n`make demo`: {report['protocol']}; {report['hardware']['cpu']}.\n"


def _render(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=400).print(table)
    lines = (re.sub(r" +", " ", line).strip() for line in out.getvalue().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _block(match: re.Match[str]) -> str:
    start, file, bench, end = match.groups()
    record = json.loads((ROOT / "bench" / "results" / file).read_text())
    body = demo_table(record) if bench == "demo" else bench_table(record[bench])
    return f"{start}{body}{end}"


def main(check: Annotated[bool, typer.Option(help="Only compare.")] = False) -> None:
    """Rewrite (or check) the tables of README.md."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = BLOCK.sub(_block, old)
    if check and new != old:
        raise SystemExit(
            "README.md: its tables are not those of bench/results/; run update_readme.py"
        )
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

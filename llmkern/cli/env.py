"""llmkern env."""

from __future__ import annotations

from rich.table import Table

from llmkern.cli._shared import console


def env() -> None:
    """Print versions, processors, and which backend serves which op here."""
    from llmkern import env as environment

    for title, rows in (("versions", environment.versions()), ("hardware", environment.hardware())):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
    table = Table(
        "op", "device", "backend", "serves", "why not", title="backends", title_justify="left"
    )
    for row in environment.serving():
        table.add_row(row.op, row.device, row.backend, "no" if row.reason else "yes", row.reason)
    console.print(table)

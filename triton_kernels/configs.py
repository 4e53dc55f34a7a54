"""Which kernel and tile serves a product: a table, looked up; nothing is searched for at run time.

configs.json has one row per class of shapes. Its limits M, N and K are inclusive, null is none, and the
row with the tightest limits serves (M first, then N, then K). A table is kept per op, per type of x
("16-bit" or "float32") and per number of multiprocessors, of which the nearest is taken. SPLIT_K is part
of a row: so within one range of M a row of the result does not depend on the number of rows.

`source` says what a row rests on: the GPU that it was tuned on and when, or "estimate". No row has been
tuned on a GPU so far: `python bench/tune_triton.py estimate` writes the file.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Config:
    """How one product is computed; the kernels are those of gemm_common.py."""

    kernel: str  # "gemv" or "tile"
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int  # at most; no part of K is empty
    SCALE_SUMS: bool  # multiply unscaled values, then scale each group's sum
    num_warps: int
    num_stages: int

    def for_groups(self, group_size: int) -> "Config":
        """The same with tiles that lie in one group each, which gemv does not ask for."""
        divisor = group_size & -group_size  # the largest power of two in it
        if self.kernel == "gemv" or divisor >= self.BLOCK_K:
            return self
        return replace(self, BLOCK_K=divisor)


@dataclass(frozen=True)
class Key:
    """The class of shapes that a row of the table serves."""

    op: str
    x: str  # "16-bit" or "float32"
    sms: int
    M: int | None
    N: int | None
    K: int | None

    def order(self) -> tuple[Any, ...]:
        """Sorts a table's rows from tight to loose."""
        limits = (math.inf if n is None else n for n in (self.M, self.N, self.K))
        return (self.op, self.x, self.sms, *limits)

    def holds(self, M: int, N: int, K: int) -> bool:
        limits = ((M, self.M), (N, self.N), (K, self.K))
        return all(limit is None or n <= limit for n, limit in limits)


@dataclass(frozen=True)
class Row:
    key: Key
    config: Config
    source: str


def parse(text: str) -> list[Row]:
    """Rows of a table in the form of configs.json."""
    rows = []
    for row in json.loads(text):
        key, config = (
            kind(**{f.name: row[f.name] for f in fields(kind)}) for kind in (Key, Config)
        )
        rows.append(Row(key, config, row["source"]))
    return rows


def dump(rows: list[Row]) -> str:
    """Inverse of `parse`, one line per row, in order."""
    lines = [
        json.dumps({**vars(row.key), **vars(row.config), "source": row.source})
        for row in sorted(rows, key=lambda row: row.key.order())
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def lookup(rows: Sequence[Row], M: int, N: int, K: int, sms: int) -> Config:
    """The config that rows of one op and type of x give a shape."""
    nearest = min((row.key.sms for row in rows), key=lambda have: abs(math.log(have / sms)))
    serving = [row for row in rows if row.key.sms == nearest and row.key.holds(M, N, K)]
    return min(serving, key=lambda row: row.key.order()).config


@cache
def table() -> dict[tuple[str, str], list[Row]]:
    """The committed rows by (op, x)."""
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in parse(PATH.read_text()):
        tables.setdefault((row.key.op, row.key.x), []).append(row)
    return tables


@lru_cache(maxsize=1 << 16)
def select_config(
    op: str, M: int, N: int, K: int, group_size: int, float32: bool, num_sms: int
) -> Config:
    """The config of x [M, K] times a weight [N, K]; `float32` is whether x is."""
    rows = table()[op, "float32" if float32 else "16-bit"]
    return lookup(rows, M, N, K, num_sms).for_groups(group_size)

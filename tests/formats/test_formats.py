"""What every weight format answers for itself, against the module that holds it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from llmkern.formats import FORMATS, LutFormat, QuantFormat, WeightFormat
from llmkern.nn import packed_class

N, K = 48, 192
CASES = {
    "int4": QuantFormat(4, 64),
    "int4_zero_points": QuantFormat(4, 32, symmetric=False),
    "int3_per_row": QuantFormat(3, None),
    "int2_zero_points": QuantFormat(2, 96, symmetric=False),
    "nf4": LutFormat("nf4", 64),
    "fp4_blocks_across_rows": LutFormat("fp4", 128),
}


def test_every_format_has_a_case() -> None:
    assert {type(fmt) for fmt in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize("fmt", CASES.values(), ids=CASES)
def test_fields_survive_json(fmt: WeightFormat) -> None:
    assert type(fmt).from_dict(json.loads(json.dumps(fmt.to_dict()))) == fmt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", CASES.values(), ids=CASES)
def test_bytes_are_those_of_the_files_tensors(fmt: WeightFormat, dtype: torch.dtype) -> None:
    linear = nn.Linear(K, N, bias=False, dtype=dtype)
    layer = packed_class(fmt).from_format(linear, fmt)
    left_out = ("weight_shape", "weight_codebook")  # the same few bytes whatever the weight
    held = {n: t for n, t in layer._file_tensors().items() if t is not None and n not in left_out}
    got = fmt.nbytes(N, K, dtype.itemsize, in_memory=False)
    scales_in_files = -(-N * K // fmt.groups(K)) * 4
    if fmt.book is not None:  # files hold a scale per block, the module one per group in a row
        held["weight_scale"] = torch.empty(scales_in_files // 4)
    assert got == pytest.approx(sum(t.nbytes for t in held.values()), rel=0.01)


@pytest.mark.parametrize(
    ("fmt", "columns", "reason"),
    [
        (QuantFormat(4, 64), 96, "group_size = 64 does not divide K = 96"),
        (QuantFormat(4, None), 97, None),
        (
            LutFormat("nf4", 64),
            80,
            "group_size = 64 splits 32 columns in rows of K = 80 (they share 16)",
        ),
        (LutFormat("nf4", 64), 96, None),
    ],
)
def test_what_does_not_fit_is_said(fmt: WeightFormat, columns: int, reason: str | None) -> None:
    found = fmt.misfit(N, columns)
    assert (None if found is None else str(found)) == reason

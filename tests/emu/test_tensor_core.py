"""The emulator's matrix instructions: layouts and values against torch, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16]
LANES = torch.arange(32)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def run(probe):
    return partial(probe, "tensor_core_probe")


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(matrices, transposed, run):
    rows = torch.arange(256, dtype=torch.int16)
    out = torch.full((32, matrices, 2), -1, dtype=torch.int16)
    name = f"ldmatrix_x{matrices}" + "_trans" * transposed
    assert run(name, out, rows) == ""
    matrix = rows.view(4, 8, 8)[:matrices]
    if transposed:
        matrix = matrix.mT
    # Lane l: elements 2 (l % 4) and the next of row l / 4.
    assert torch.equal(out, matrix.reshape(matrices, 32, 2).transpose(0, 1))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (1, "ldmatrix: a row is not 16-byte aligned: thread (3, 0, 0)"),
        (2, "ldmatrix: a row is not within one shared array"),
        (3, "ldmatrix: read of shared memory that nobody wrote"),
        (4, "divergent warp"),
        (5, "ldmatrix: a row is not within one shared array"),
    ],
    ids=["misaligned", "not_shared", "unwritten", "lane_missing", "across_the_end"],
)
def test_ldmatrix_faults(mode, message, run):
    out = torch.empty(32, 4, 2, dtype=torch.int16)
    assert message in run("ldmatrix_x4", out, torch.arange(256, dtype=torch.int16), mode=mode)


def test_ldmatrix_x2_ignores_the_upper_lanes(run):
    """Lanes 16 and above give no address: unwritten rows there are nobody's business."""
    out = torch.empty(32, 2, 2, dtype=torch.int16)
    rows = torch.arange(256, dtype=torch.int16)
    assert run("ldmatrix_x2", out, rows, mode=0) == ""
    assert out.max() < 128


def assert_close_to_exact(d: Tensor, c: Tensor, a: Tensor, b: Tensor) -> None:
    """The tensor core's float32 error: a bit of the largest partial sum for each addition."""
    exact = c.double() + a.double() @ b.double()
    size = c.double().abs() + a.double().abs() @ b.double().abs()
    assert ((d.double() - exact).abs() <= 4 * 2.0**-23 * size).all()
    assert not torch.equal(d, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mma(dtype, run):
    for _ in range(20):
        a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
        c = torch.randn(16, 8)
        d = c.clone()
        assert run(f"mma_{name_of(dtype)}", d, a, b.t().contiguous()) == ""
        assert_close_to_exact(d, c, a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mma_places_every_element(dtype, run):
    """Unit vectors: each product of one element of a with one of b, exactly."""
    a = torch.arange(256).view(16, 16).to(dtype)
    for k in range(16):
        b = torch.zeros(16, 8, dtype=dtype)
        b[k, k % 8] = 2
        d = torch.zeros(16, 8)
        assert run(f"mma_{name_of(dtype)}", d, a, b.t().contiguous()) == ""
        assert torch.equal(d, a.float() @ b.float())


def test_mma_cuts_sums_off(run):
    """1 + 1.5 * 2^-24 is nearer to 1 + 2^-23, but a tensor core rounds toward zero."""
    a, b = torch.zeros(16, 16).half(), torch.zeros(8, 16).half()
    a[:, 3], b[:, 3] = 1.5 * 2.0**-12, 2.0**-12
    for sign in (1.0, -1.0):
        d = torch.full((16, 8), sign)
        assert run("mma_float16", d, a * sign, b) == ""
        assert torch.equal(d, torch.full((16, 8), sign))


def test_mma_passes_on_what_is_not_finite(run):
    a, b = torch.ones(16, 16).bfloat16(), torch.ones(8, 16).bfloat16()
    a[2, 5], a[3, 5], a[3, 6] = float("nan"), float("inf"), -float("inf")
    a[4, 0], b[:, 0] = 3e38, 3e38
    d = torch.zeros(16, 8)
    assert run("mma_bfloat16", d, a, b) == ""
    assert d[2:4].isnan().all()
    assert d[4].isposinf().all()
    assert not d[:2].isnan().any()


def test_mma_needs_the_whole_warp(run):
    a, b = torch.zeros(16, 16).half(), torch.zeros(8, 16).half()
    assert "divergent warp" in run("mma_float16", torch.zeros(16, 8), a, b, mode=1)


# The indices kept of four, and their nibble: first in bits 1:0, second in bits 3:2.
PATTERNS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
NIBBLES = [0x4, 0x8, 0xC, 0x9, 0xD, 0xE]


def metadata(pattern: Tensor, selector: int) -> Tensor:
    """Each lane's word for pattern[row, four]; lanes that are not asked hold nonsense."""
    nibble = torch.tensor(NIBBLES)[pattern]  # [16, 8]
    words = torch.full((8, 4), 0x5F0A, dtype=torch.int64)
    shifts = torch.tensor([0, 4, 8, 12])
    for half in range(2):  # k 0..15, k 16..31
        of_rows = (nibble[:, 4 * half : 4 * half + 4] << shifts).sum(1)
        words[:, 2 * selector + half] = of_rows[:8] | of_rows[8:] << 16
    return words.flatten().to(torch.int32)


def scatter(kept: Tensor, pattern: Tensor) -> Tensor:
    """The 16 x 32 operand whose kept half is `kept`."""
    columns = torch.tensor(PATTERNS)[pattern] + 4 * torch.arange(8)[:, None]  # [16, 8, 2]
    return torch.zeros(16, 32, dtype=kept.dtype).scatter(1, columns.view(16, 16), kept)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mma_sp(dtype, selector, run):
    for round_ in range(20):
        # Each pattern alone, then all of them mixed.
        pattern = torch.randint(6, (16, 8)) if round_ >= 6 else torch.full((16, 8), round_)
        kept, b, c = torch.randn(16, 16).to(dtype), torch.randn(32, 8).to(dtype), torch.randn(16, 8)
        d = c.clone()
        words = metadata(pattern, selector)
        name = f"mma_sp_{name_of(dtype)}_{selector}"
        assert run(name, d, kept, b.t().contiguous(), words) == ""
        assert_close_to_exact(d, c, scatter(kept, pattern), b)


def test_mma_sp_leaves_out_what_is_pruned(run):
    """Infinities in rows of b that no kept element meets."""
    pattern = torch.full((16, 8), PATTERNS.index((0, 2)))
    b = torch.ones(32, 8).half()
    b[1::2] = float("inf")
    d = torch.zeros(16, 8)
    words = metadata(pattern, 0)
    assert run("mma_sp_float16_0", d, torch.ones(16, 16).half(), b.t().contiguous(), words) == ""
    assert torch.equal(d, torch.full((16, 8), 16.0))


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("nibble", sorted(set(range(16)) - set(NIBBLES)))
def test_mma_sp_refuses_other_metadata(nibble, selector, run):
    words = metadata(torch.zeros(16, 8, dtype=torch.int64), selector)
    lane = 4 * 5 + 2 * selector + 1
    words[lane] = 0x4444_4444 & ~(0xF << 12) | nibble << 12
    operands = torch.ones(16, 16).half(), torch.ones(8, 32).half()
    error = run(f"mma_sp_float16_{selector}", torch.zeros(16, 8), *operands, words)
    assert f"metadata that do not name two of four in order: thread ({lane}, 0, 0)" in error

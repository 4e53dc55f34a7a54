"""RTN: the nearest code of each weight's grid, and the error it reports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.formats.int4 import QuantFormat
from llmkern.quantize import QuantizedWeight, RtnOptions, rtn


def dequantize(q: QuantizedWeight, bits: int) -> torch.Tensor:
    N, groups = q.scales.shape
    zeros = torch.full((N, groups), 1 << (bits - 1)) if q.zeros is None else q.zeros
    centred = q.codes.double().view(N, groups, -1) - zeros.double()[..., None]
    return (q.scales.double()[..., None] * centred).view(N, -1)


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(1, 9),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 3, 32]),
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_code_is_the_nearest_of_its_grid(
    N: int, groups: int, group_size: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    w = torch.randn(N, groups * group_size).to(dtype)
    q = rtn(w, QuantFormat(bits, group_size, symmetric), RtnOptions())
    assert q.codes.dtype == torch.uint8
    assert int(q.codes.max()) < 1 << bits
    assert q.scales.dtype == dtype
    assert (q.zeros is None) == symmetric
    error = (dequantize(q, bits) - w.double()).abs()
    for step in (-1, 1):
        neighbour = q.codes.int() + step
        inside = (neighbour >= 0) & (neighbour < 1 << bits)
        moved = QuantizedWeight(
            neighbour.clamp(0, (1 << bits) - 1).to(torch.uint8), q.scales, q.zeros, 0, 0, None, True
        )
        other = (dequantize(moved, bits) - w.double()).abs()
        assert bool((error <= other + 1e-6)[inside].all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_loss_is_the_squared_error(symmetric: bool) -> None:
    w = torch.randn(16, 64)
    q = rtn(w, QuantFormat(3, 32, symmetric), RtnOptions())
    error = (dequantize(q, 3) - w.double()).square().sum()
    assert q.loss == pytest.approx(float(error), rel=1e-5)
    assert q.relative_loss == pytest.approx(float(error / w.double().square().sum()), rel=1e-5)
    assert q.factored
    assert q.damp is None


def test_clip_search_never_raises_the_error() -> None:
    w = torch.randn(64, 128).pow(3)  # long tails, where clipping pays
    plain, searched = (rtn(w, QuantFormat(3, 32), RtnOptions(clip)) for clip in (False, True))
    assert searched.loss < 0.95 * plain.loss


def test_zero_weight_stays_zero() -> None:
    q = rtn(torch.zeros(4, 32), QuantFormat(4, 32), RtnOptions())
    assert not dequantize(q, 4).any()
    assert q.relative_loss == 0


def test_group_size_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="group_size: got 32, expected a divisor of K = 48"):
        rtn(torch.randn(4, 48), QuantFormat(4, 32), RtnOptions())


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or Inf"):
        rtn(torch.full((4, 32), torch.nan), QuantFormat(4, 32), RtnOptions())

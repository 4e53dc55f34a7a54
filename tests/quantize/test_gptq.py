"""GPTQ of one weight: the loss it reports, the factor it shares, what it does without a Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkern.calibrate import HessianStatistic, statistics
from llmkern.formats.int4 import QuantFormat
from llmkern.quantize import GptqOptions, QuantizedWeight, RtnOptions, gptq, rtn

K, ROWS = 64, 512


def correlated(rows: int = ROWS) -> Tensor:
    mix = torch.randn(K, K) @ torch.diag(torch.logspace(0, -2, K))
    return torch.randn(rows, K) @ mix.T


def statistic_of(x: Tensor) -> HessianStatistic:
    statistic = HessianStatistic(K, tokens=len(x))
    statistic.update(x)
    return statistic


def dequantize(q: QuantizedWeight, bits: int) -> Tensor:
    N, groups = q.scales.shape
    zeros = torch.full((N, groups), 1 << (bits - 1)) if q.zeros is None else q.zeros
    centred = q.codes.double().view(N, groups, -1) - zeros.double()[..., None]
    return (q.scales.double()[..., None] * centred).view(N, -1)


def damped(x: Tensor, damp: float) -> Tensor:
    H = 2 / len(x) * (x.double().T @ x.double())
    return H + damp * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)


MODES = {
    "static": GptqOptions(act_order=False, group_scales="static", clip_search=False),
    "dynamic": GptqOptions(act_order=False, group_scales="dynamic", clip_search=False),
    "act_order": GptqOptions(act_order=True, group_scales="static", clip_search=False),
    "clip_search": GptqOptions(act_order=True, group_scales="static", clip_search=True),
}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("bits", [3, 4])
def test_reported_loss_is_the_output_error(bits: int, mode: str, symmetric: bool) -> None:
    x, w, options = correlated(), torch.randn(24, K), MODES[mode]
    fmt = QuantFormat(bits, 32, symmetric)
    q = gptq(w, fmt, statistic_of(x), options)
    error = dequantize(q, bits) - w.double()
    H = damped(x, options.damp)
    loss = float(((error @ H) * error).sum())
    assert q.loss == pytest.approx(loss, rel=1e-3)
    energy = float(((w.double() @ H) * w.double()).sum())
    assert q.relative_loss == pytest.approx(loss / energy, rel=1e-3)
    assert q.factored
    nearest = dequantize(rtn(w, fmt, RtnOptions(options.clip_search)), bits) - w.double()
    assert loss < 0.8 * float(((nearest @ H) * nearest).sum())


def test_relative_loss_of_many_rows_is_that_of_a_sample() -> None:
    x, w = correlated(), torch.randn(700, K)
    q = gptq(w, QuantFormat(4, 32), statistic_of(x), MODES["static"])
    H = damped(x, 0.01)
    energy = float(((w.double() @ H) * w.double()).sum())
    assert q.relative_loss == pytest.approx(q.loss / energy, rel=0.05)


def test_layers_with_one_input_share_one_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    factorize = statistics.factorize_hessian

    def counted(*args: object, **options: object) -> object:
        calls.append(options)
        return factorize(*args, **options)

    monkeypatch.setattr(statistics, "factorize_hessian", counted)
    statistic = statistic_of(correlated())
    for _ in range(3):
        gptq(torch.randn(8, K), QuantFormat(4, 32), statistic, GptqOptions())
    assert len(calls) == 1


def test_a_layer_without_inputs_is_rounded_and_flagged() -> None:
    w = torch.randn(8, K)
    q = gptq(w, QuantFormat(4, 32), HessianStatistic(K, tokens=9), GptqOptions())
    assert not q.factored
    assert torch.equal(q.codes, rtn(w, QuantFormat(4, 32), RtnOptions(clip_search=True)).codes)


def test_a_hessian_that_cannot_be_factored_is_flagged() -> None:
    statistic = HessianStatistic(K, tokens=1)
    statistic.update(torch.ones(1, K))
    statistic.H.diagonal().fill_(1e-3)  # next to off-diagonal entries of 2: indefinite
    w = torch.randn(8, K)
    q = gptq(w, QuantFormat(4, 32), statistic, GptqOptions())
    assert not q.factored
    assert torch.equal(q.codes, rtn(w, QuantFormat(4, 32), RtnOptions(clip_search=True)).codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damp": 1.0}, r"damp: got 1.0, expected a fraction in \[0, 1\)"),
        ({"damp": -0.1}, "damp: got -0.1"),
        ({"group_scales": "stale"}, "group_scales: got 'stale', expected 'static' or 'dynamic'"),
        (
            {"act_order": True, "group_scales": "dynamic"},
            "group_scales: got 'dynamic' with act_order, expected 'static'",
        ),
    ],
    ids=["damp_one", "damp_negative", "unknown_scales", "dynamic_act_order"],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GptqOptions(**options)


def test_act_order_is_the_default_where_it_is_possible() -> None:
    assert GptqOptions().act_order is True
    assert GptqOptions(group_scales="dynamic").act_order is False


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_in_the_weight_is_refused(bad: float) -> None:
    w = torch.randn(8, K)
    w[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        gptq(w, QuantFormat(4, 32), statistic_of(correlated()), GptqOptions())


def test_a_mask_is_made_up_for() -> None:
    """Nearer than zeros that are put back when all is done."""
    x, fmt = correlated(), QuantFormat(3, 32)
    w = torch.randn(24, K)
    w[:, ::2] = 0
    masked = gptq(w, fmt, statistic_of(x), GptqOptions(), mask=w != 0)
    assert not dequantize(masked, 3)[w == 0].any()
    filled = dequantize(gptq(w, fmt, statistic_of(x), GptqOptions()), 3)
    assert filled[w == 0].any()
    error = filled.masked_fill(w == 0, 0) - w.double()
    H = damped(x, 0.01)
    assert masked.loss < 0.8 * float(((error @ H) * error).sum())

"""One weight: what magnitude and Wanda keep, and the loss that they report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkern.calibrate import ActivationNormStatistic, HessianStatistic
from llmkern.prune import (
    MagnitudeOptions,
    Pattern,
    PrunedWeight,
    SparseGptOptions,
    WandaOptions,
)
from llmkern.prune.magnitude import magnitude
from llmkern.prune.sparsegpt import sparsegpt
from llmkern.prune.wanda import wanda
from llmkern.testing import assert_matches

N, K, ROWS = 24, 64, 256


def inputs() -> Tensor:
    return torch.randn(ROWS, K) * torch.logspace(-1, 1, K)[torch.randperm(K)]


def statistic_of(*parts: Tensor) -> ActivationNormStatistic:
    statistic = ActivationNormStatistic(K, tokens=ROWS)
    for x in parts:
        statistic.update(x)
    return statistic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistic_is_that_of_all_rows(dtype: torch.dtype) -> None:
    x = (100 * inputs()).to(dtype)  # squares beyond float16's range
    statistic = statistic_of(x[:100].view(2, 50, K), x[100:])
    assert statistic.rows == ROWS
    spec = x.double()
    assert_matches(statistic.mean_square(), spec.square().mean(0), x.float().square().mean(0))
    assert_matches(statistic.mean(), spec.mean(0), x.float().mean(0))


def test_statistic_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no calibration input ever reached it"):
        statistic_of().mean()
    x = inputs()
    x[3, 5] = torch.nan
    for ask in (statistic_of(x).mean, statistic_of(x).mean_square):
        with pytest.raises(ValueError, match="its calibration activations hold NaN or Inf"):
            ask()


AMOUNTS = {"half": 0.5, "none": 0.0, "most": 0.9, "2:4": Pattern(2, 4), "5:8": Pattern(5, 8)}


SCOPE: dict[type, str | None] = {float: "row", Pattern: None}


def check(result: PrunedWeight, w: Tensor, scores: Tensor, amount: float | Pattern) -> None:
    assert torch.equal(result.weight, torch.where(result.mask, w, 0))
    share = amount.sparsity if isinstance(amount, Pattern) else amount
    assert abs(float((~result.mask).double().mean()) - share) <= 0.5 / K
    if isinstance(amount, Pattern):
        assert bool((result.mask.view(-1, amount.m).sum(1) == amount.n).all())
    gone = float(scores.square()[~result.mask].sum())
    assert result.loss == pytest.approx(gone, rel=1e-5)
    assert result.relative_loss == pytest.approx(gone / float(scores.square().sum()), rel=1e-5)
    assert result.factored
    assert result.damp is None


@pytest.mark.parametrize("name", list(AMOUNTS))
def test_magnitude_removes_the_smallest(name: str) -> None:
    w = torch.randn(N, K)
    result = magnitude(w, AMOUNTS[name], None, MagnitudeOptions())
    check(result, w, w.double().abs(), AMOUNTS[name])
    if isinstance(AMOUNTS[name], float) and not result.mask.all():
        assert w[~result.mask].abs().max() <= w[result.mask].abs().min()


@pytest.mark.parametrize("name", list(AMOUNTS))
def test_wanda_removes_what_matters_least_to_the_output(name: str) -> None:
    w, x = torch.randn(N, K), inputs()
    result = wanda(w, AMOUNTS[name], statistic_of(x), WandaOptions())
    norms = (2 / ROWS * x.double().square().sum(0)).sqrt()
    scores = w.double().abs() * norms
    check(result, w, scores, AMOUNTS[name])
    if isinstance(AMOUNTS[name], float):
        gone = round(AMOUNTS[name] * K)
        assert bool(((~result.mask).sum(1) == gone).all()), "each row loses as many"
        for row in range(N):
            assert (
                scores[row][result.mask[row]].min() >= scores[row].sort().values[max(gone - 1, 0)]
            )


def hessian_of(x: Tensor) -> HessianStatistic:
    statistic = HessianStatistic(K, tokens=len(x))
    statistic.update(x)
    return statistic


@pytest.mark.parametrize("name", list(AMOUNTS))
def test_sparsegpt_makes_up_for_what_it_removes(name: str) -> None:
    w, x = torch.randn(N, K), inputs() @ torch.randn(K, K)
    amount = AMOUNTS[name]
    result = sparsegpt(w, amount, hessian_of(x), SparseGptOptions(scope=SCOPE[type(amount)]))
    assert not result.weight[~result.mask].any()
    share = amount.sparsity if isinstance(amount, Pattern) else amount
    assert abs(float((~result.mask).double().mean()) - share) <= 0.5 / K
    H = 2 / ROWS * (x.double().T @ x.double())
    H += 0.01 * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    error = result.weight.double() - w.double()
    loss = float(((error @ H) * error).sum())
    energy = float(((w.double() @ H) * w.double()).sum())
    assert result.loss == pytest.approx(loss, rel=1e-3, abs=1e-6 * energy)
    assert result.relative_loss == pytest.approx(loss / energy, rel=1e-3, abs=1e-6)
    assert (result.damp, result.factored) == (0.01, True)
    if amount:
        plain = wanda(w, amount, statistic_of(x), WandaOptions()).weight.double() - w.double()
        assert loss < 0.9 * float(((plain @ H) * plain).sum())


def test_sparsegpt_without_inputs_goes_by_magnitude() -> None:
    w = torch.randn(N, K)
    result = sparsegpt(w, 0.5, HessianStatistic(K, tokens=ROWS), SparseGptOptions())
    assert not result.factored
    assert torch.equal(result.mask, magnitude(w, 0.5, None, MagnitudeOptions()).mask)


def test_scope_layer_lets_rows_lose_unequally() -> None:
    w = torch.randn(N, K) * torch.logspace(-1, 1, N)[:, None]
    result = wanda(w, 0.5, statistic_of(inputs()), WandaOptions(scope="layer"))
    gone = (~result.mask).sum(1)
    assert int(gone.sum()) == N * K // 2
    assert gone[0] > gone[-1]


def test_wanda_without_inputs_goes_by_magnitude() -> None:
    w = torch.randn(N, K)
    result = wanda(w, 0.5, statistic_of(), WandaOptions())
    assert not result.factored
    plain = magnitude(w, 0.5, None, MagnitudeOptions(scope="row"))
    assert torch.equal(result.mask, plain.mask)


def test_a_feature_that_never_comes_goes_first() -> None:
    x = inputs()
    x[:, 7] = 0
    result = wanda(torch.randn(N, K), 1 / K, statistic_of(x), WandaOptions())
    assert not result.mask[:, 7].any()
    assert result.loss == 0

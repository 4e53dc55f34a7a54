"""What remains of a weight whose columns go is the least-squares optimum, on the entries it may use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkern.models import Units
from llmkern.prune._columns import adjusted, choose_units
from llmkern.prune._scores import CentredStatistic, output_loss

N, K = 6, 12


def correlated(rows: int = 200) -> Tensor:
    return torch.randn(rows, K, dtype=torch.float64) @ torch.randn(K, K, dtype=torch.float64)


def hessian(x: Tensor) -> Tensor:
    return (2 / len(x) * x.t() @ x).float()


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(N, K)


KEPT = torch.tensor([0, 2, 3, 7, 8, 11])


def test_dense_rows_equal_least_squares(weight: Tensor) -> None:
    x = correlated()
    want = torch.linalg.lstsq(x[:, KEPT], x @ weight.double().t()).solution.t()
    got = adjusted(weight, hessian(x), KEPT, damp=0.0)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


def test_zeros_stay_and_each_row_is_the_least_squares_of_its_own_entries(weight: Tensor) -> None:
    x = correlated()
    weight[torch.rand(N, K) < 0.4] = 0
    weight[2] = 0
    got = adjusted(weight, hessian(x), KEPT, damp=0.0, held=weight != 0)[0]
    assert torch.equal(got == 0, weight[:, KEPT] == 0)
    for row in range(N):
        used = KEPT[weight[row, KEPT] != 0]
        want = torch.linalg.lstsq(x[:, used], x @ weight[row].double()[:, None]).solution[:, 0]
        mine = got[row][got[row] != 0].double()
        torch.testing.assert_close(mine, want, rtol=1e-2, atol=1e-3)


def test_input_that_never_came_leaves_its_column_alone(weight: Tensor) -> None:
    x = correlated()
    x[:, 3] = 0
    got = adjusted(weight, hessian(x), KEPT, damp=0.01)[0]
    assert torch.equal(got[:, 2], weight[:, 3])
    assert bool(torch.isfinite(got).all())


def test_groups_of_columns_go_together(weight: Tensor) -> None:
    x = correlated()
    units = Units("attention", {}, "o", torch.arange(K).view(4, 3), head_dim=3)
    kept, losses = choose_units(weight, hessian(x), units, 1, damp=0.0)
    assert len(kept) == 3
    every = []
    for gone in range(4):
        rest = torch.cat([units.columns[i] for i in range(4) if i != gone])
        whole = torch.zeros(N, K)
        whole[:, rest] = adjusted(weight, hessian(x), rest, damp=0.0)[0]
        every.append(output_loss(weight, whole, hessian(x))[0])
    assert kept.tolist() == [i for i in range(4) if i != min(range(4), key=lambda i: every[i])]
    assert float(losses[0]) == pytest.approx(min(every), rel=1e-2)


def test_centred_moments_are_those_of_the_deviations() -> None:
    x = (correlated() + 3).float()
    statistic = CentredStatistic(K, tokens=len(x))
    statistic.update(x[:50].view(2, 25, K))
    statistic.update(x[50:])
    torch.testing.assert_close(statistic.mean(), x.mean(0), rtol=1e-4, atol=1e-4)
    plain, centred = (statistic.moments(centred=c) for c in (False, True))
    torch.testing.assert_close(plain, hessian(x.double()), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        centred, hessian(x.double() - x.double().mean(0)), rtol=1e-3, atol=1e-2
    )

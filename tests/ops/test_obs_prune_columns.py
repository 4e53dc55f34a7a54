from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmkern.ops import obs_prune_columns
from llmkern.reference import obs_prune_columns as reference


def hessian(K: int, seed: int = 0) -> Tensor:
    """float64 2/n XᵀX of correlated inputs with spread channel scales."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(K, dtype=torch.float64)
    mix += torch.randn(K, K, generator=g, dtype=torch.float64) / K**0.5
    x = torch.randn(3 * K, K, generator=g, dtype=torch.float64) @ mix
    x *= torch.exp(0.5 * torch.randn(K, generator=g, dtype=torch.float64))
    return x.t() @ x * (2 / len(x))


def weight(N: int, K: int, seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def damped(H: Tensor, damp: float = 0.01) -> Tensor:
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def loss_of(w: Tensor, H: Tensor, removed: Tensor) -> float:
    """Least loss of any weight without the columns `removed`, in float64."""
    kept = torch.ones(len(H), dtype=torch.bool)
    kept[removed] = False
    E = w.double() - reference.least_squares(w.double(), H, kept)
    return float((E @ H * E).sum())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("group_size", [1, 2])
def test_greedy_is_near_the_best_subset_and_exact_for_its_own(group_size, count):
    K = 8
    columns = torch.arange(K).view(-1, group_size)
    for seed in range(5):
        H, w = damped(hessian(K, seed)), weight(12, K, seed)
        result = obs_prune_columns(w, hessian(K, seed).float(), count, group_size=group_size)
        losses = [
            loss_of(w, H, columns[list(subset)].reshape(-1))
            for subset in combinations(range(len(columns)), count)
        ]
        own = loss_of(w, H, result.removed)
        assert result.loss == pytest.approx(own, rel=1e-4)
        assert float(result.losses.sum()) == pytest.approx(own, rel=1e-4)
        assert own <= sorted(losses)[len(losses) // 4] * (1 + 1e-6)
        if count == 1:
            assert own == pytest.approx(min(losses), rel=1e-6)


# K, group size, count
CASES = {
    "columns": (96, 1, 40),
    "more_than_a_batch_of_updates": (300, 1, 290),
    "pairs": (120, 2, 30),
    "heads": (160, 32, 3),
    "group_wider_than_a_batch": (450, 150, 2),
    "all_but_one": (48, 4, 11),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("N", [7, 40])
def test_the_loop_is_the_float64_greedy(case, N):
    K, group_size, count = case
    H, w = hessian(K), weight(N, K)
    result = obs_prune_columns(w, H.float(), count, group_size=group_size)
    want, order, losses = reference.obs_prune_columns(
        w.double(), damped(H), torch.arange(K) // group_size, count
    )
    assert result.removed.view(-1, group_size)[:, 0].div(group_size).long().tolist() == order
    assert torch.equal(result.kept, result.w_hat.any(0).nonzero()[:, 0])
    assert torch.equal(torch.cat([result.kept, result.removed]).sort().values, torch.arange(K))
    torch.testing.assert_close(result.losses, torch.tensor(losses).double(), rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(result.w_hat.double(), want, rtol=1e-3, atol=1e-5)
    assert result.loss == pytest.approx(sum(losses), rel=1e-4)


def test_groups_of_scattered_columns_may_be_named():
    H, w = hessian(60), weight(9, 60)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    groups = torch.empty(60, dtype=torch.int64)
    groups[shuffled] = torch.arange(60) // 5
    result = obs_prune_columns(w, H.float(), 4, groups=groups)
    _, order, _ = reference.obs_prune_columns(w.double(), damped(H), groups, 4)
    assert groups[result.removed].view(4, 5)[:, 0].tolist() == order
    assert bool((groups[result.removed].view(4, 5) == groups[result.removed][::5, None]).all())


def test_columns_to_keep_stay():
    H, w = hessian(40), weight(9, 40)
    keep = torch.zeros(40, dtype=torch.bool)
    keep[obs_prune_columns(w, H.float(), 10, group_size=2).removed[::2]] = True
    result = obs_prune_columns(w, H.float(), 10, group_size=2, keep=keep)
    assert not bool(keep[result.removed].any())


def test_columns_without_input_go_first_and_cost_nothing():
    H, w = hessian(40), weight(9, 40)
    H[[3, 17]] = 0
    H[:, [3, 17]] = 0
    result = obs_prune_columns(w, H.float(), 5)
    assert set(result.removed[:2].tolist()) == {3, 17}
    assert result.losses[:2].tolist() == [0, 0]


def test_columns_of_zeros_cost_nothing():
    w = weight(9, 40)
    w[:, 5:8] = 0
    result = obs_prune_columns(w, hessian(40).float(), 5)
    assert set(result.removed[:3].tolist()) == {5, 6, 7}
    assert result.loss > 0
    assert float(result.losses[:3].sum()) == 0


def test_removing_nothing_changes_nothing():
    w = weight(4, 16)
    result = obs_prune_columns(w, hessian(16).float(), 0)
    assert torch.equal(result.w_hat, w)
    assert result.loss == 0
    assert result.kept.tolist() == list(range(16))


def test_half_precision_weights():
    w = weight(9, 40).bfloat16()
    result = obs_prune_columns(w, hessian(40).float(), 5)
    assert torch.equal(result.removed, obs_prune_columns(w.float(), hessian(40).float(), 5).removed)


def test_a_hessian_that_cannot_be_factored_updates_nothing_and_says_so():
    w = weight(6, 32)
    result = obs_prune_columns(w, torch.full((32, 32), 5.0) - 4 * torch.eye(32), 3)
    assert not result.factored
    assert torch.equal(result.w_hat[:, result.kept], w[:, result.kept])
    assert sorted(result.removed.tolist()) == sorted(w.square().sum(0).argsort()[:3].tolist())


EYE = torch.eye(32)
NAN = float("nan")
BAD = {
    "w_axes": (torch.zeros(2, 3, 32), EYE, {}, "w: got float32"),
    "w_nan": (torch.full((2, 32), NAN), EYE, {}, "w: got NaN"),
    "h_nan": (torch.ones(2, 32), EYE * NAN, {}, "H: got NaN"),
    "h_shape": (torch.ones(2, 32), torch.eye(16), {}, r"H: got float32 \[16, 16\]"),
    "count": (torch.ones(2, 32), EYE, {"count": 32}, "count: got 32, expected 0 to 31"),
    "negative": (torch.ones(2, 32), EYE, {"count": -1}, "count: got -1"),
    "group_size": (torch.ones(2, 32), EYE, {"group_size": 5}, "group_size: got 5"),
    "both": (
        torch.ones(2, 32),
        EYE,
        {"group_size": 2, "groups": torch.arange(32)},
        "group_size: got 2 beside groups",
    ),
    "uneven": (
        torch.ones(2, 32),
        EYE,
        {"groups": torch.arange(32).clamp(max=30)},
        "groups of 1 to 2",
    ),
    "groups_dtype": (torch.ones(2, 32), EYE, {"groups": torch.arange(32.0)}, "groups: got float32"),
    "keep": (torch.ones(2, 32), EYE, {"keep": torch.ones(32)}, "keep: got float32"),
    "keep_all": (
        torch.ones(2, 32),
        EYE,
        {"keep": torch.ones(32, dtype=torch.bool)},
        "count: got 1, expected 0 to 0",
    ),
    "damp": (torch.ones(2, 32), EYE, {"damp": 1.5}, "damp: got 1.5"),
}


@pytest.mark.parametrize(("w", "H", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(w, H, options, message):
    with pytest.raises(ValueError, match=message):
        obs_prune_columns(w, H, **({"count": 1} | options))

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern.ops._hessian_factor import factorize_hessian

# K around the strips and blocks of the compiled kernel: 32, 24 and 12 rows; 128 columns.
SIZES = (1, 2, 12, 31, 32, 33, 127, 128, 130, 257, 400)


def hessian(K: int) -> torch.Tensor:
    """float64 2/n XᵀX of correlated inputs."""
    mix = torch.randn(K, K, dtype=torch.float64) / K**0.5 + torch.eye(K, dtype=torch.float64)
    x = torch.randn(2 * K + 8, K, dtype=torch.float64) @ mix
    return x.t() @ x * (2 / len(x))


def stored(H: torch.Tensor) -> torch.Tensor:
    """As hessian_update leaves it: float32, only the lower triangle valid."""
    return H.float().masked_fill(torch.ones_like(H, dtype=torch.bool).triu(1), float("nan"))


def damped(H: torch.Tensor, damp: float) -> torch.Tensor:
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def product(factor) -> torch.Tensor:
    R = factor.U.double() * factor.d.double()
    return R @ R.t()


# With an order: below a block, beyond one, and beyond two with a tail.
@pytest.mark.parametrize(
    ("K", "act_order"), [*((K, False) for K in SIZES), *((K, True) for K in (12, 130, 257))]
)
def test_reproduces_the_damped_hessian(backend, K, act_order):
    H = hessian(K)
    factor = factorize_hessian(stored(H), act_order=act_order)
    spec = damped(H, 0.01)
    if act_order:
        assert torch.equal(factor.order.sort().values, torch.arange(K))
        diagonal = H.diagonal()[factor.order].float()
        assert bool((diagonal[1:] <= diagonal[:-1]).all())
        spec = spec[factor.order][:, factor.order]
    else:
        assert factor.order is None
    assert factor.factored
    assert factor.damp == 0.01
    assert float((product(factor) - spec).norm() / spec.norm()) < 1e-6
    assert torch.equal(factor.U.tril(-1), torch.zeros(K, K))
    assert torch.equal(factor.U.diagonal(), torch.ones(K))
    assert bool((factor.d > 0).all())


def test_does_not_change_the_hessian(backend):
    H = stored(hessian(50))
    before = H.clone()
    factorize_hessian(H, act_order=True)
    assert torch.equal(H.tril(), before.tril())


def test_float64_and_strided_hessians(backend):
    H = hessian(70)
    wide = torch.zeros(70, 140, dtype=torch.float64)
    wide[:, ::2] = H
    exact = factorize_hessian(stored(H))
    for other in (H, wide[:, ::2]):
        factor = factorize_hessian(other)
        torch.testing.assert_close(factor.U, exact.U, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(factor.d, exact.d, rtol=1e-5, atol=1e-6)


def test_dead_columns_are_reported_and_factored(backend):
    H = hessian(40)
    H[[3, 17]] = 0
    H[:, [3, 17]] = 0
    factor = factorize_hessian(stored(H))
    assert factor.dead.nonzero().flatten().tolist() == [3, 17]
    assert factor.factored


def test_all_columns_dead(backend):
    factor = factorize_hessian(torch.zeros(5, 5))
    assert factor.factored
    assert bool(factor.dead.all())


def test_ties_keep_the_natural_order(backend):
    factor = factorize_hessian(torch.eye(6), act_order=True)
    assert factor.order.tolist() == list(range(6))


def test_rank_deficient(backend):
    x = torch.randn(5, 60, dtype=torch.float64)
    factor = factorize_hessian(stored(x.t() @ x))
    assert factor.factored
    assert factor.damp == 0.01


def test_more_damping_until_it_factors(backend):
    # Smallest eigenvalue -0.02: the second rung's 0.04 is enough.
    H = torch.eye(30, dtype=torch.float64)
    v = torch.full((30,), 30**-0.5, dtype=torch.float64)
    H -= 1.02 * torch.outer(v, v)
    factor = factorize_hessian(stored(H), damp=0.01)
    assert factor.factored
    assert 0.01 < factor.damp < 0.1
    spec = damped(H, factor.damp)
    assert float((product(factor) - spec).norm() / spec.norm()) < 1e-5


def test_condition_1e12(backend):
    Q = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    H = (Q * torch.logspace(-12, 0, 64, dtype=torch.float64)) @ Q.t()
    factor = factorize_hessian(stored(H), damp=0.0)
    assert factor.factored
    spec = damped(H, factor.damp)
    assert float((product(factor) - spec).norm() / spec.norm()) < 1e-5


def test_an_indefinite_hessian_is_given_up_and_said_so(backend):
    H = torch.full((8, 8), 5.0) - 4 * torch.eye(8)
    factor = factorize_hessian(H)
    assert not factor.factored
    assert torch.equal(factor.U, torch.eye(8))
    assert torch.equal(factor.d, torch.ones(8))


def test_same_bits_for_any_number_of_threads():
    H = stored(hessian(300))
    threads = torch.get_num_threads()
    factors = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with llmkern.use_backend("cpu"):
                factors.append(factorize_hessian(H))
    finally:
        torch.set_num_threads(threads)
    for other in factors[1:]:
        assert torch.equal(factors[0].U, other.U)
        assert torch.equal(factors[0].d, other.d)


def entry(row: int, col: int, value: float) -> torch.Tensor:
    H = hessian(20).float()
    H[row, col] = value
    return H


@pytest.mark.parametrize(
    ("H", "damp", "message"),
    [
        (torch.eye(3)[:2], 0.01, r"H: got .*\[2, 3\], expected a square"),
        (torch.eye(3, dtype=torch.bfloat16), 0.01, "H: got torch.bfloat16"),
        (torch.eye(3), 1.0, r"damp: got 1.0, expected a fraction in \[0, 1\)"),
        (torch.eye(3), -0.1, "damp: got -0.1"),
        (torch.eye(3), float("nan"), "damp: got nan"),
        (-torch.eye(3), 0.01, "H: got a negative diagonal entry"),
        (entry(7, 7, float("nan")), 0.01, "H: got NaN or Inf"),
        (entry(7, 7, float("inf")), 0.01, "H: got NaN or Inf"),
        (entry(9, 4, float("nan")), 0.01, "H: got NaN or Inf"),
        (entry(19, 0, float("-inf")), 0.01, "H: got NaN or Inf"),
    ],
    ids=[
        "not_square",
        "dtype",
        "damp_1",
        "damp_negative",
        "damp_nan",
        "negative_diagonal",
        "nan_on_diagonal",
        "inf_on_diagonal",
        "nan_beside_diagonal",
        "inf_in_corner",
    ],
)
def test_bad_arguments_are_named(backend, H, damp, message):
    with pytest.raises(ValueError, match=message):
        factorize_hessian(H, damp=damp)

"""hessian_update's CUDA kernel in the emulator."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern import ops
from llmkern.reference.hessian_update import hessian_update as spec
from llmkern.testing import assert_matches

# rows, columns
CASES = {
    "one_row": (1, 40),
    "columns_without_vectors": (50, 67),
    "several_tiles": (33, 200),
    "two_flushes": (1100, 24),
    "the_ring_wraps_and_the_last_stage_is_short": (301, 72),
    "two_promotions": (4200, 16),
}
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, dtype, both_orders, guarded):
    T, K = case
    x = guarded((torch.randn(T, K) + 0.5).to(dtype))
    H0 = torch.randn(K, K)

    def update():
        H = guarded(H0)
        ops.hessian_update(H, x, 2.0 / T)
        return H

    out = both_orders(update)
    want, like = H0.double(), H0.clone()
    spec(want, x, 2.0 / T)
    spec(like, x, 2.0 / T)
    assert_matches(out, want, like)
    assert torch.equal(out.triu(1), H0.triu(1)), "the upper triangle was touched"


def test_long_sums_keep_late_rows(emulator):
    """One float32 sum of these 10,000 products, in order, is off by 1.2e-4."""
    x = torch.full((10_000, 1), 1 / 3)
    H = torch.zeros(1, 1)
    ops.hessian_update(H, x, 1.0)
    torch.testing.assert_close(H[0].double(), 10_000 * x[0].double().square(), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_tile_of_one_size_is_as_good_as_of_the_other(dtype, both_orders, guarded):
    """44 experts of K = 136 have 132 tiles of 128, enough for the large ones; one has 3."""
    x = guarded(torch.randn(44, 37, 136).to(dtype))

    def update():
        H = guarded(torch.ones(44, 136, 136))
        ops.hessian_update(H, x, 0.25)
        return H

    H = both_orders(update)
    for expert in (0, 17, 43):
        alone = torch.ones(136, 136)
        ops.hessian_update(alone, x[expert], 0.25)
        assert torch.equal(H[expert], alone)
    want, like = torch.ones(44, 136, 136).double(), torch.ones(44, 136, 136)
    spec(want, x, 0.25)
    spec(like, x, 0.25)
    assert_matches(H, want, like)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_experts_with_offsets_have_the_bits_of_each_alone(dtype, both_orders, guarded):
    x = guarded(torch.randn(150, 40).to(dtype))
    offsets = guarded(torch.tensor([3, 3, 70, 71, 150]))

    def update():
        H = guarded(torch.zeros(4, 40, 40))
        ops.hessian_update(H, x, 0.5, offsets)
        return H

    H = both_orders(update)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        alone = torch.zeros(40, 40)
        ops.hessian_update(alone, x[begin:end].clone(), 0.5)
        assert torch.equal(H[expert], alone)
    assert not H[0].any()


def test_offsets_outside_x_read_nothing_there(emulator_module, guarded):
    """On a GPU nobody looks at them: the kernel must bear any."""
    for dtype in ("float32", "bfloat16"):
        x = guarded(torch.ones(20, 8, dtype=getattr(torch, dtype)))
        H = guarded(torch.zeros(5, 8, 8))
        offsets = guarded(torch.tensor([-7, 4, 1 << 40, -(1 << 40), 3, 2]))
        emulator_module.hessian_update(
            **{name: t.data_ptr() for name, t in {"H": H, "x": x, "offsets": offsets}.items()},
            **{"T": 20, "K": 8, "alpha": 1.0, "dtype": dtype, "E": 5, "device": 0, "stream": 0},
        )
        assert H[:, 0, 0].tolist() == [4, 16, 0, 3, 0]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(data, emulator):
    experts = data.draw(st.integers(1, 3), "E")
    T, K = data.draw(st.integers(0, 140), "T"), data.draw(st.integers(1, 140), "K")
    dtype = data.draw(st.sampled_from([torch.float32, *HALVES]), "dtype")
    x = torch.randn(experts, T, K + 1).to(dtype)[..., data.draw(st.integers(0, 1), "start") :][
        ..., :K
    ]
    H = torch.zeros(experts, K, K)
    ops.hessian_update(H, x, 0.5)
    want, like = H.double().zero_(), torch.zeros_like(H)
    spec(want, x, 0.5)
    spec(like, x, 0.5)
    assert_matches(H, want, like)

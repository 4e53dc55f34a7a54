"""hessian_update's CUDA kernel in the emulator."""

from __future__ import annotations

import pytest
import torch

from llmkern import ops
from llmkern.reference.hessian_update import hessian_update as spec
from llmkern.testing import assert_matches

# rows, columns
CASES = {
    "one_row": (1, 40),
    "columns_without_vectors": (50, 67),
    "several_tiles": (33, 200),
    "two_flushes": (1100, 24),
}


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

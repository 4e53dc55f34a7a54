"""The loop over blocks that the Triton and CUDA backends share, with a block kernel in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkern.ops import _obs_blocks
from llmkern.reference.obs_quantize import group_grid, obs_quantize, quantize_to_grid


def torch_block(
    w: Tensor,
    U: Tensor,
    d: Tensor,
    g_idx: Tensor,
    bits: int,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    w_hat: Tensor,
    loss: Tensor,
    first: int,
    last: int,
    error: Tensor,
) -> None:
    work = w_hat[:, first:last].clone()
    E = torch.zeros_like(work)
    for k in range(first, last):
        i, g = k - first, int(g_idx[k])
        updated = work[:, i] + E[:, :i] @ U[first:k, k]
        code = quantize_to_grid(updated, scales[:, g], zeros[:, g], (1 << bits) - 1)
        w_hat[:, k] = scales[:, g] * (code - zeros[:, g])
        codes[:, k] = code.to(torch.uint8)
        E[:, i] = error[:, i] = w[:, k] - w_hat[:, k]
        loss += ((updated - w_hat[:, k]) * d[k]).square()


@pytest.mark.parametrize(
    ("K", "group_size", "dynamic"),
    [
        pytest.param(300, 30, True, id="groups_inside_a_block_that_128_does_not_hold_evenly"),
        pytest.param(300, 100, True, id="one_group_per_short_block"),
        pytest.param(384, 192, True, id="group_larger_than_a_block"),
        pytest.param(200, 200, True, id="one_group"),
        pytest.param(300, 100, False, id="static_groups_straddle_blocks"),
    ],
)
def test_blocks_equal_the_column_loop(K: int, group_size: int, dynamic: bool) -> None:
    w = torch.randn(3, K, dtype=torch.float64)
    U = torch.randn(K, K, dtype=torch.float64) * K**-0.5
    d = torch.rand(K, dtype=torch.float64) + 0.5
    g_idx = torch.arange(K, dtype=torch.int32) // group_size
    options = (dynamic, 4, group_size, False, False, torch.float32)
    scales, zeros = group_grid(w.view(-1, group_size), 4, False, False, torch.float32)
    scales, zeros = scales.view(3, -1), zeros.view(3, -1)
    want_scales = scales.clone()
    grid = (want_scales, zeros.clone(), 4, group_size, False, dynamic, False, torch.float32)
    want_codes, want, want_loss = obs_quantize(w, U, d, g_idx, *grid)
    codes = torch.empty(3, K, dtype=torch.uint8)
    w_hat, loss = torch.empty_like(w), torch.empty_like(w[:, 0])
    outputs = (codes, scales, zeros, w_hat, loss)
    _obs_blocks.run_blocks(torch_block, w, U, d, g_idx, *options, *outputs)
    assert torch.equal(codes, want_codes)
    torch.testing.assert_close(w_hat, want)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(scales, want_scales)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_products_are_full_float32_and_the_setting_returns(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    modules = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    settings = [module.fp32_precision for module in modules]
    try:
        with _obs_blocks.full_float32():
            assert [module.fp32_precision for module in modules] == ["ieee", "ieee"]
        assert [module.fp32_precision for module in modules] == settings
    finally:
        torch.set_float32_matmul_precision(before)

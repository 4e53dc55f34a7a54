"""The loop over blocks that the Triton and CUDA backends share, with a block kernel in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkern.ops import _obs_blocks
from llmkern.ops._obs_blocks import Block, BlockGrid, Fit, Pruning
from llmkern.reference.obs_prune import keep_all_but_lowest, keep_highest_per_row, obs_prune
from llmkern.reference.obs_quantize import Grid, group_grid

N = 3


def torch_block(block: Block) -> None:
    span = slice(block.first, block.last)
    work = block.work[..., block.work_first :]
    for e, w in enumerate(block.w):
        pushed, E = work[e, :, : block.last - block.first].clone(), torch.zeros_like(w[:, span])
        for k in range(block.first, block.last):
            i, w_k = k - block.first, w[:, k]
            if block.size and i % block.size == 0:
                group = slice(k, k + block.size)
                reached = pushed[:, i : i + block.size] + E[:, :i] @ block.U[e, span, group][:i]
                reached = _obs_blocks.unrounded(reached, w[:, group], block.U[e, group, group])
                costs = (reached * block.d[e, group]).square()
                block.mask[e, :, group] = keep_highest_per_row(costs, block.kept)
            updated = pushed[:, i] + E[:, :i] @ block.U[e, span, k][:i]
            value = updated if block.mask is None else updated.where(block.mask[e, :, k], 0.0)
            if block.grid is not None:
                given = block.grid
                tensors = (given.g_idx[e], given.scales[e], given.zeros[e])
                grid = Grid(*tensors, None, False, given.bits, 0, False, False, torch.float32)
                code, value = grid.round(int(given.g_idx[e, k]), value)
                given.codes[e, :, k] = code.to(torch.uint8)
                value = value if block.mask is None else value.where(block.mask[e, :, k], 0.0)
            work[e, :, i] = value
            E[:, i] = block.error[e, :, i] = w_k - value
            if block.loss is not None:
                block.loss[e] += ((updated - value) * block.d[e, k]).square()


def torch_select(reached: Tensor, d: Tensor, removed: int, per_row: bool, mask: Tensor) -> None:
    assert 0 < removed < (1 if per_row else N) * reached.shape[2]
    for e in range(len(reached)):
        costs = (reached[e] * d[e]).square()
        keep = keep_all_but_lowest(costs, removed)
        mask[e] = keep_highest_per_row(costs, len(d[e]) - removed) if per_row else keep


# K, group size or None for no grid, whether it is dynamic, pruning or a given mask
CASES = {
    "groups_inside_a_block_that_128_does_not_hold_evenly": (300, 30, True, None),
    "one_group_per_short_block": (300, 100, True, None),
    "group_larger_than_a_block": (384, 192, True, None),
    "one_group": (200, 200, True, None),
    "static_groups_straddle_blocks": (300, 100, False, None),
    "a_mask": (300, 30, True, "mask"),
    "a_mask_over_a_group_larger_than_a_block": (200, 200, True, "mask"),
    "pruned_only": (300, None, False, Pruning(0.5, 0, 0, False)),
    "pruned_by_row": (300, None, False, Pruning(0.3, 0, 0, True)),
    "nothing_to_remove": (40, None, False, Pruning(0.0, 0, 0, False)),
    "blocks_that_lose_all": (260, None, False, Pruning(0.999, 0, 0, True)),
    "3_5": (300, None, False, Pruning(0.0, 3, 5, False)),
    "joint": (300, 30, True, Pruning(0.5, 0, 0, False)),
    "joint_one_group_is_all": (60, 60, True, Pruning(0.5, 0, 0, False)),
    "joint_in_a_group_larger_than_a_block": (384, 192, True, Pruning(0.5, 0, 0, True)),
    "joint_static": (300, 100, False, Pruning(0.5, 0, 0, False)),
    "joint_2_4": (384, 192, True, Pruning(0.0, 2, 4, False)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_equal_the_column_loop(case: tuple) -> None:
    """Of two experts, each against the specification, in float64."""
    K, group_size, dynamic, choice = case
    f64 = {"dtype": torch.float64}
    w, U = torch.randn(2, N, K, **f64), torch.randn(2, K, K, **f64) * K**-0.5
    d = torch.rand(2, K, **f64) + 0.5
    mask, pruning = None, choice
    if choice == "mask":
        mask, pruning = torch.rand(2, N, K) < 0.6, None
    elif choice is not None:
        mask = torch.ones(2, N, K, dtype=torch.bool)
    given = mask.clone() if choice == "mask" else None
    grid = fit = want_grid = None
    options = (4, group_size, False, False, torch.float32)
    if group_size is not None:
        g_idx = (torch.arange(K, dtype=torch.int32) // group_size).expand(2, K)
        rows = w.reshape(-1, group_size)
        scales, zeros = (t.view(2, N, -1) for t in group_grid(rows, 4, False, False, torch.float32))
        want_grid = (g_idx, scales.clone(), zeros.clone())
        codes = torch.empty(2, N, K, dtype=torch.uint8)
        grid = BlockGrid(g_idx, None, scales, zeros, 4, codes)
        fit = Fit(group_size, False, False, torch.float32) if dynamic else None
    w_hat, loss = torch.empty_like(w), torch.empty(2, N, **f64)
    _obs_blocks.run_blocks(
        torch_block, torch_select, w, U, d, mask, pruning, grid, fit, w_hat, loss
    )
    for e in range(2):
        model = want_grid and Grid(*(t[e] for t in want_grid), None, dynamic, *options)
        keep = torch.ones(N, K, dtype=torch.bool) if given is None else given[e]
        choose = pruning or Pruning(0.0, 0, 0, False)
        keep, want_codes, want, want_loss = obs_prune(
            *(w[e], U[e], d[e], None if pruning else keep),
            *(choose.sparsity, choose.kept, choose.size, choose.per_row, model),
        )
        if mask is not None:
            assert torch.equal(mask[e], keep)
        torch.testing.assert_close(w_hat[e], want)
        torch.testing.assert_close(loss[e], want_loss)
        if grid is not None and model is not None:
            assert torch.equal(codes[e], want_codes)
            torch.testing.assert_close(scales[e], model.scales)


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

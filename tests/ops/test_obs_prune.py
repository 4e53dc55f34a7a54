from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmkern
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import NF4_CODEBOOK, CodebookFormat
from llmkern.ops import factorize_hessian, obs_prune, obs_quantize
from llmkern.reference import obs_prune as reference
from llmkern.testing import random_hessian as hessian
from llmkern.testing import row_losses


def weight(N: int, K: int, seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def half_mask(w: Tensor) -> Tensor:
    return w.abs() > w.abs().flatten().median()


def classical_sparsegpt(w: Tensor, H: Tensor, sparsity: float, pattern: tuple | None) -> tuple:
    """SparseGPT as published (arXiv 2301.00774, Alg. 1): rank-1 updates by the factor of H⁻¹."""
    w = w.double().clone()
    K = w.shape[1]
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    T = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    for k in range(K):
        if pattern is None and k % 128 == 0:
            scores = (w[:, k : k + 128] / T.diagonal()[k : k + 128]).square()
            count = round(sparsity * scores.numel())
            mask[:, k : k + 128] = scores > scores.flatten().kthvalue(count).values
        if pattern is not None and k % pattern[1] == 0:
            scores = (w[:, k : k + pattern[1]] / T.diagonal()[k : k + pattern[1]]).square()
            kept = scores.topk(pattern[0], dim=1).indices
            mask[:, k : k + pattern[1]] = False
            mask[:, k : k + pattern[1]].scatter_(1, kept, True)
        error = w[:, k] * ~mask[:, k] / T[k, k]
        w[:, k:] -= error[:, None] * T[k, k:]
        w[~mask[:, k], k] = 0
    return mask, w


PATTERNS = [None, (2, 4), (4, 8), (1, 3)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_specification_is_classical_sparsegpt(pattern):
    H, w = hessian(192), weight(24, 192)
    mask, want = classical_sparsegpt(w, H, 0.5, pattern)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(192, dtype=H.dtype)
    R = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    d = R.diagonal()
    kept, size = pattern or (0, 0)
    ours, _, w_hat, loss = reference.obs_prune(
        w.double(), R / d, d, None, 0.5, kept, size, False, None
    )
    assert torch.equal(ours, mask)
    torch.testing.assert_close(w_hat, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, row_losses(w, want, H, 0.01), rtol=1e-9, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_loss_is_the_float64_oracles(backend, pattern):
    H, w = hessian(192), weight(48, 192)
    which = {"sparsity": 0.5} if pattern is None else {"pattern": pattern}
    result = obs_prune(w, H.float(), **which)
    mask, want = classical_sparsegpt(w, H, 0.5, pattern)
    ours, best = (float(row_losses(w, q, H, 0.01).sum()) for q in (result.w_hat, want))
    assert abs(ours / best - 1) < 1e-3
    assert float((result.mask == mask).float().mean()) > 0.999
    magnitude = float(row_losses(w, w * half_mask(w), H, 0.01).sum())
    assert ours < 0.7 * magnitude or pattern not in (None, (4, 8))


INT4 = QuantFormat(4, 32, False)
# N, K, options
CASES = {
    "layer": (40, 192, {"sparsity": 0.5}),
    "rows_beyond_a_panel": (1100, 64, {"sparsity": 0.3}),
    "layer_k_tail": (33, 130, {"sparsity": 0.61}),
    "row": (40, 192, {"sparsity": 0.5, "scope": "row"}),
    "row_k_tail": (7, 200, {"sparsity": 0.333, "scope": "row"}),
    "nothing": (5, 40, {"sparsity": 0.0}),
    "almost_everything": (9, 70, {"sparsity": 0.97}),
    "one_weight": (1, 1, {"sparsity": 0.4}),
    "beyond_an_outer_block": (9, 600, {"sparsity": 0.5}),
    "act_order": (12, 160, {"sparsity": 0.5, "act_order": True}),
    "two_four": (40, 160, {"pattern": (2, 4)}),
    "one_two": (9, 70, {"pattern": (1, 2)}),
    "three_of_seven_straddle_tiles": (9, 273, {"pattern": (3, 7)}),
    "two_four_act_order": (12, 160, {"pattern": (2, 4), "act_order": True}),
    "mask": (40, 160, {"mask": half_mask(weight(40, 160))}),
    "mask_act_order": (9, 96, {"mask": half_mask(weight(9, 96)), "act_order": True}),
    "layer_int4": (40, 160, {"sparsity": 0.5, "fmt": INT4}),
    "row_int3": (9, 96, {"sparsity": 0.5, "scope": "row", "fmt": QuantFormat(3, 32)}),
    "layer_groups_of_48": (9, 240, {"sparsity": 0.5, "fmt": QuantFormat(4, 48, False)}),
    "layer_wide_groups": (9, 300, {"sparsity": 0.5, "fmt": QuantFormat(4, 150, False)}),
    "two_four_int4": (40, 160, {"pattern": (2, 4), "fmt": INT4}),
    "two_four_per_row": (9, 200, {"pattern": (2, 4), "fmt": QuantFormat(8, None)}),
    "two_four_clip": (9, 96, {"pattern": (2, 4), "fmt": INT4, "clip_search": True}),
    "four_eight_nf4": (9, 192, {"pattern": (4, 8), "fmt": CodebookFormat(NF4_CODEBOOK, 64)}),
    "layer_nf4": (9, 192, {"sparsity": 0.5, "fmt": CodebookFormat(NF4_CODEBOOK, 64)}),
    "mask_int4": (40, 160, {"mask": half_mask(weight(40, 160)), "fmt": INT4}),
    "static_act_order": (
        12,
        160,
        {"sparsity": 0.5, "fmt": INT4, "group_scales": "static", "act_order": True},
    ),
    "two_four_static_act_order": (
        12,
        160,
        {"pattern": (2, 4), "fmt": INT4, "group_scales": "static", "act_order": True},
    ),
}


def check_result(w: Tensor, H: Tensor, options: dict, result) -> None:
    """What holds for every result, whatever the mask."""
    N, K = w.shape
    assert result.mask.dtype == torch.bool
    assert not bool(result.w_hat[~result.mask].any())
    removed = (~result.mask).sum(1)
    if "pattern" in options:
        n, m = options["pattern"]
        assert bool((result.mask.view(N, -1, m).sum(2) == n).all())
    elif "mask" in options:
        assert torch.equal(result.mask, options["mask"])
    elif options.get("scope") == "row":
        assert bool((removed == round(options["sparsity"] * K)).all())
    else:
        assert int(removed.sum()) == round(options["sparsity"] * N * K)
    losses = row_losses(w, result.w_hat, H, result.damp)
    torch.testing.assert_close(result.loss.double(), losses, rtol=1e-3, atol=1e-7)
    fmt = options.get("fmt")
    if fmt is None:
        assert (result.codes, result.scales, result.zeros) == (None, None, None)
        assert bool((result.w_hat != 0)[result.mask].all())
        return
    size = fmt.groups(K)
    scales = result.scales.repeat_interleave(size, 1)
    if isinstance(fmt, CodebookFormat):
        assert torch.equal(result.w_hat, scales * fmt.codebook[result.codes.long()])
        return
    zeros = 1 << fmt.bits - 1
    if not fmt.symmetric:
        zeros = result.zeros.float().repeat_interleave(size, 1)
    assert torch.equal(result.w_hat, scales * (result.codes.float() - zeros))


@pytest.mark.parametrize(("N", "K", "options"), CASES.values(), ids=CASES.keys())
def test_options(backend, N, K, options):
    H, w = hessian(K), weight(N, K)
    unit = options.get("pattern", (0, 1))[1]
    factor = factorize_hessian(H.float(), act_order=options.get("act_order", False), unit=unit)
    result = obs_prune(w, factor, **options)
    check_result(w, H, options, result)
    direct = obs_prune(w, H.float(), **options)
    assert torch.equal(direct.w_hat, result.w_hat)
    with llmkern.use_backend("reference"):
        spec = obs_prune(w, factor, **options)
    # A rounding error may turn a near tie, after which the rest of its row differs.
    assert float((result.mask == spec.mask).float().mean()) > 0.99
    torch.testing.assert_close(result.loss.sum(), spec.loss.sum(), rtol=0.01, atol=1e-9)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(backend, data):
    m = data.draw(st.integers(2, 8), label="m")
    groups = data.draw(st.integers(1, 150 // m), label="groups")
    N, K = data.draw(st.integers(1, 70), label="N"), m * groups
    which = data.draw(st.sampled_from(["layer", "row", "pattern", "mask"]), label="which")
    w = weight(N, K)
    options: dict = {"sparsity": data.draw(st.floats(0, 0.999), label="sparsity"), "scope": which}
    if which == "pattern":
        options = {"pattern": (data.draw(st.integers(1, m - 1), label="n"), m)}
    elif which == "mask":
        options = {"mask": torch.rand(N, K) > 0.4}
    if data.draw(st.booleans(), label="rounds"):
        size = data.draw(st.sampled_from([m, K]), label="group_size")
        options["fmt"] = QuantFormat(4, size, data.draw(st.booleans(), label="symmetric"))
    H = hessian(K)
    check_result(w, H, options, obs_prune(w, H.float(), **options))


def test_ties_go_by_column_then_row(backend):
    w = torch.ones(70, 130)
    result = obs_prune(w, torch.eye(130), sparsity=0.5)
    want = torch.ones(70, 130, dtype=torch.bool)
    want[:, :64] = False  # half of the first 128 columns
    want[:, 128] = False
    assert torch.equal(result.mask, want)
    partly = obs_prune(w[:, :3].contiguous(), torch.eye(3), sparsity=100 / 210)
    assert partly.mask.t().flatten().int().tolist() == [0] * 100 + [1] * 110
    row = obs_prune(w[:, :8].contiguous(), torch.eye(8), sparsity=0.25, scope="row")
    assert row.mask.int().unique(dim=0).tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    pattern = obs_prune(w[:, :8].contiguous(), torch.eye(8), pattern=(1, 4))
    assert pattern.mask.int().unique(dim=0).tolist() == [[0, 0, 0, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_weights_that_are_zero_go_first(backend, scope):
    w = weight(40, 128)
    w[:, 1::4] = 0
    result = obs_prune(w, torch.eye(128), sparsity=0.25, scope=scope)
    assert torch.equal(result.mask, w != 0)
    assert torch.equal(result.w_hat, w)
    assert float(result.loss.sum()) == 0


def test_columns_without_input_go_first(backend):
    H, w = hessian(64), weight(5, 64)
    H[[3, 40]] = 0
    H[:, [3, 40]] = 0
    result = obs_prune(w, H.float(), sparsity=2 / 64)
    assert not bool(result.mask[:, [3, 40]].any())
    torch.testing.assert_close(result.loss, torch.zeros(5))


def test_a_given_mask_is_obs_quantize_with_it(backend):
    H, w = hessian(160).float(), weight(20, 160)
    mask = half_mask(w)
    pruned = obs_prune(w, H, mask=mask, fmt=INT4)
    quantized = obs_quantize(w, H, INT4, mask=mask)
    assert torch.equal(pruned.codes, quantized.codes)
    assert torch.equal(pruned.w_hat, quantized.w_hat)


def test_rounding_in_the_same_pass_is_better_than_after(backend):
    H, w = hessian(192), weight(40, 192)
    fmt = QuantFormat(3, 32, False)
    joint = obs_prune(w, H.float(), pattern=(2, 4), fmt=fmt)
    first = obs_prune(w, H.float(), pattern=(2, 4))
    then = obs_quantize(first.w_hat, H.float(), fmt, mask=first.mask)
    ours, after = (float(row_losses(w, q.w_hat, H, 0.01).sum()) for q in (joint, then))
    assert ours < after


def test_the_same_bits_on_any_number_of_threads():
    H, w = hessian(160).float(), weight(600, 160)
    threads = torch.get_num_threads()
    with llmkern.use_backend("cpu"):
        factor = factorize_hessian(H)
        results = []
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append(obs_prune(w, factor, sparsity=0.5, fmt=INT4).w_hat)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*results)
        row = obs_prune(w, factor, sparsity=0.5, scope="row").w_hat
        alone = obs_prune(w[37:38].contiguous(), factor, sparsity=0.5, scope="row").w_hat
        assert torch.equal(row[37:38], alone)


def test_a_batch_is_its_matrices(backend):
    H = torch.stack([hessian(96, seed) for seed in range(3)]).float()
    w = torch.stack([weight(10, 96, seed) for seed in range(3)])
    H[2] = 5.0 - 4 * torch.eye(96)  # indefinite
    for options in ({"sparsity": 0.5}, {"pattern": (2, 4), "fmt": INT4}):
        batch = obs_prune(w, H, **options)
        assert batch.unfactored == (2,)
        for e in range(3):
            single = obs_prune(w[e], H[e], **options)
            assert torch.equal(batch.w_hat[e], single.w_hat)
            assert torch.equal(batch.mask[e], single.mask)
            assert torch.equal(batch.loss[e], single.loss)


def test_a_hessian_that_cannot_be_factored_moves_nothing_and_gives_a_flag(backend):
    w = weight(12, 64)
    result = obs_prune(w, torch.full((64, 64), 5.0) - 4 * torch.eye(64), sparsity=0.5)
    assert not result.factored
    assert torch.equal(result.mask, half_mask(w))
    assert torch.equal(result.w_hat, w * result.mask)


def test_half_precision_weights(backend):
    w, H = weight(8, 128).bfloat16(), hessian(128).float()
    result = obs_prune(w, H, sparsity=0.5, fmt=INT4)
    assert result.scales.dtype == torch.bfloat16
    wide = obs_prune(w.float(), H, sparsity=0.5, fmt=INT4, scale_dtype=torch.bfloat16)
    assert torch.equal(result.codes, wide.codes)


def test_no_rows(backend):
    result = obs_prune(torch.empty(0, 64), torch.eye(64), sparsity=0.5)
    assert result.mask.shape == (0, 64)
    assert result.loss.shape == (0,)


def raw_arguments(N: int = 6, K: int = 40, **changes) -> tuple:
    """Arguments of the torch op, one of them changed."""
    factor = factorize_hessian(hessian(K).float())
    arguments = {
        "w": weight(N, K)[None],
        "U": factor.U[None],
        "d": factor.d[None],
        "mask": None,
        "sparsity": 0.5,
        "kept": 0,
        "size": 0,
        "per_row": False,
        "g_idx": None,
        "codebook": None,
        "scales": None,
        "zeros": None,
        "bits": 4,
        "group_size": 20,
        "symmetric": False,
        "clip_search": False,
        "scale_dtype": torch.float32,
    }
    assert set(changes) <= set(arguments)
    return tuple((arguments | changes).values())


OPCHECKS = {
    "sparsity": {},
    "joint": {"kept": 2, "size": 4, "g_idx": torch.arange(40, dtype=torch.int32)[None] // 20},
    "mask": {"mask": (torch.arange(240) % 3 > 0).view(1, 6, 40)},
}


@pytest.mark.parametrize("changes", OPCHECKS.values(), ids=OPCHECKS.keys())
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(name, changes):
    with llmkern.use_backend(name):
        torch.library.opcheck(torch.ops.llmkern.obs_prune.default, raw_arguments(**changes))


BAD_RAW = {
    "w_axes": ({"w": weight(6, 40)}, r"w: got float32 \[6, 40\]"),
    "mask_dtype": ({"mask": torch.ones(1, 6, 40)}, "mask: got float32"),
    "sparsity": ({"sparsity": 1.0}, "sparsity: got 1.0"),
    "pattern": ({"kept": 4, "size": 4}, "pattern: got 4:4"),
    "divides": ({"kept": 2, "size": 7}, "pattern: got 2:7 for K = 40"),
    "group": (
        {"kept": 2, "size": 8, "g_idx": torch.arange(40, dtype=torch.int32)[None] // 20},
        "group_size: got 20 with dynamic scales, expected a multiple of 8",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_RAW.values(), ids=BAD_RAW.keys())
def test_the_op_refuses_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.llmkern.obs_prune(*raw_arguments(**changes))


EYE, W = torch.eye(64), weight(2, 64)
BAD = {
    "none": (W, EYE, {}, "sparsity, pattern, mask: got none"),
    "two": (W, EYE, {"sparsity": 0.5, "pattern": (2, 4)}, "got sparsity and pattern"),
    "sparsity": (W, EYE, {"sparsity": 1.0}, r"sparsity: got 1.0, expected a fraction in \[0, 1\)"),
    "sparsity_nan": (W, EYE, {"sparsity": float("nan")}, "sparsity: got nan"),
    "negative": (W, EYE, {"sparsity": -0.1}, "sparsity: got -0.1"),
    "pattern": (W, EYE, {"pattern": (4, 4)}, "pattern: got 4:4, expected n:m with 0 < n < m <= 8"),
    "pattern_0": (W, EYE, {"pattern": (0, 4)}, "pattern: got 0:4"),
    "pattern_16": (W, EYE, {"pattern": (8, 16)}, "pattern: got 8:16"),
    "divides": (W, EYE, {"pattern": (2, 6)}, "pattern: got 2:6 for K = 64"),
    "scope": (W, EYE, {"sparsity": 0.5, "scope": "model"}, "scope: got 'model'"),
    "mask_dtype": (W, EYE, {"mask": torch.ones(2, 64)}, "mask: got float32"),
    "mask_shape": (W, EYE, {"mask": torch.ones(64, dtype=torch.bool)}, "mask: got bool"),
    "w_nan": (W * float("nan"), EYE, {"sparsity": 0.5}, "w: got NaN or Inf"),
    "h_nan": (W, EYE * float("nan"), {"sparsity": 0.5}, "H: got NaN or Inf"),
    "h_small": (W, torch.eye(32), {"sparsity": 0.5}, r"H: got \[32, 32\], expected \[64, 64\]"),
    "order": (
        W,
        factorize_hessian(hessian(64).float(), act_order=True),
        {"pattern": (2, 4)},
        "H: got a factor whose act-order splits groups of 4",
    ),
    "dynamic_act_order": (
        W,
        EYE,
        {"sparsity": 0.5, "fmt": INT4, "act_order": True},
        "got 'dynamic' with act-order",
    ),
    "group": (W, EYE, {"pattern": (3, 8), "fmt": QuantFormat(4, 4)}, "group_size: got 4"),
    "book": (
        W,
        EYE,
        {"sparsity": 0.5, "fmt": CodebookFormat(torch.arange(1.0, 17), 32)},
        "codebook: got a book without 0",
    ),
}


@pytest.mark.parametrize(("w", "H", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(w, H, options, message):
    with pytest.raises(ValueError, match=message):
        obs_prune(w, H, **options)

"""obs_quantize's CUDA block kernel in the emulator, under the shared loop over blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern import ops, use_backend
from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import NF4_CODEBOOK, CodebookFormat, LutFormat

N, K = 70, 288  # a CTA has 32 rows; blocks of 128, 128 and 32 columns
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# format, options
CASES = {
    "dynamic_g32": (QuantFormat(4, 32), {"scale_dtype": FP32}),
    "dynamic_zeros_bf16_scales": (QuantFormat(4, 96, False), {"scale_dtype": BF16}),
    "groups_that_128_does_not_hold_evenly": (QuantFormat(4, 24, False), {"scale_dtype": FP16}),
    "group_narrower_than_a_panel": (QuantFormat(3, 4, False), {"scale_dtype": FP32}),
    "group_wider_than_a_block": (QuantFormat(4, 144, False), {"scale_dtype": FP32}),
    "per_channel": (QuantFormat(8, None), {"scale_dtype": FP32}),
    "static_act_order": (
        QuantFormat(4, 32, False),
        {"group_scales": "static", "act_order": True, "scale_dtype": FP16},
    ),
    "static_straddles_blocks": (QuantFormat(2, 96), {"group_scales": "static"}),
    "clip_search": (QuantFormat(3, 48), {"clip_search": True, "scale_dtype": FP16}),
    "clip_search_zeros": (QuantFormat(2, 32, False), {"clip_search": True, "scale_dtype": BF16}),
}


def problem():
    """A weight and a Hessian of correlated inputs, one of which never fires."""
    w = torch.randn(N, K)
    x = torch.randn(600, K) @ (torch.eye(K) + 0.3 * torch.randn(K, K) / K**0.5)
    x[:, 11] = 0
    return w, 2 / 600 * x.t() @ x


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_codes_equal_the_references(case, both_orders):
    """...and every value that comes with them."""
    fmt, options = case
    w, H = problem()

    def run():
        result = ops.obs_quantize(w, H, fmt, **options)
        zeros = (
            torch.full_like(result.scales, 1 << (fmt.bits - 1))
            if result.zeros is None
            else result.zeros
        )
        return result.codes, result.scales, zeros, result.w_hat, result.loss

    codes, scales, zeros, w_hat, loss = both_orders(run)
    with use_backend("reference"):
        want = ops.obs_quantize(w, H, fmt, **options)
    # Sums in another order turn an occasional near tie, and then what follows in that row.
    same = (codes == want.codes).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(loss.sum(), want.loss.sum(), rtol=1e-3, atol=0)
    torch.testing.assert_close(loss[same], want.loss[same], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(scales[same], want.scales[same], rtol=0.01, atol=0)
    grouped = codes.view(N, -1, fmt.groups(K)).float() - zeros.float()[..., None]
    assert torch.equal(w_hat, (scales.float()[..., None] * grouped).view(N, K))


# format, options
BOOKS = {
    "nf4": (LutFormat("nf4", 32), {}),
    "fp4_clip_search": (LutFormat("fp4", 32), {"clip_search": True}),
    "a_book_per_row_without_scales": (
        CodebookFormat(torch.linspace(-2.5, 2.5, 16).expand(N, 16).contiguous(), None, False),
        {},
    ),
    "static_act_order": (
        CodebookFormat(NF4_CODEBOOK, 48),
        {"group_scales": "static", "act_order": True},
    ),
    "integers_and_a_mask": (QuantFormat(4, 32, False), {"mask": torch.arange(N * K) % 3 > 0}),
    "nf4_and_a_mask": (CodebookFormat(NF4_CODEBOOK, 144), {"mask": torch.arange(N * K) % 7 > 2}),
}


@pytest.mark.parametrize("case", BOOKS.values(), ids=BOOKS)
def test_books_and_masks_equal_the_references(case, both_orders):
    fmt, options = case
    options = {key: t.view(N, K) if key == "mask" else t for key, t in options.items()}
    w, H = problem()

    def run():
        result = ops.obs_quantize(w, H, fmt, **options)
        return result.codes, result.w_hat, result.loss

    codes, w_hat, loss = both_orders(run)
    with use_backend("reference"):
        want = ops.obs_quantize(w, H, fmt, **options)
    same = (codes == want.codes).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(loss[same], want.loss[same], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(w_hat[same], want.w_hat[same], rtol=1e-5, atol=1e-6)
    if "mask" in options:
        assert not w_hat[~options["mask"]].any()


@pytest.mark.parametrize("rows", [1, 32, 33])
def test_rows_do_not_depend_on_their_neighbours(rows, emulator):
    w, H = problem()
    w, H = w[:, :128].contiguous(), H[:128, :128].contiguous()  # one block: no matrix product
    whole = ops.obs_quantize(w, H, QuantFormat(4, 128))
    part = ops.obs_quantize(w[:rows], H, QuantFormat(4, 128))
    assert torch.equal(part.codes, whole.codes[:rows])
    assert torch.equal(part.loss, whole.loss[:rows])


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(data, emulator):
    rows = data.draw(st.integers(1, 70), "N")
    group_size = data.draw(st.integers(1, 150), "group_size")
    columns = group_size * data.draw(st.integers(1, max(1, 200 // group_size)), "groups")
    fmt = QuantFormat(data.draw(st.sampled_from([2, 3, 4, 8]), "bits"), group_size, False)
    scales = data.draw(st.sampled_from(["static", "dynamic"]), "group_scales")
    w, x = torch.randn(rows, columns), torch.randn(2 * columns, columns)
    H = x.t() @ x / columns
    result = ops.obs_quantize(w, H, fmt, group_scales=scales)
    with use_backend("reference"):
        want = ops.obs_quantize(w, H, fmt, group_scales=scales)
    same = (result.codes == want.codes).all(1)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(result.loss[same], want.loss[same], rtol=1e-3, atol=1e-6)

"""lut4_gemm's CUDA kernels in the emulator: every tier, book and scale type, and their tails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern import ops
from llmkern.formats.lut4_cpu import to_cpu_layout
from llmkern.reference.lut4_gemm import dequantize_lut4
from llmkern.testing import assert_matches, random_lut4_weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
dtypes = pytest.mark.parametrize(
    "dtype", [F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch.")
)
# M, N, K, group size, book, scale dtype
CASES = {
    "m1_lanes_without_work": (1, 9, 96, 32, "nf4", F32),
    "m1_k_loop_runs_twice": (1, 5, 1056, 96, "group", F16),
    "m2_n_odd": (2, 37, 128, 128, "row", BF16),
    "m3_no_scales": (3, 8, 64, 32, "nf4", None),
    "m8_one_column": (8, 1, 64, 64, "group", None),
    "m9_first_of_the_tiles": (9, 65, 64, 32, "nf4", F16),
    "m17_book_per_row": (17, 70, 96, 96, "row", None),
    "m20_book_per_group": (20, 66, 224, 32, "group", BF16),
    "m33_long_k": (33, 40, 1056, 96, "nf4", F32),
    "m50_long_groups": (50, 30, 512, 256, "group", F32),
    "m130_three_row_tiles": (130, 70, 96, 32, "row", BF16),
}


@dtypes
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, dtype, both_orders, guarded):
    M, N, K, group_size, book, scale_dtype = case
    weight = tuple(
        map(guarded, random_lut4_weight(N, K, group_size, book=book, scale_dtype=scale_dtype))
    )
    x, bias = guarded(torch.randn(M, K).to(dtype)), guarded(torch.randn(N).to(dtype))
    out = both_orders(lambda: ops.lut4_gemm(x, *weight, bias, group_size=group_size))
    w = dequantize_lut4(*weight, group_size, torch.float64)
    assert_matches(out, x.double() @ w.t() + bias.double(), F.linear(x, w.to(dtype), bias), slack=4)


@dtypes
@pytest.mark.parametrize("rows", [1, 3, 16, 32, 64])
@pytest.mark.parametrize("book", ["nf4", "row", "group"])
def test_unit_vectors_return_the_weight_bit_for_bit(book, rows, dtype, emulator):
    qweight, codebook, scales = random_lut4_weight(70, 96, 32, book=book, scale_dtype=F32)
    codebook = codebook.to(dtype).float()  # so that nothing but the result is rounded
    eye = torch.eye(96, dtype=dtype)
    out = [ops.lut4_gemm(x, qweight, codebook, scales, group_size=32) for x in eye.split(rows)]
    want = dequantize_lut4(qweight, codebook, scales, 32, F32).to(dtype)
    assert torch.equal(torch.cat(out).t(), want)


@pytest.mark.parametrize("M", [9, 40])
def test_a_row_depends_on_no_other(M, emulator):
    weight = random_lut4_weight(70, 160, 32)
    x = torch.randn(100, 160, dtype=BF16)
    spec = ops.lut4_gemm(x, *weight, group_size=32)
    x[M:] = float("nan")
    assert torch.equal(ops.lut4_gemm(x, *weight, group_size=32)[:M], spec[:M])
    assert torch.equal(ops.lut4_gemm(x[:M], *weight, group_size=32), spec[:M])


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 21)], ids=["gemv", "tiles"])
@pytest.mark.parametrize(("start", "stride"), [(0, 100), (0, 104), (1, 104)], ids=str)
def test_x_that_is_strided_or_off_its_alignment(start, stride, rows, emulator):
    weight = random_lut4_weight(12, 96, 32)
    x = torch.randn(21, stride, dtype=BF16)[rows, start : start + 96]
    out = ops.lut4_gemm(x, *weight, group_size=32)
    assert torch.equal(out, ops.lut4_gemm(x.contiguous(), *weight, group_size=32))


def test_no_columns_leave_the_bias(emulator):
    bias = torch.randn(4, dtype=BF16)
    for M in (2, 20):
        for codebook in (torch.zeros(16), torch.zeros(4, 16), torch.zeros(4, 0, 16)):
            weight = torch.empty(4, 0, dtype=torch.int32), codebook, torch.empty(4, 0)
            y = ops.lut4_gemm(torch.empty(M, 0, dtype=BF16), *weight, bias, group_size=32)
            assert torch.equal(y, bias.expand(M, 4))


def test_what_the_kernels_cannot_read_is_refused(emulator):
    qweight, codebook, scales = random_lut4_weight(12, 96, 32)
    x = torch.randn(1, 96)
    shifted = torch.cat([torch.zeros(1, dtype=torch.int32), qweight.flatten()])[1:].view(12, 12)
    with pytest.raises(NotImplementedError, match="qweight is not 16-byte aligned"):
        ops.lut4_gemm(x, shifted, codebook, scales, group_size=32)
    packed = to_cpu_layout(qweight)
    with pytest.raises(NotImplementedError, match="the weight is in the cpu layout"):
        ops.lut4_gemm(x, packed, codebook, scales, group_size=32, layout="cpu")


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(data, emulator):
    M, N = data.draw(st.integers(1, 40), "M"), data.draw(st.integers(32, 110), "N")
    group_size = 32 * data.draw(st.integers(1, 4), "group_size / 32")
    K = group_size * data.draw(st.integers(1, 4), "groups")
    dtype = data.draw(st.sampled_from([F32, BF16, F16]), "dtype")
    weight = random_lut4_weight(
        N,
        K,
        group_size,
        book=data.draw(st.sampled_from(["nf4", "row", "group"]), "book"),
        scale_dtype=data.draw(st.sampled_from([None, F32, BF16, F16]), "scale_dtype"),
    )
    x = torch.randn(M, K).to(dtype)
    out = ops.lut4_gemm(x, *weight, group_size=group_size)
    w = dequantize_lut4(*weight, group_size, torch.float64)
    # Of so few sums, torch's largest error is a matter of luck: 4 instead of 2.
    assert_matches(out, x.double() @ w.t(), F.linear(x, w.to(dtype)), slack=4)

"""w4a16_gemm's CUDA kernels in the emulator: both tiers, their tails, and every form of the weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern import ops, reference
from llmkern.reference import w4a16_gemm as spec
from llmkern.testing import assert_matches, random_int4_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, N, K, group size, symmetric, scale dtype
CASES = {
    "m1_lanes_without_work": (1, 9, 96, 32, True, torch.float32),
    "m1_k_loop_runs_twice": (1, 5, 1056, 96, False, torch.float16),
    "m2_n_odd": (2, 37, 128, 128, False, torch.bfloat16),
    "m3_row_tail": (3, 8, 64, 32, False, torch.float32),
    "m8_one_column": (8, 1, 64, 64, True, torch.float32),
    "m9_first_of_the_tiles": (9, 65, 64, 32, False, torch.float16),
    "m33_long_k": (33, 20, 2048, 128, True, torch.float32),
    "m130_three_row_tiles": (130, 70, 96, 96, True, torch.bfloat16),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, dtype, both_orders, guarded):
    M, N, K, group_size, symmetric, scale_dtype = case
    qweight, scales, zeros = map(
        guarded,
        random_int4_weight(N, K, group_size, symmetric=symmetric, scale_dtype=scale_dtype),
    )
    x, bias = guarded(torch.randn(M, K).to(dtype)), guarded(torch.randn(N).to(dtype))
    out = both_orders(
        lambda: ops.w4a16_gemm(x, qweight, scales, zeros, bias, group_size=group_size)
    )
    want = spec.w4a16_gemm(x.double(), qweight, scales, zeros, bias, group_size)
    w = spec.dequantize_int4(qweight, scales, zeros, group_size, dtype)
    assert_matches(out, want, F.linear(x, w, bias))


@pytest.mark.parametrize("M", [2, 20])
@pytest.mark.parametrize("stride", [100, 104], ids=["odd_stride", "vector_stride"])
def test_rows_of_x_lie_apart(M, stride, emulator):
    qweight, scales, zeros = random_int4_weight(12, 96, 32)
    x = torch.randn(M, stride, dtype=torch.bfloat16)[:, :96]
    out = ops.w4a16_gemm(x, qweight, scales, zeros, group_size=32)
    assert torch.equal(out, ops.w4a16_gemm(x.contiguous(), qweight, scales, group_size=32))


@pytest.mark.parametrize("M", [2, 20])
def test_x_off_its_alignment(M, emulator):
    qweight, scales, zeros = random_int4_weight(12, 96, 32)
    storage = torch.randn(M * 96 + 1)
    x = storage[1:].view(M, 96)
    assert x.data_ptr() % 16
    out = ops.w4a16_gemm(x, qweight, scales, zeros, group_size=32)
    assert torch.equal(out, ops.w4a16_gemm(x.clone(), qweight, scales, group_size=32))


def test_misaligned_qweight_is_refused(emulator):
    qweight, scales, _ = random_int4_weight(12, 96, 32)
    shifted = torch.cat([torch.zeros(1, dtype=torch.int32), qweight.flatten()])[1:].view(12, 12)
    with pytest.raises(NotImplementedError, match="qweight is not 16-byte aligned"):
        ops.w4a16_gemm(torch.randn(1, 96), shifted, scales, group_size=32)


def test_gradient_reaches_x(emulator):
    qweight, scales, zeros = random_int4_weight(12, 96, 32, symmetric=False)
    x = torch.randn(3, 96, requires_grad=True)
    ops.w4a16_gemm(x, qweight, scales, zeros, group_size=32).sum().backward()
    w = reference.w4a16_gemm.dequantize_int4(qweight, scales, zeros, 32, torch.float32)
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, -1))


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(data, emulator):
    M, N = data.draw(st.integers(1, 40), "M"), data.draw(st.integers(1, 70), "N")
    group_size = 32 * data.draw(st.integers(1, 4), "group_size / 32")
    K = group_size * data.draw(st.integers(1, 4), "groups")
    stride = K + data.draw(st.integers(0, 9), "x stride - K")
    parts = random_int4_weight(N, K, group_size, symmetric=data.draw(st.booleans(), "symmetric"))
    x = torch.randn(M, stride)[:, :K]
    out = ops.w4a16_gemm(x, *parts, group_size=group_size)
    want = spec.w4a16_gemm(x.double(), *parts, None, group_size)
    w = spec.dequantize_int4(*parts, group_size, torch.float32)
    # Of so few sums, torch's largest error is a matter of luck: 4 instead of 2.
    assert_matches(out, want, F.linear(x, w), slack=4)

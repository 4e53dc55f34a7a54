"""w4a16_gemm and lut4_gemm over the canonical layout in the emulator: both tiers and their tails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkern import ops
from llmkern.formats.lut4_cpu import to_cpu_layout
from llmkern.testing import CANONICAL_CASES, CodeCase, random_int4_weight, random_lut4_weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
dtypes = pytest.mark.parametrize(
    "dtype", [F32, BF16, F16], ids=lambda d: str(d).removeprefix("torch.")
)
kinds = pytest.mark.parametrize("values", ["zeros", "nf4", "row", "group"])


@dtypes
@pytest.mark.parametrize("case", CANONICAL_CASES.values(), ids=CANONICAL_CASES)
def test_values(case, dtype, both_orders, guarded):
    weight = tuple(map(guarded, case.weight()))
    x, bias = guarded(torch.randn(case.M, case.K).to(dtype)), guarded(torch.randn(case.N).to(dtype))
    out = both_orders(lambda: case.multiply(x, weight, bias))
    case.check(out, x, weight, bias, slack=2)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("rows", [1, 3, 16])
@kinds
def test_unit_vectors_return_the_weight_bit_for_bit(values, rows, dtype, emulator):
    case = CodeCase(rows, 70, 96, 32, values)
    weight = case.weight()
    eye = torch.eye(96, dtype=dtype)
    out = torch.cat([case.multiply(x, weight) for x in eye.split(rows)])
    assert torch.equal(out.t(), case.dense(weight, dtype))


@kinds
@pytest.mark.parametrize("M", [9, 40])
def test_a_row_depends_on_no_other(M, values, emulator):
    case = CodeCase(100, 70, 160, 32, values)
    weight, x = case.weight(), torch.randn(100, 160).bfloat16()
    want = case.multiply(x, weight)
    x[M:] = float("nan")
    assert torch.equal(case.multiply(x, weight)[:M], want[:M])
    assert torch.equal(case.multiply(x[:M], weight), want[:M])


@kinds
@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 21)], ids=["gemv", "tiles"])
@pytest.mark.parametrize(("start", "stride"), [(0, 100), (0, 104), (1, 104)], ids=str)
def test_x_that_is_strided_or_off_its_alignment(start, stride, rows, values, emulator):
    case = CodeCase(21, 12, 96, 32, values)
    weight = case.weight()
    x = torch.randn(21, stride).bfloat16()[rows, start : start + 96]
    assert torch.equal(case.multiply(x, weight), case.multiply(x.contiguous(), weight))


def test_no_columns_leave_the_bias(emulator):
    bias = torch.randn(4, dtype=BF16)
    for M in (2, 20):
        for codebook in (torch.zeros(16), torch.zeros(4, 16), torch.zeros(4, 0, 16)):
            weight = torch.empty(4, 0, dtype=torch.int32), codebook, torch.empty(4, 0)
            y = ops.lut4_gemm(torch.empty(M, 0, dtype=BF16), *weight, bias, group_size=32)
            assert torch.equal(y, bias.expand(M, 4))


def test_what_the_kernels_cannot_read_is_refused(emulator):
    x = torch.randn(1, 96)
    qweight, codebook, scales = random_lut4_weight(12, 96, 32)
    shifted = torch.cat([torch.zeros(1, dtype=torch.int32), qweight.flatten()])[1:].view(12, 12)
    with pytest.raises(NotImplementedError, match="qweight is not 16-byte aligned"):
        ops.lut4_gemm(x, shifted, codebook, scales, group_size=32)
    with pytest.raises(NotImplementedError, match="qweight is not 16-byte aligned"):
        ops.w4a16_gemm(x, shifted, scales, group_size=32)
    packed = to_cpu_layout(qweight)
    with pytest.raises(NotImplementedError, match="the weight is in the cpu layout"):
        ops.lut4_gemm(x, packed, codebook, scales, group_size=32, layout="cpu")


def test_gradient_reaches_x(emulator):
    weight = random_int4_weight(12, 96, 32, symmetric=False)
    x = torch.randn(3, 96, requires_grad=True)
    ops.w4a16_gemm(x, *weight, group_size=32).sum().backward()
    w = CodeCase(3, 12, 96, 32, "zeros").dense(weight, F32)
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, -1))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(data, emulator):
    M, N = data.draw(st.integers(1, 40), "M"), data.draw(st.integers(32, 110), "N")
    group_size = 32 * data.draw(st.integers(1, 4), "group_size / 32")
    K = group_size * data.draw(st.integers(1, 4), "groups")
    values = data.draw(st.sampled_from(["symmetric", "zeros", "nf4", "row", "group"]), "values")
    scale_dtype = data.draw(st.sampled_from([F32, BF16, F16]), "scale_dtype")
    dtype = data.draw(st.sampled_from([F32, BF16, F16]), "dtype")
    stride = K + data.draw(st.integers(0, 9), "x stride - K")
    case = CodeCase(M, N, K, group_size, values, scale_dtype)
    weight, x = case.weight(), torch.randn(M, stride).to(dtype)[:, :K]
    # Of so few sums, torch's largest error is a matter of luck: 4 instead of 2.
    case.check(case.multiply(x, weight), x, weight, None, slack=4)

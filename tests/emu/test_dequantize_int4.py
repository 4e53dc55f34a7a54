"""dequantize_int4's CUDA kernel in the emulator; one rounding, so equal bits."""

from __future__ import annotations

import pytest
import torch

from llmkern import ops
from llmkern.reference.w4a16_gemm import dequantize_int4 as spec
from llmkern.testing import random_int4_weight

# N, K, group size, symmetric, scale dtype
CASES = {
    "row_shorter_than_a_cta": (37, 96, 32, False, torch.float32),
    "row_longer_than_a_cta": (3, 2080, 160, True, torch.bfloat16),
    "one_group": (9, 64, 64, False, torch.float16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bits(case, dtype, both_orders, guarded):
    N, K, group_size, symmetric, scale_dtype = case
    weight = map(
        guarded,
        random_int4_weight(N, K, group_size, symmetric=symmetric, scale_dtype=scale_dtype),
    )
    qweight, scales, zeros = weight
    out = both_orders(
        lambda: ops.dequantize_int4(qweight, scales, zeros, group_size=group_size, dtype=dtype)
    )
    assert torch.equal(out, spec(qweight, scales, zeros, group_size, dtype))


def test_no_rows_launch_nothing(emulator):
    qweight, scales = torch.empty(0, 8, dtype=torch.int32), torch.empty(0, 2)
    assert ops.dequantize_int4(qweight, scales, group_size=32).shape == (0, 64)


def test_other_layouts_are_refused(emulator):
    scales = torch.rand(2, 64)
    qweight = torch.zeros(1, 64 * 32, dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match="the weight is in the cpu layout"):
        ops.dequantize_int4(qweight, scales, group_size=32, layout="cpu")

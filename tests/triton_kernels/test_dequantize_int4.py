"""The Triton kernel of dequantize_int4; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern.formats.int4 import pack_codes, pack_zeros
from llmkern.ops import dequantize_int4
from llmkern.reference.w4a16_gemm import dequantize_int4 as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "group_size", "symmetric"),
    [
        pytest.param(5, 32, 32, True, id="one_group_of_32"),
        pytest.param(131, 192, 96, False, id="n_tail_group_not_a_power_of_two"),
        pytest.param(33, 256, 128, False, id="n_tail_group_128"),
        pytest.param(3, 1280, 1280, True, id="one_group_per_row"),
    ],
)
def test_equals_the_reference_bit_for_bit(
    N: int,
    K: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
) -> None:
    qweight = pack_codes(torch.randint(0, 16, (N, K), dtype=torch.uint8), 4).to(DEVICE)
    scales = (torch.randn(N, K // group_size) * 0.1).to(DEVICE, scale_dtype)
    zeros = torch.randint(0, 16, (N, K // group_size), dtype=torch.uint8)
    packed = None if symmetric else pack_zeros(zeros, 4).to(DEVICE)
    with llmkern.use_backend("triton"):
        w = dequantize_int4(qweight, scales, packed, group_size=group_size, dtype=dtype)
    assert torch.equal(w, reference(qweight, scales, packed, group_size, dtype))


def test_the_cpu_layout_is_refused_with_a_reason() -> None:
    packed, scales = torch.zeros(1, 1024, dtype=torch.uint8), torch.ones(1, 16)
    with llmkern.use_backend("triton"), pytest.raises(NotImplementedError, match="cpu layout"):
        dequantize_int4(packed, scales, group_size=32, layout="cpu")

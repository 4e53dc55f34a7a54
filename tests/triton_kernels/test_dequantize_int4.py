"""The Triton kernel of dequantize_int4; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern.ops import dequantize_int4
from llmkern.reference.w4a16_gemm import dequantize_int4 as reference
from llmkern.testing import random_int4_weight

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
    weight = random_int4_weight(N, K, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    weight = tuple(None if t is None else t.to(DEVICE) for t in weight)
    with llmkern.use_backend("triton"):
        w = dequantize_int4(*weight, group_size=group_size, dtype=dtype)
    assert torch.equal(w, reference(*weight, group_size, dtype))


def test_the_cpu_layout_is_refused_with_a_reason() -> None:
    packed, scales = torch.zeros(1, 1024, dtype=torch.uint8), torch.ones(1, 16)
    with llmkern.use_backend("triton"), pytest.raises(NotImplementedError, match="cpu layout"):
        dequantize_int4(packed, scales, group_size=32, layout="cpu")

"""dequantize_sparse24: exact in every layout and dtype, for floats and for codes."""

import pytest
import torch

from llmkern.formats import sparse24_cpu, sparse24_cuda
from llmkern.formats.int4 import unpack_codes, unpack_zeros
from llmkern.formats.sparse24 import decompress, mask_of
from llmkern.ops import dequantize_sparse24
from llmkern.testing import random_sparse24_int4_weight, random_sparse24_weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CONVERT = {
    "canonical": (lambda *weight: weight, lambda *weight: weight[:-1]),
    "cpu": (sparse24_cpu.to_cpu_layout, sparse24_cpu.int4_to_cpu_layout),
    "cuda": (sparse24_cuda.to_cuda_layout, sparse24_cuda.int4_to_cuda_layout),
}


@pytest.mark.parametrize("layout", CONVERT)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_floats_are_exact(layout, dtype):
    weight = random_sparse24_weight(48, 96, dtype)
    w = dequantize_sparse24(*CONVERT[layout][0](*weight), dtype=dtype, layout=layout)
    assert w.dtype == dtype
    assert torch.equal(w, decompress(*weight))


@pytest.mark.parametrize("layout", CONVERT)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_codes_are_scaled_and_rounded_once(layout, symmetric, dtype):
    weight = random_sparse24_int4_weight(48, 192, 64, symmetric=symmetric, scale_dtype=BF16)
    qvalues, meta, scales, zeros = weight
    codes = torch.zeros(48, 192)
    codes[mask_of(meta)] = unpack_codes(qvalues, 4, 96).float().view(-1)
    point = 8.0 if zeros is None else unpack_zeros(zeros, 4, 48).float().repeat_interleave(64, 1)
    spec = (codes - point) * scales.float().repeat_interleave(64, 1) * mask_of(meta)
    kernel = CONVERT[layout][1](*weight, 64)
    w = dequantize_sparse24(*kernel, group_size=64, dtype=dtype, layout=layout)
    assert torch.equal(w, spec.to(dtype))


@pytest.mark.parametrize("scales", [True, False])
def test_opcheck(scales):
    op = torch.ops.llmkern.dequantize_sparse24.default
    if scales:
        weight = random_sparse24_int4_weight(16, 64, 32, symmetric=False)
        torch.library.opcheck(op, (*weight, 32, "canonical", BF16))
    else:
        weight = random_sparse24_weight(16, 64, F32)
        torch.library.opcheck(op, (*weight, None, None, 0, "canonical", F16))


def test_bad_input_is_refused():
    values, meta = random_sparse24_weight(16, 64, F32)
    with pytest.raises(ValueError, match=r"dequantize_sparse24: dtype: got torch\.float64"):
        dequantize_sparse24(values, meta, dtype=torch.float64)
    with pytest.raises(ValueError, match="dequantize_sparse24: group_size: got 0"):
        dequantize_sparse24(values, meta, torch.ones(16, 2))
    with pytest.raises(ValueError, match="dequantize_sparse24: layout: got 'marlin'"):
        dequantize_sparse24(values, meta, layout="marlin")

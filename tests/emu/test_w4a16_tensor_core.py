"""w4a16_gemm over the CUDA layout in the emulator: every tier, on sm_80 and sm_90."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

from llmkern import _backends, ops
from llmkern.formats.int4_cuda import to_cuda_layout
from llmkern.nn import Int4Linear
from llmkern.ops import _w4a16_config
from llmkern.ops._w4a16_config import select_config
from llmkern.reference import w4a16_gemm as spec
from llmkern.testing import (
    CUDA_LAYOUT_CASES,
    assert_matches,
    random_int4_weight,
    relative_error,
)

HALVES = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=[80, 90], ids=["sm80", "sm90"])
def sm(request, emulator, monkeypatch):
    monkeypatch.setattr(_backends, "cuda_capability", lambda device: request.param)
    return request.param


def multiply(x, packed, bias, group_size):
    return ops.w4a16_gemm(x, *packed, bias, group_size=group_size, layout="cuda")


@halves
@pytest.mark.parametrize("case", CUDA_LAYOUT_CASES.values(), ids=CUDA_LAYOUT_CASES)
def test_values(case, dtype, sm, both_orders, guarded):
    M, N, K, group_size, symmetric, scale_dtype = case
    parts = random_int4_weight(N, K, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    qweight, shape, _ = to_cuda_layout(*parts, group_size)
    packed = guarded(qweight), shape, None
    x, bias = guarded(torch.randn(M, K).to(dtype)), guarded(torch.randn(N).to(dtype))
    out = both_orders(lambda: multiply(x, packed, bias, group_size))
    want = spec.w4a16_gemm(x.double(), *parts, bias, group_size)
    w = spec.dequantize_int4(*parts, group_size, dtype)
    # Of so few sums, torch's largest error is a matter of luck: 4 instead of 2.
    assert_matches(out, want, F.linear(x, w, bias), slack=4)


@pytest.mark.parametrize("case", CUDA_LAYOUT_CASES.values(), ids=CUDA_LAYOUT_CASES)
def test_dequantize_returns_the_same_bits(case, both_orders, guarded):
    _, N, K, group_size, symmetric, scale_dtype = case
    parts = random_int4_weight(N, K, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    qweight, shape, _ = to_cuda_layout(*parts, group_size)
    qweight = guarded(qweight)
    for dtype in (torch.float32, *HALVES):
        out = both_orders(
            lambda dtype=dtype: ops.dequantize_int4(
                qweight, shape, group_size=group_size, dtype=dtype, layout="cuda"
            )
        )
        assert torch.equal(out, spec.dequantize_int4(*parts, group_size, dtype))


@halves
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_unit_vectors_return_the_weight_bit_for_bit(rows, dtype, sm):
    parts = random_int4_weight(70, 192, 64, symmetric=False, scale_dtype=torch.float32)
    packed = to_cuda_layout(*parts, 64)
    eye = torch.eye(192, dtype=dtype)
    out = torch.cat([multiply(x, packed, None, 64) for x in eye.split(rows)])
    assert torch.equal(out.t(), spec.dequantize_int4(*parts, 64, dtype))


@halves
def test_a_row_depends_on_no_other(dtype, sm):
    parts = random_int4_weight(64, 1152, 128, symmetric=False)
    packed = to_cuda_layout(*parts, 128)
    x = torch.randn(80, 1152).to(dtype)
    assert select_config(1, 64, 1152, 128, sm).split == 2
    whole = multiply(x[:32], packed, None, 128)
    for rows in (slice(0, 1), slice(5, 13), slice(7, 20)):
        assert torch.equal(multiply(x[rows], packed, None, 128), whole[rows])
    tiles = multiply(x, packed, None, 128)
    assert torch.equal(multiply(x[20:60], packed, None, 128), tiles[20:60])


@halves
@pytest.mark.parametrize("M", [4, 40], ids=["decode", "tile"])
def test_error_is_below_that_of_torch_on_the_rounded_weight(M, dtype, sm):
    errors = []
    for _ in range(3):
        parts = random_int4_weight(96, 640, 64, symmetric=False)
        x = torch.randn(M, 640).to(dtype)
        out = multiply(x, to_cuda_layout(*parts, 64), None, 64)
        want = spec.w4a16_gemm(x.double(), *parts, None, 64)
        like = F.linear(x, spec.dequantize_int4(*parts, 64, dtype))
        errors.append((relative_error(out, want), relative_error(like, want)))
    ours, torchs = torch.tensor(errors).mean(0).tolist()
    assert ours < torchs


def test_nan_in_x_stays_in_its_row(sm):
    packed = to_cuda_layout(*random_int4_weight(64, 160, 32), 32)
    x = torch.randn(5, 160).bfloat16()
    clean = multiply(x, packed, None, 32)
    x[2, 7] = float("nan")
    out = multiply(x, packed, None, 32)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("stride", [163, 168], ids=["odd_stride", "vector_stride"])
def test_rows_of_x_lie_apart(stride, sm):
    packed = to_cuda_layout(*random_int4_weight(64, 160, 32), 32)
    x = torch.randn(5, stride).bfloat16()[:, :160]
    assert torch.equal(multiply(x, packed, None, 32), multiply(x.contiguous(), packed, None, 32))


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_tier(dtype, bias, emulator, monkeypatch):
    monkeypatch.setattr(_w4a16_config, "DENSE_ROWS", 4)
    monkeypatch.setattr(sys.modules["llmkern.ops.w4a16_gemm"], "DENSE_BYTES", 64 * 96 * 2)
    parts = random_int4_weight(150, 96, 32, symmetric=False)
    x, bias = torch.randn(5, 96).to(dtype), torch.randn(150).to(dtype) if bias else None
    out = multiply(x, to_cuda_layout(*parts, 32), bias, 32)
    want = spec.w4a16_gemm(x.double(), *parts, bias, 32)
    assert_matches(out, want, F.linear(x, spec.dequantize_int4(*parts, 32, dtype), bias))


def test_opcheck(emulator):
    packed = to_cuda_layout(*random_int4_weight(70, 96, 32, symmetric=False), 32)
    x = torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(70, dtype=torch.bfloat16, requires_grad=True)
    op = torch.ops.llmkern.w4a16_gemm.default
    torch.library.opcheck(op, (x, *packed, bias, 32, "cuda", "float"))


@pytest.mark.parametrize("name", ["qweight", "zeros"])
def test_bad_weight_is_refused(name, emulator):
    qweight, shape, _ = to_cuda_layout(*random_int4_weight(70, 96, 32), 32)
    weight = {"qweight": qweight, "scales": shape, "zeros": None}
    weight[name] = torch.zeros(2, 1, 4096, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"w4a16_gemm: {name}: got uint8 \[2, 1, 4096\]"):
        ops.w4a16_gemm(torch.randn(2, 96), **weight, group_size=32, layout="cuda")


def test_gradient_reaches_x(emulator):
    parts = random_int4_weight(70, 96, 32, symmetric=False)
    x = torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)
    multiply(x, to_cuda_layout(*parts, 32), None, 32).sum().backward()
    w = spec.dequantize_int4(*parts, 32, torch.bfloat16)
    torch.testing.assert_close(x.grad, torch.ones(3, 70, dtype=torch.bfloat16) @ w)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 48)])
def test_linear_repacks_and_saves_the_files_bits(bits, group_size, emulator):
    dense = torch.nn.Linear(96, 70, dtype=torch.bfloat16)
    layer = Int4Linear.from_linear(dense, bits, group_size, symmetric=False)
    saved = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    y = layer(x)
    assert "layout=cuda" in repr(layer)
    assert torch.equal(layer.dequantize(), copy.deepcopy(layer).dequantize())
    torch.testing.assert_close(y, layer.to_linear()(x), rtol=0.02, atol=0.02)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, saved[name])


def test_the_split_never_follows_from_m():
    for N, K in ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (64, 128), (8, 100_000)):
        for sm in (80, 86, 90):
            configs = [select_config(M, N, K, 128, sm) for M in range(1, 33)]
            assert {c.tier for c in configs} == {"decode"}
            assert len({c.split for c in configs}) == 1
            assert all(c.rows >= M for M, c in enumerate(configs, 1))
            assert configs[0].split <= max(1, K // 512)


def test_tiers_begin_where_documented():
    tiers = [select_config(M, 4096, 4096, 128, 90).tier for M in (32, 33, 1023, 1024)]
    assert tiers == ["decode", "tile", "tile", "dense"]
    assert select_config(1, 4096, 4096, 128, 90).bulk
    assert not select_config(1, 4096, 4096, 128, 89).bulk

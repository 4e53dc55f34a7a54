"""w4a16_gemm and lut4_gemm over the CUDA layout in the emulator: every tier, on sm_80 and sm_90."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from llmkern import _backends, ops
from llmkern.formats.int4 import pack_codes
from llmkern.nn import IntLinear, Lut4Linear
from llmkern.ops import _code_gemm
from llmkern.ops._w4a16_config import Chunks, Config, select_config
from llmkern.testing import CUDA_LAYOUT_CASES, CodeCase, relative_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
halves = pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda d: str(d).removeprefix("torch."))
cases = pytest.mark.parametrize("case", CUDA_LAYOUT_CASES.values(), ids=CUDA_LAYOUT_CASES)
kinds = pytest.mark.parametrize("values", ["zeros", "nf4", "row", "group"])


@pytest.fixture(
    params=[pytest.param(80, marks=pytest.mark.slow), 90],
    ids=["sm80", "sm90"],
)
def sm(request, emulator, monkeypatch):
    monkeypatch.setattr(_backends, "cuda_capability", lambda device: request.param)
    return request.param


def guard(guarded, packed):
    """The tensors of a weight in memory of their own; those that stand for a shape stay expanded."""
    return tuple(t if t is None or not t.is_contiguous() else guarded(t) for t in packed)


@halves
@cases
def test_values(case, dtype, sm, both_orders, guarded):
    weight = case.weight()
    packed = guard(guarded, case.pack(weight, kernel=False))
    x, bias = guarded(torch.randn(case.M, case.K).to(dtype)), guarded(torch.randn(case.N).to(dtype))
    out = both_orders(lambda: case.multiply(x, packed, bias, "cuda"))
    # Of so few sums, torch's largest error is a matter of luck: 4 instead of 2.
    case.check(out, x, weight, bias, slack=4)


@cases
def test_the_packers_of_the_gpu_make_the_same_bits(case, both_orders, guarded):
    weight = guard(guarded, case.weight())
    packed = both_orders(lambda: case.pack(weight))
    for ours, torchs in zip(packed, case.pack(weight, kernel=False), strict=True):
        assert (ours is None) == (torchs is None)
        assert ours is None or (ours.dtype == torchs.dtype and torch.equal(ours, torchs))
    packed = guard(guarded, packed)
    back = both_orders(lambda: tuple(t for t in case.unpack(packed) if t is not None))
    for ours, original in zip(back, [t for t in weight if t is not None], strict=True):
        assert ours.dtype == original.dtype
        assert torch.equal(ours, original)


@cases
def test_dequantize_returns_the_same_bits(case, both_orders, guarded):
    weight = case.weight()
    packed = guard(guarded, case.pack(weight, kernel=False))
    for dtype in (F32, BF16, F16):
        out = both_orders(lambda dtype=dtype: case.dequantize(packed, dtype, "cuda"))
        assert torch.equal(out, case.dense(weight, dtype))


@pytest.mark.slow
@halves
@kinds
@pytest.mark.parametrize("rows", [8, 16, 32, 64, 192])
def test_unit_vectors_return_the_weight_bit_for_bit(rows, values, dtype, sm):
    case = CodeCase(rows, 70, 192, 64, values)
    parts = case.weight()
    if not case.integers:  # so that nothing but the result is rounded
        parts = (parts[0], parts[1].to(dtype).float(), parts[2])
    packed = case.pack(parts, kernel=False)
    eye = torch.eye(192, dtype=dtype)
    out = torch.cat([case.multiply(x, packed, None, "cuda") for x in eye.split(rows)])
    assert torch.equal(out.t(), case.dense(parts, F32).to(dtype))


# A ring of each depth under each tile, and chunks of each size.
RINGS = [
    *(("zeros", rows, stages) for rows in (8, 64, 128) for stages in (2, 3, 5)),
    *((values, 64, 3) for values in ("nf4", "row", "group")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("values", "rows", "stages"), RINGS)
def test_rings_wrap(values, rows, stages, both_orders, monkeypatch):
    config = Config("tile", rows, 1, True, stages)
    monkeypatch.setattr(_code_gemm, "select_config", lambda *args: config)
    case = CodeCase(3, 130, 896, 128, values)  # 7 chunks of K
    weight = case.weight()
    packed, x = case.pack(weight, kernel=False), torch.randn(3, 896).bfloat16()
    case.check(both_orders(lambda: case.multiply(x, packed, None, "cuda")), x, weight, None, 4)


SLICES = {
    "workspace_whole": (False, 128, 1),
    "workspace_of_two": (False, 16, 2),
    "workspace_of_four": (False, 128, 4),
    "workspace_of_eight": (False, 16, 8),
    "cluster_whole": (True, 16, 1),
    "cluster_of_two": (True, 128, 2),
    "cluster_of_four": (True, 16, 4),
    "cluster_of_eight": (True, 128, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize(("bulk", "rows", "split"), SLICES.values(), ids=SLICES)
def test_slices_of_k_add_up_in_every_tile(bulk, rows, split, both_orders, monkeypatch):
    monkeypatch.setattr(
        _code_gemm, "select_config", lambda *args: Config("tile", rows, split, bulk)
    )
    case = CodeCase(20, 190, 1280, 64, "zeros")  # 10 chunks of K: slices of different lengths
    weight = case.weight()
    packed, x = case.pack(weight, kernel=False), torch.randn(20, 1280).bfloat16()
    case.check(both_orders(lambda: case.multiply(x, packed, None, "cuda")), x, weight, None, 4)


@halves
@pytest.mark.parametrize("values", ["zeros", "nf4"])
def test_a_row_depends_on_no_other(values, dtype, sm):
    case = CodeCase(80, 64, 1152, 128, values)
    packed = case.pack(case.weight(), kernel=False)
    x = torch.randn(80, 1152).to(dtype)
    assert select_config(1, 64, 1152, Chunks(4224), sm).split == 2
    whole = case.multiply(x[:32], packed, None, "cuda")
    for rows in (slice(0, 1), slice(5, 13), slice(7, 20)):
        assert torch.equal(case.multiply(x[rows], packed, None, "cuda"), whole[rows])
    tiles = case.multiply(x, packed, None, "cuda")  # 128 rows per tile, the others 64
    assert select_config(80, 64, 1152, Chunks(4224), sm).rows == 128
    assert torch.equal(case.multiply(x[20:60], packed, None, "cuda"), tiles[20:60])


@halves
@pytest.mark.parametrize("M", [4, 40, 70], ids=["decode", "tile", "wide"])
def test_error_is_below_that_of_torch_on_the_rounded_weight(M, dtype, sm):
    case = CodeCase(M, 96, 640, 64, "zeros")
    errors = []
    for _ in range(3):
        weight = case.weight()
        x = torch.randn(M, 640).to(dtype)
        out = case.multiply(x, case.pack(weight, kernel=False), None, "cuda")
        want = x.double() @ case.dense(weight).t()
        like = F.linear(x, case.dense(weight, dtype))
        errors.append((relative_error(out, want), relative_error(like, want)))
    ours, torchs = torch.tensor(errors).mean(0).tolist()
    assert ours < torchs


@kinds
def test_nan_in_x_stays_in_its_row(values, sm):
    case = CodeCase(5, 64, 160, 32, values)
    packed = case.pack(case.weight(), kernel=False)
    x = torch.randn(5, 160).bfloat16()
    clean = case.multiply(x, packed, None, "cuda")
    x[2, 7] = float("nan")
    out = case.multiply(x, packed, None, "cuda")
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("stride", [163, 168], ids=["odd_stride", "vector_stride"])
def test_rows_of_x_lie_apart(stride, sm):
    case = CodeCase(5, 64, 160, 32)
    packed = case.pack(case.weight(), kernel=False)
    x = torch.randn(5, stride).bfloat16()[:, :160]
    out = case.multiply(x, packed, None, "cuda")
    assert torch.equal(out, case.multiply(x.contiguous(), packed, None, "cuda"))


@kinds
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("M", "dtype"), [(5, F32), (1024, BF16)], ids=str)
def test_dense_tier(M, dtype, bias, values, emulator, monkeypatch):
    monkeypatch.setattr(_code_gemm, "DENSE_BYTES", 64 * 96 * 2)
    case = CodeCase(M, 150, 96, 32, values)
    weight = case.weight()
    x, bias = torch.randn(M, 96).to(dtype), torch.randn(150).to(dtype) if bias else None
    out = case.multiply(x, case.pack(weight, kernel=False), bias, "cuda")
    case.check(out, x, weight, bias, slack=2)


@pytest.mark.slow
@kinds
def test_opcheck(values, emulator):
    case = CodeCase(3, 70, 96, 32, values)
    packed = case.pack(case.weight())
    x = torch.randn(3, 96, dtype=BF16, requires_grad=True)
    bias = torch.randn(70, dtype=BF16, requires_grad=True)
    if case.integers:
        op, options = torch.ops.llmkern.w4a16_gemm.default, ("cuda", "float")
    else:
        op, options = torch.ops.llmkern.lut4_gemm.default, ("cuda",)
    torch.library.opcheck(op, (x, *packed, bias, 32, *options))


@pytest.mark.parametrize("name", ["qweight", "zeros"])
def test_bad_int4_weight_is_refused(name, emulator):
    case = CodeCase(2, 70, 96, 32)
    weight = dict(zip(("qweight", "scales", "zeros"), case.pack(case.weight()), strict=True))
    weight[name] = torch.zeros(2, 1, 4096, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"w4a16_gemm: {name}: got uint8 \[2, 1, 4096\]"):
        ops.w4a16_gemm(torch.randn(2, 96), **weight, group_size=32, layout="cuda")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("qweight", torch.zeros(2, 1, 4100, dtype=torch.uint8)),
        ("codebook", torch.zeros(4, 16)),
        ("scales", None),
    ],
)
def test_bad_lut4_weight_is_refused(name, bad, emulator):
    case = CodeCase(2, 70, 96, 32, "nf4")
    weight = dict(zip(("qweight", "codebook", "scales"), case.pack(case.weight()), strict=True))
    weight[name] = bad
    with pytest.raises(ValueError, match=rf"lut4_gemm: {name}: got "):
        ops.lut4_gemm(torch.randn(2, 96), **weight, group_size=32, layout="cuda")


@kinds
def test_gradient_reaches_x(values, emulator):
    case = CodeCase(3, 70, 96, 32, values)
    weight = case.weight()
    x = torch.randn(3, 96, dtype=BF16, requires_grad=True)
    case.multiply(x, case.pack(weight), None, "cuda").sum().backward()
    w = case.dense(weight, BF16)
    torch.testing.assert_close(x.grad, torch.ones(3, 70, dtype=BF16) @ w)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 48)])
def test_int_linear_repacks_and_saves_the_files_bits(bits, group_size, emulator):
    dense = torch.nn.Linear(96, 70, dtype=BF16)
    check_repacking(IntLinear.from_linear(dense, bits, group_size, symmetric=False))


@pytest.mark.parametrize("scaled", [True, False], ids=["scales", "no_scales"])
@pytest.mark.parametrize("values", ["nf4", "tensor", "row", "group"])
def test_lut4_linear_repacks_and_saves_the_files_bits(values, scaled, emulator):
    case = CodeCase(3, 70, 96, 32, values, F32 if scaled else None)
    _, codebook, scales = case.weight()
    codes = torch.randint(0, 16, (70, 96), dtype=torch.uint8)
    layer = Lut4Linear.from_parts(codes, codebook, scales, group_size=32, dtype=BF16)
    book = repr(layer).partition("codebook=")[2].partition(", group")[0]
    check_repacking(layer)
    assert book in repr(layer)
    assert not layer.restore()
    assert torch.equal(layer.weight_packed, pack_codes(codes, 4))
    assert torch.equal(layer.weight_codebook, codebook)
    assert layer.weight_scale is None if scales is None else torch.equal(layer.weight_scale, scales)


def check_repacking(layer):
    saved = {name: copy.deepcopy(t) for name, t in layer.state_dict().items()}
    x = torch.randn(3, 96, dtype=BF16)
    y = layer(x)
    assert "layout=cuda" in repr(layer)
    held = sum(t.untyped_storage().nbytes() for t in layer.buffers())
    assert held < 70 * 96 * 8, "both layouts are kept"
    assert torch.equal(layer.dequantize(), copy.deepcopy(layer).dequantize())
    torch.testing.assert_close(y, layer.to_linear()(x), rtol=0.02, atol=0.02)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, saved[name])

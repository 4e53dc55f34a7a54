"""sparse24_w4a16_gemm on the CPU: every instruction set, layout and dtype against float64; the op."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import llmkern
from llmkern._backends import compiled_module
from llmkern.formats.sparse24_cpu import int4_to_cpu_layout
from llmkern.ops import sparse24_w4a16_gemm
from llmkern.reference.sparse24_w4a16_gemm import dequantize_sparse24
from llmkern.testing import (
    assert_matches,
    random_sparse24_int4_weight,
    relative_error,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ["canonical", "cpu"]


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group_size: int = 64
    symmetric: bool = True
    scale_dtype: torch.dtype = F32
    bias: bool = False


CASES = {
    "m0": Case(0, 64, 64),
    "m1": Case(1, 128, 256),
    "m1_one_row": Case(1, 1, 32, 32, False, bias=True),
    "m2_n_odd": Case(2, 67, 320, 160, False, bias=True),
    "m3_group_of_96": Case(3, 48, 288, 96, scale_dtype=F16),
    "m4_one_group": Case(4, 80, 512, 512, scale_dtype=BF16, bias=True),
    "m7_small_groups": Case(7, 65, 608, 32, False, scale_dtype=BF16),
    "m9_zeros": Case(9, 96, 256, 64, False),
    "m33": Case(33, 130, 544, 32, bias=True),
    "m_more_than_a_panel": Case(131, 75, 64),
    "several_threads_and_wide_strips": Case(40, 4100, 128, 128, bias=True),
}


def make(case, dtype, layout="canonical"):
    """x, weight in `layout`, bias, and the dense weight in float64."""
    weight = random_sparse24_int4_weight(
        case.N,
        case.K,
        case.group_size,
        symmetric=case.symmetric,
        scale_dtype=case.scale_dtype,
    )
    w = dequantize_sparse24(*weight, case.group_size, torch.float64)
    if layout == "cpu":
        weight = int4_to_cpu_layout(*weight, case.group_size)
    bias = torch.randn(case.N).to(dtype) if case.bias else None
    return torch.randn(case.M, case.K).to(dtype), weight, bias, w


def exact(x, w, bias):
    y = x.double() @ w.t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64_in_both_layouts(backend, case, dtype):
    x, weight, bias, w = make(case, dtype)
    y = sparse24_w4a16_gemm(x, *weight, bias, group_size=case.group_size)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))
    if case.N % 16 == 0:
        packed = int4_to_cpu_layout(*weight, case.group_size)
        assert torch.equal(
            y, sparse24_w4a16_gemm(x, *packed, bias, group_size=case.group_size, layout="cpu")
        )


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 40),
    N=st.integers(32, 110),  # of a few outputs plain torch may happen to round each one well
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([F32, BF16, F16]),
    dtype=st.sampled_from([F32, BF16, F16]),
)
def test_any_shape_matches_float64(M, N, groups, group_size, symmetric, scale_dtype, dtype):
    case = Case(M, N, groups * group_size, group_size, symmetric, scale_dtype, bias=True)
    x, weight, bias, w = make(case, dtype)
    y = sparse24_w4a16_gemm(x, *weight, bias, group_size=group_size)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias), slack=4)
    if N % 16 == 0:
        packed = int4_to_cpu_layout(*weight, group_size)
        z = sparse24_w4a16_gemm(x, *packed, bias, group_size=group_size, layout="cpu")
        assert torch.equal(y, z)


@pytest.mark.parametrize("M", [1, 4, 8, 16, 48])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_not_above_that_of_a_bfloat16_matmul(backend, M, symmetric):
    x, weight, _, w = make(Case(M, 96, 1024, symmetric=symmetric), BF16)
    y = sparse24_w4a16_gemm(x, *weight, group_size=64)
    spec = exact(x, w, None)
    assert relative_error(y, spec) <= relative_error(F.linear(x, w.to(BF16)), spec)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 96], ids="m{}".format)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_unit_vectors_return_the_weight_bit_for_bit(backend, dtype, rows, layout):
    _, weight, _, w = make(Case(0, 80, 96, 32, False), dtype, layout)
    units = torch.eye(96, dtype=dtype).split(rows)
    y = torch.cat([sparse24_w4a16_gemm(x, *weight, group_size=32, layout=layout) for x in units])
    assert torch.equal(y.t(), w.to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("M", [3, 20])
def test_strided_x_is_read_in_place(backend, dtype, M):
    x, weight, bias, w = make(Case(M, 64, 128, bias=True), dtype)
    wide = torch.full((M, 200), float("nan"), dtype=dtype)
    wide[:, 7:135] = x
    spec, like = exact(x, w, bias), F.linear(x, w.to(dtype), bias)
    for strided in (wide[:, 7:135], x.t().contiguous().t()):
        assert_matches(sparse24_w4a16_gemm(strided, *weight, bias, group_size=64), spec, like)


def test_strided_bias_is_read_right(backend):
    x, weight, bias, w = make(Case(2, 64, 64, bias=True), F32)
    strided = torch.stack((bias, torch.full_like(bias, float("nan"))), 1)[:, 0]
    y = sparse24_w4a16_gemm(x, *weight, strided, group_size=64)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.float(), bias))


def test_no_columns_leave_the_bias(backend):
    bias = torch.randn(4)
    weight = (
        torch.empty(4, 0, dtype=torch.int32),
        torch.empty(4, 0, dtype=torch.uint8),
        torch.empty(4, 0),
    )
    y = sparse24_w4a16_gemm(torch.empty(2, 0), *weight, bias=bias, group_size=64)
    assert torch.equal(y, bias.expand(2, 4))


def test_leading_dimensions_are_kept(backend):
    x, weight, _, _ = make(Case(6, 40, 64), F32)
    y = sparse24_w4a16_gemm(x.view(2, 3, 64), *weight, group_size=64)
    assert y.shape == (2, 3, 40)
    assert torch.equal(y.view(6, 40), sparse24_w4a16_gemm(x, *weight, group_size=64))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("isa", compiled_module("_cpu")[0].isas())
def test_row_depends_on_nothing_but_itself(isa, dtype):
    x, weight, bias, _ = make(Case(139, 192, 512, bias=True), dtype)
    cpu = compiled_module("_cpu")[0]
    before, threads = cpu.isa(), torch.get_num_threads()
    packed = int4_to_cpu_layout(*weight, 64)
    try:
        cpu.set_isa(isa)
        torch.set_num_threads(1)
        spec = sparse24_w4a16_gemm(x, *weight, bias, group_size=64)
        torch.set_num_threads(3)
        for M in (139, 40, 7, 2, 1):
            y = sparse24_w4a16_gemm(x[:M], *packed, bias, group_size=64, layout="cpu")
            assert torch.equal(y, spec[:M])
    finally:
        cpu.set_isa(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("M", [3, 9, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_stay_in_their_row(backend, value, M):
    x, weight, _, w = make(Case(M, 70, 256), F32)
    clean = sparse24_w4a16_gemm(x, *weight, group_size=64)
    x[2, 77] = value
    y = sparse24_w4a16_gemm(x, *weight, group_size=64)
    others = [row for row in range(M) if row != 2]
    assert torch.equal(y[others], clean[others])
    assert not torch.isfinite(y[2, w[:, 77] != 0]).any()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_match_float64(dtype, layout):
    x, weight, bias, w = make(Case(5, 80, 96, 32, False, bias=True), dtype, layout)
    grad = torch.randn(5, 80).to(dtype)
    x.requires_grad_()
    bias.requires_grad_()
    y = sparse24_w4a16_gemm(x, *weight, bias, group_size=32, layout=layout)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))
    y.backward(grad)
    assert_matches(x.grad, grad.double() @ w, grad @ w.to(dtype))
    assert_matches(bias.grad, grad.double().sum(0), grad.sum(0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(layout, symmetric):
    x, weight, bias, _ = make(Case(3, 48, 64, 32, symmetric, bias=True), F32, layout)
    op = torch.ops.llmkern.sparse24_w4a16_gemm.default
    torch.library.opcheck(op, (x.requires_grad_(), *weight, bias.requires_grad_(), 32, layout))


def test_compiles_without_a_graph_break():
    x, weight, bias, _ = make(Case(3, 48, 64, bias=True), F32)
    x.requires_grad_()

    def layer(x):
        return sparse24_w4a16_gemm(x, *weight, bias, group_size=64).relu()

    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    (eager,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(grad, eager)


def arguments():
    x, (qvalues, meta, scales, zeros), bias, _ = make(Case(2, 24, 64, 32, False, bias=True), F32)
    weight = {"qvalues": qvalues, "meta": meta, "scales": scales, "zeros": zeros}
    return {"x": x, **weight, "bias": bias}


def strided(name):
    return lambda a: {name: a[name].t().contiguous().t()}


ERRORS = {
    "x_dtype": (lambda a: {"x": a["x"].double()}, "x: got float64"),
    "x_width": (lambda a: {"x": a["x"][:, :32]}, r"x: got float32 \[2, 32\].*\[M, 64\]"),
    "qvalues_dtype": (lambda a: {"qvalues": a["qvalues"].long()}, "qvalues: got int64"),
    "qvalues_shape": (
        lambda a: {"qvalues": a["qvalues"][:, :2]},
        r"qvalues: got .*expected int32 \[24, 4\]",
    ),
    "qvalues_strided": (strided("qvalues"), "qvalues: got .* expected a contiguous tensor"),
    "meta_dtype": (lambda a: {"meta": a["meta"].int()}, "meta: got int32 .* expected uint8"),
    "meta_strided": (strided("meta"), "meta: got .* expected a contiguous tensor"),
    "scales_dtype": (lambda a: {"scales": a["scales"].double()}, "scales: got float64"),
    "scales_shape": (lambda a: {"scales": a["scales"][:, :1]}, "qvalues: got .*K = 32"),
    "scales_strided": (strided("scales"), "scales: got .* expected a contiguous tensor"),
    "zeros_shape": (lambda a: {"zeros": a["zeros"][:2]}, r"zeros: got int32 \[2, 2\]"),
    "zeros_strided": (strided("zeros"), "zeros: got .* expected a contiguous tensor"),
    "bias_dtype": (lambda a: {"bias": a["bias"].half()}, r"bias: got float16 .*float32 \[24\]"),
    "bias_shape": (lambda a: {"bias": a["bias"][:8]}, r"bias: got float32 \[8\]"),
    "group_size_zero": (lambda a: {"group_size": 0}, "group_size: got 0"),
    "group_size_48": (lambda a: {"group_size": 48}, "group_size: got 48"),
    "layout": (lambda a: {"layout": "marlin"}, "layout: got 'marlin'"),
    "layout_of_the_other_kind": (lambda a: {"layout": "cpu"}, "qvalues: got int32"),
    "device": (lambda a: {"x": a["x"].to("meta")}, "x: got .* on meta"),
    "meta_device": (lambda a: {"meta": a["meta"].to("meta")}, "meta: got .* on meta"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused(change, message):
    args = {"group_size": 32, **arguments()}
    args.update(change(args))
    with pytest.raises(ValueError, match=f"sparse24_w4a16_gemm: {message}"):
        sparse24_w4a16_gemm(**args)


def test_a_forced_backend_that_cannot_serve_is_an_error():
    with (
        llmkern.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="sparse24_w4a16_gemm: the cuda backend cannot"),
    ):
        sparse24_w4a16_gemm(**arguments(), group_size=32)

"""sparse24_gemm on the CPU: every instruction set, layout and dtype against float64; then the op."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import llmkern
from llmkern._backends import compiled_module
from llmkern.formats.sparse24 import decompress
from llmkern.formats.sparse24_cpu import fits, to_cpu_layout
from llmkern.ops import sparse24_gemm
from llmkern.testing import assert_matches, random_sparse24_weight, relative_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ["canonical", "cpu"]


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    bias: bool = False


CASES = {
    "m0": Case(0, 64, 64),
    "m1": Case(1, 128, 256),
    "m1_one_row": Case(1, 1, 8, bias=True),
    "m2_n_odd_k_tail": Case(2, 67, 328, bias=True),
    "m3_k_less_than_a_word": Case(3, 37, 24),
    "m4": Case(4, 80, 512, bias=True),
    "m7_k_tail_of_a_panel": Case(7, 65, 616),
    "m9": Case(9, 96, 256),
    "m33": Case(33, 130, 544, bias=True),
    "m_more_than_a_panel": Case(131, 75, 64),
    "several_threads_and_wide_strips": Case(40, 4100, 136, bias=True),
}


def make(case, dtype, layout="canonical"):
    """x, weight in `layout`, bias, and the dense weight in float64."""
    weight = random_sparse24_weight(case.N, case.K, dtype)
    w = decompress(*weight).double()
    if layout == "cpu":
        weight = to_cpu_layout(*weight)
    bias = torch.randn(case.N).to(dtype) if case.bias else None
    return torch.randn(case.M, case.K).to(dtype), weight, bias, w


def exact(x, w, bias):
    y = x.double() @ w.t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64_in_both_layouts(backend, case, dtype):
    x, weight, bias, w = make(case, dtype)
    y = sparse24_gemm(x, *weight, bias)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))
    if fits(case.N, case.K):
        packed = to_cpu_layout(*weight)
        assert torch.equal(y, sparse24_gemm(x, *packed, bias, layout="cpu"))


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 40),
    N=st.integers(32, 110),  # of a few outputs plain torch may happen to round each one well
    octets=st.integers(1, 70),
    dtype=st.sampled_from([F32, BF16, F16]),
)
def test_any_shape_matches_float64(M, N, octets, dtype):
    x, weight, bias, w = make(Case(M, N, 8 * octets, bias=True), dtype)
    y = sparse24_gemm(x, *weight, bias)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias), slack=4)
    if fits(N, 8 * octets):
        assert torch.equal(y, sparse24_gemm(x, *to_cpu_layout(*weight), bias, layout="cpu"))


@pytest.mark.parametrize("M", [1, 4, 8, 16, 48])
def test_error_is_not_above_that_of_a_bfloat16_matmul(backend, M):
    x, weight, _, w = make(Case(M, 96, 1024), BF16)
    spec = exact(x, w, None)
    error = relative_error(sparse24_gemm(x, *weight), spec)
    assert error <= 1.01 * relative_error(F.linear(x, w.to(BF16)), spec)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 96], ids="m{}".format)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_unit_vectors_return_the_weight_bit_for_bit(backend, dtype, rows, layout):
    _, weight, _, w = make(Case(0, 80, 96), dtype, layout)
    units = torch.eye(96, dtype=dtype).split(rows)
    y = torch.cat([sparse24_gemm(x, *weight, layout=layout) for x in units])
    assert torch.equal(y.t(), w.to(dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("M", [3, 20])
def test_strided_x_is_read_in_place(backend, dtype, M):
    x, weight, bias, w = make(Case(M, 64, 128, bias=True), dtype)
    wide = torch.full((M, 200), float("nan"), dtype=dtype)
    wide[:, 7:135] = x
    spec, like = exact(x, w, bias), F.linear(x, w.to(dtype), bias)
    for strided in (wide[:, 7:135], x.t().contiguous().t()):
        assert_matches(sparse24_gemm(strided, *weight, bias), spec, like)


def test_strided_bias_is_read_right(backend):
    x, weight, bias, w = make(Case(2, 64, 64, bias=True), F32)
    strided = torch.stack((bias, torch.full_like(bias, float("nan"))), 1)[:, 0]
    y = sparse24_gemm(x, *weight, strided)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.float(), bias))


def test_no_columns_leave_the_bias(backend):
    bias = torch.randn(4)
    weight = torch.empty(4, 0), torch.empty(4, 0, dtype=torch.uint8)
    y = sparse24_gemm(torch.empty(2, 0), *weight, bias=bias)
    assert torch.equal(y, bias.expand(2, 4))


def test_leading_dimensions_are_kept(backend):
    x, weight, _, _ = make(Case(6, 40, 64), F32)
    y = sparse24_gemm(x.view(2, 3, 64), *weight)
    assert y.shape == (2, 3, 40)
    assert torch.equal(y.view(6, 40), sparse24_gemm(x, *weight))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("isa", compiled_module("_cpu")[0].isas())
def test_row_depends_on_nothing_but_itself(isa, dtype):
    x, weight, bias, _ = make(Case(139, 192, 512, bias=True), dtype)
    cpu = compiled_module("_cpu")[0]
    before, threads = cpu.isa(), torch.get_num_threads()
    packed = to_cpu_layout(*weight)
    try:
        cpu.set_isa(isa)
        torch.set_num_threads(1)
        spec = sparse24_gemm(x, *weight, bias)
        torch.set_num_threads(3)
        for M in (139, 40, 7, 2, 1):
            y = sparse24_gemm(x[:M], *packed, bias, layout="cpu")
            assert torch.equal(y, spec[:M])
    finally:
        cpu.set_isa(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("M", [3, 9, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_stay_in_their_row(backend, value, M):
    x, weight, _, w = make(Case(M, 70, 256), F32)
    clean = sparse24_gemm(x, *weight)
    x[2, 77] = value
    y = sparse24_gemm(x, *weight)
    others = [row for row in range(M) if row != 2]
    assert torch.equal(y[others], clean[others])
    assert not torch.isfinite(y[2, w[:, 77] != 0]).any()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_match_float64(dtype, layout):
    x, weight, bias, w = make(Case(5, 80, 96, bias=True), dtype, layout)
    grad = torch.randn(5, 80).to(dtype)
    x.requires_grad_()
    bias.requires_grad_()
    y = sparse24_gemm(x, *weight, bias, layout=layout)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))
    y.backward(grad)
    assert_matches(x.grad, grad.double() @ w, grad @ w.to(dtype))
    assert_matches(bias.grad, grad.double().sum(0), grad.sum(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, weight, bias, _ = make(Case(3, 48, 64, True), F32, layout)
    op = torch.ops.llmkern.sparse24_gemm.default
    torch.library.opcheck(op, (x.requires_grad_(), *weight, bias.requires_grad_(), layout))


def test_compiles_without_a_graph_break():
    x, weight, bias, _ = make(Case(3, 48, 64, bias=True), F32)
    x.requires_grad_()

    def layer(x):
        return sparse24_gemm(x, *weight, bias).relu()

    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    (eager,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(grad, eager)


def arguments():
    x, (values, meta), bias, _ = make(Case(2, 24, 64, bias=True), F32)
    return {"x": x, "values": values, "meta": meta, "bias": bias}


ERRORS = {
    "x_dtype": (lambda a: {"x": a["x"].double()}, "x: got float64"),
    "x_of_another_dtype": (lambda a: {"x": a["x"].half()}, "x: got float16.* expected the dtype"),
    "x_width": (lambda a: {"x": a["x"][:, :32]}, r"x: got float32 \[2, 32\].*\[M, 64\]"),
    "values_dtype": (lambda a: {"values": a["values"].double()}, "values: got float64"),
    "values_shape": (
        lambda a: {"values": a["values"][:, :8]},
        r"values: got .*expected \[24, 32\]",
    ),
    "values_strided": (
        lambda a: {"values": a["values"].t().contiguous().t()},
        "values: got .* expected a contiguous tensor",
    ),
    "meta_dtype": (lambda a: {"meta": a["meta"].int()}, "meta: got int32 .* expected uint8"),
    "meta_strided": (
        lambda a: {"meta": a["meta"].t().contiguous().t()},
        "meta: got .* expected a contiguous tensor",
    ),
    "bias_dtype": (lambda a: {"bias": a["bias"].half()}, r"bias: got float16 .*float32 \[24\]"),
    "bias_shape": (lambda a: {"bias": a["bias"][:8]}, r"bias: got float32 \[8\]"),
    "layout": (lambda a: {"layout": "marlin"}, "layout: got 'marlin'"),
    "layout_of_the_other_kind": (lambda a: {"layout": "cpu"}, "values: got float32"),
    "device": (lambda a: {"x": a["x"].to("meta")}, "x: got .* on meta"),
    "meta_device": (lambda a: {"meta": a["meta"].to("meta")}, "meta: got .* on meta"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused(change, message):
    args = arguments()
    args.update(change(args))
    with pytest.raises(ValueError, match=f"sparse24_gemm: {message}"):
        sparse24_gemm(**args)


def test_a_forced_backend_that_cannot_serve_is_an_error():
    with (
        llmkern.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="sparse24_gemm: the cuda backend cannot serve"),
    ):
        sparse24_gemm(**arguments())

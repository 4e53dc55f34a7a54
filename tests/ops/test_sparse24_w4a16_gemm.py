"""sparse24_w4a16_gemm on the CPU: every instruction set, layout and dtype against float64; the op."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import llmkern
from llmkern.formats.sparse24_cpu import int4_to_cpu_layout
from llmkern.ops import sparse24_w4a16_gemm
from llmkern.reference.sparse24_w4a16_gemm import dequantize_sparse24
from llmkern.testing import assert_matches, random_sparse24_int4_weight

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

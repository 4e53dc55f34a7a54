"""sparse24_gemm on the CPU: every instruction set, layout and dtype against float64; then the op."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import llmkern
from llmkern.formats.sparse24 import decompress
from llmkern.formats.sparse24_cpu import to_cpu_layout
from llmkern.ops import sparse24_gemm
from llmkern.testing import assert_matches, random_sparse24_weight

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ["canonical", "cpu"]


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    bias: bool = False


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

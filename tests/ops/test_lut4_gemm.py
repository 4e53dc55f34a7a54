"""lut4_gemm on the CPU: every instruction set, book, layout and dtype against float64; then the op."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import llmkern
from llmkern._backends import compiled_module
from llmkern.formats.lut4_cpu import to_cpu_layout
from llmkern.ops import dequantize_lut4, lut4_gemm
from llmkern.reference.lut4_gemm import dequantize_lut4 as dequantize_reference
from llmkern.testing import assert_matches, random_lut4_weight, relative_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ["canonical", "cpu"]


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group_size: int = 64
    book: str = "nf4"
    scale_dtype: torch.dtype | None = F32
    bias: bool = False


CASES = {
    "m0": Case(0, 64, 64),
    "m1": Case(1, 128, 256),
    "m1_one_row": Case(1, 1, 32, 32, bias=True),
    "m2_n_odd_book_per_row": Case(2, 67, 320, 160, "row", None, bias=True),
    "m3_book_per_group": Case(3, 37, 96, 32, "group", F16),
    "m4_one_group": Case(4, 66, 512, 512, "tensor", BF16, bias=True),
    "m5_groups_across_windows": Case(5, 67, 384, 192, scale_dtype=BF16),
    "m7_k_odd_multiple_of_32": Case(7, 65, 608, 32, scale_dtype=BF16),
    "m9_book_per_group_no_scales": Case(9, 70, 256, 64, "group", None),
    "m17": Case(17, 31, 128, 128, "row", F16, bias=True),
    "m33": Case(33, 130, 544, 32, bias=True),
    "m_more_than_a_panel": Case(261, 75, 64),
    "several_threads": Case(40, 320, 512, 128, "row", bias=True),
}


def make(case, dtype, layout="canonical"):
    """x, weight in `layout`, bias, and the dense weight in float64."""
    weight = random_lut4_weight(
        case.N, case.K, case.group_size, book=case.book, scale_dtype=case.scale_dtype
    )
    w = dequantize_reference(*weight, case.group_size, torch.float64)
    if layout == "cpu":
        weight = (to_cpu_layout(weight[0]), *weight[1:])
    bias = torch.randn(case.N).to(dtype) if case.bias else None
    return torch.randn(case.M, case.K).to(dtype), weight, bias, w


def exact(x, w, bias):
    y = x.double() @ w.t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64_in_both_layouts(backend, case, dtype):
    x, weight, bias, w = make(case, dtype)
    y = lut4_gemm(x, *weight, bias, group_size=case.group_size)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))
    packed = (to_cpu_layout(weight[0]), *weight[1:])
    assert torch.equal(y, lut4_gemm(x, *packed, bias, group_size=case.group_size, layout="cpu"))


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 40),
    N=st.integers(32, 110),  # of a few outputs plain torch may happen to round each one well
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    book=st.sampled_from(["tensor", "row", "group"]),
    scale_dtype=st.sampled_from([None, F32, BF16, F16]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([F32, BF16]),
)
def test_any_shape_matches_float64(M, N, groups, group_size, book, scale_dtype, layout, dtype):
    case = Case(M, N, groups * group_size, group_size, book, scale_dtype, bias=True)
    x, weight, bias, w = make(case, dtype, layout)
    y = lut4_gemm(x, *weight, bias, group_size=group_size, layout=layout)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias), slack=4)


@pytest.mark.parametrize("M", [1, 4, 8, 16, 48])
def test_error_is_not_above_that_of_a_bfloat16_matmul(backend, M):
    x, weight, _, w = make(Case(M, 96, 1024), BF16)
    y = lut4_gemm(x, *weight, group_size=64)
    spec = exact(x, w, None)
    # Some multiply with the same rounded weight as torch, summed in another order.
    least = {"amx": 8, "zen4": 13}.get(compiled_module("_cpu")[0].isa())
    slack = 1.05 if least and least <= M else 1
    assert relative_error(y, spec) <= slack * relative_error(F.linear(x, w.to(BF16)), spec)


@pytest.mark.parametrize("scale_dtype", [None, BF16], ids=str)
@pytest.mark.parametrize("M", [1, 4, 12])
def test_book_that_bfloat16_holds_badly_costs_no_accuracy(backend, M, scale_dtype):
    # Every entry lies halfway between two bfloat16 numbers.
    book = (1 + 2**-8) * 2.0 ** -torch.arange(8.0)
    book = torch.cat((-book, book.flip(0)))
    qweight, _, scales = random_lut4_weight(96, 1024, 64, scale_dtype=scale_dtype)
    w = dequantize_reference(qweight, book, scales, 64, torch.float64)
    x = torch.randn(M, 1024).to(BF16)
    y = lut4_gemm(x, qweight, book, scales, group_size=64)
    spec = x.double() @ w.t()
    assert relative_error(y, spec) <= relative_error(F.linear(x, w.to(BF16)), spec)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 3, 96], ids="m{}".format)
@pytest.mark.parametrize("book", ["nf4", "row", "group"])
def test_unit_vectors_return_the_weight_bit_for_bit(backend, book, rows, layout):
    _, weight, _, w = make(Case(0, 70, 96, 32, book), F32, layout)
    y = torch.cat(
        [lut4_gemm(x, *weight, group_size=32, layout=layout) for x in torch.eye(96).split(rows)]
    )
    assert torch.equal(y.t(), w.float())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES["m2_n_odd_book_per_row"], CASES["m3_book_per_group"]])
def test_dequantize_rounds_the_exact_product_once(backend, case, layout, dtype):
    _, weight, _, _ = make(case, F32)
    spec = dequantize_reference(*weight, case.group_size, F32).to(dtype)
    if layout == "cpu":
        weight = (to_cpu_layout(weight[0]), *weight[1:])
    w = dequantize_lut4(*weight, group_size=case.group_size, dtype=dtype, layout=layout)
    assert torch.equal(w, spec)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("M", [3, 20])
def test_strided_x_is_read_in_place(backend, dtype, M):
    x, weight, bias, _ = make(Case(M, 64, 128, bias=True), dtype)
    wide = torch.full((M, 200), float("nan"), dtype=dtype)
    wide[:, 7:135] = x
    out = lut4_gemm(wide[:, 7:135], *weight, bias, group_size=64)
    assert torch.equal(out, lut4_gemm(x, *weight, bias, group_size=64))
    transposed = lut4_gemm(x.t().contiguous().t(), *weight, bias, group_size=64)
    assert torch.equal(out, transposed)


def test_strided_bias_is_read_right(backend):
    x, weight, bias, w = make(Case(2, 64, 64, bias=True), F32)
    strided = torch.stack((bias, torch.full_like(bias, float("nan"))), 1)[:, 0]
    y = lut4_gemm(x, *weight, strided, group_size=64)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.float(), bias))


def test_no_columns_leave_the_bias(backend):
    bias = torch.randn(4)
    weight = torch.empty(4, 0, dtype=torch.int32), torch.zeros(16), torch.empty(4, 0)
    y = lut4_gemm(torch.empty(2, 0), *weight, bias, group_size=32)
    assert torch.equal(y, bias.expand(2, 4))


def test_leading_dimensions_are_kept(backend):
    x, weight, _, _ = make(Case(6, 40, 64), F32)
    y = lut4_gemm(x.view(2, 3, 64), *weight, group_size=64)
    assert y.shape == (2, 3, 40)
    assert torch.equal(y.view(6, 40), lut4_gemm(x, *weight, group_size=64))


@pytest.mark.parametrize("M", [1, 5, 40, 300])
@pytest.mark.parametrize("isa", compiled_module("_cpu")[0].isas())
def test_result_does_not_depend_on_threads_or_layout(isa, M):
    x, weight, bias, _ = make(Case(M, 190, 512, bias=True), BF16)
    cpu = compiled_module("_cpu")[0]
    before, threads = cpu.isa(), torch.get_num_threads()
    packed = (to_cpu_layout(weight[0]), *weight[1:])
    try:
        cpu.set_isa(isa)
        torch.set_num_threads(1)
        spec = lut4_gemm(x, *weight, bias, group_size=64)
        torch.set_num_threads(3)
        y = lut4_gemm(x, *packed, bias, group_size=64, layout="cpu")
        assert torch.equal(y, spec)
    finally:
        cpu.set_isa(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("M", [3, 9, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_stay_in_their_row(backend, value, M):
    x, weight, _, _ = make(Case(M, 70, 256), F32)
    clean = lut4_gemm(x, *weight, group_size=64)
    x[2, 77] = value
    y = lut4_gemm(x, *weight, group_size=64)
    others = [row for row in range(M) if row != 2]
    assert torch.equal(y[others], clean[others])
    assert not torch.isfinite(y[2]).any()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_match_float64(backend, dtype, layout):
    x, weight, bias, w = make(Case(5, 70, 96, 32, "row", bias=True), dtype, layout)
    grad = torch.randn(5, 70).to(dtype)
    x.requires_grad_()
    bias.requires_grad_()
    lut4_gemm(x, *weight, bias, group_size=32, layout=layout).backward(grad)
    assert_matches(x.grad, grad.double() @ w, grad @ w.to(dtype))
    assert_matches(bias.grad, grad.double().sum(0), grad.sum(0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale_dtype", [F32, None], ids=["scales", "no_scales"])
def test_opcheck(layout, scale_dtype):
    x, weight, bias, _ = make(Case(3, 70, 64, 32, "group", scale_dtype, True), F32, layout)
    op = torch.ops.llmkern.lut4_gemm.default
    torch.library.opcheck(op, (x.requires_grad_(), *weight, bias.requires_grad_(), 32, layout))
    torch.library.opcheck(torch.ops.llmkern.dequantize_lut4.default, (*weight, 32, layout, BF16))


def test_compiles_without_a_graph_break():
    x, weight, bias, _ = make(Case(3, 70, 64, bias=True), F32)
    x.requires_grad_()

    def layer(x):
        return lut4_gemm(x, *weight, bias, group_size=64).relu()

    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, layer(x))
    (grad,) = torch.autograd.grad(y.sum(), x)
    (eager,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(grad, eager)


def arguments():
    x, (qweight, codebook, scales), bias, _ = make(Case(2, 24, 64, 32, bias=True), F32)
    return {"x": x, "qweight": qweight, "codebook": codebook, "scales": scales, "bias": bias}


ERRORS = {
    "x_dtype": (lambda a: {"x": a["x"].double()}, "x: got float64"),
    "x_width": (lambda a: {"x": a["x"][:, :32]}, r"x: got float32 \[2, 32\].*\[M, 64\]"),
    "qweight_dtype": (lambda a: {"qweight": a["qweight"].long()}, "qweight: got int64"),
    "qweight_vector": (lambda a: {"qweight": a["qweight"][0]}, "qweight: got int32"),
    "qweight_strided": (
        lambda a: {"qweight": a["qweight"].t().contiguous().t()},
        "qweight: got .* expected a contiguous tensor",
    ),
    "codebook_dtype": (lambda a: {"codebook": a["codebook"].half()}, "codebook: got float16"),
    "codebook_size": (lambda a: {"codebook": a["codebook"][:15]}, r"codebook: got float32 \[15\]"),
    "codebook_of_other_rows": (
        lambda a: {"codebook": a["codebook"].expand(23, 16).contiguous()},
        r"codebook: got float32 \[23, 16\] .* expected float32 \[16\], \[24, 16\] or \[24, 2, 16\]",
    ),
    "codebook_strided": (
        lambda a: {"codebook": a["codebook"].expand(24, 16)},
        "codebook: got .* expected a contiguous tensor",
    ),
    "scales_dtype": (lambda a: {"scales": a["scales"].double()}, "scales: got float64"),
    "scales_shape": (lambda a: {"scales": a["scales"][:, :1]}, r"scales: got float32 \[24, 1\]"),
    "scales_strided": (
        lambda a: {"scales": a["scales"].t().contiguous().t()},
        "scales: got .* expected a contiguous tensor",
    ),
    "bias_dtype": (lambda a: {"bias": a["bias"].half()}, r"bias: got float16 .*float32 \[24\]"),
    "bias_shape": (lambda a: {"bias": a["bias"][:8]}, r"bias: got float32 \[8\]"),
    "group_size_zero": (lambda a: {"group_size": 0}, "group_size: got 0"),
    "group_size_48": (lambda a: {"group_size": 48}, "group_size: got 48"),
    "group_size_not_a_divisor": (lambda a: {"group_size": 96}, "group_size: got 96.*K = 64"),
    "layout": (lambda a: {"layout": "marlin"}, "layout: got 'marlin'"),
    "layout_of_the_other_kind": (lambda a: {"layout": "cpu"}, "qweight: got int32"),
    "device": (lambda a: {"x": a["x"].to("meta")}, "x: got .* on meta"),
    "scales_device": (lambda a: {"scales": a["scales"].to("meta")}, "scales: got .* on meta"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused(change, message):
    args = {"group_size": 32, **arguments()}
    args.update(change(args))
    with pytest.raises(ValueError, match=f"lut4_gemm: {message}"):
        lut4_gemm(**args)


def test_dequantize_refuses_other_dtypes():
    _, weight, _, _ = make(Case(0, 8, 64), F32)
    with pytest.raises(ValueError, match=r"dequantize_lut4: dtype: got torch\.float64"):
        dequantize_lut4(*weight, group_size=64, dtype=torch.float64)


def test_a_forced_backend_that_cannot_serve_is_an_error():
    with (
        llmkern.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="lut4_gemm: the cuda backend cannot serve"),
    ):
        lut4_gemm(**arguments(), group_size=32)

"""w4a16_gemm on the CPU: every instruction set, layout and dtype against float64; then the op itself."""

import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import llmkern
from llmkern._backends import compiled_module
from llmkern.formats.int4 import pack_codes
from llmkern.formats.int4_cpu import to_cpu_layout
from llmkern.ops import dequantize_int4, w4a16_gemm
from llmkern.reference.w4a16_gemm import dequantize_int4 as dequantize_reference
from llmkern.testing import assert_matches, random_int4_weight, relative_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ISAS = compiled_module("_cpu")[0].isas()
OP = sys.modules["llmkern.ops.w4a16_gemm"]  # the name in the package is the function's


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    group_size: int
    symmetric: bool = True
    bias: bool = False
    scale_dtype: torch.dtype = BF16


CASES = {
    "m0": Case(0, 64, 64, 32),
    "m1": Case(1, 128, 256, 128),
    "m1_one_block_of_one_row": Case(1, 1, 32, 32, bias=True),
    "m_odd_n_odd": Case(7, 67, 256, 64, symmetric=False, bias=True),
    "m_more_than_a_panel": Case(270, 65, 64, 64),
    "one_group": Case(2, 64, 128, 128, bias=True),
    "g32_asym": Case(3, 130, 96, 32, symmetric=False, scale_dtype=F16),
    "group_not_a_power_of_two": Case(5, 64, 320, 160, symmetric=False, scale_dtype=F32),
    "group_of_all_columns": Case(4, 66, 1024, 1024, bias=True, scale_dtype=F32),
    "m_more_than_a_tile": Case(18, 80, 320, 160, symmetric=False),
    "m_more_than_two_tiles": Case(45, 130, 192, 96),
    "several_threads": Case(9, 320, 512, 128, symmetric=False, bias=True),
}


def make(case, dtype, layout="canonical"):
    """x, weight in `layout`, bias, and the dense weight in float64."""
    weight = random_int4_weight(
        case.N, case.K, case.group_size, symmetric=case.symmetric, scale_dtype=case.scale_dtype
    )
    w = dequantize_reference(*weight, case.group_size, torch.float64)
    if layout == "cpu":
        weight = to_cpu_layout(*weight, case.group_size)
    bias = torch.randn(case.N).to(dtype) if case.bias else None
    return torch.randn(case.M, case.K).to(dtype), weight, bias, w


def exact(x, w, bias):
    y = x.double() @ w.t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64_in_both_layouts(backend, case, dtype, monkeypatch):
    monkeypatch.setattr(OP, "_DENSE_ROWS", {})  # the kernel, however many rows there are
    x, weight, bias, w = make(case, dtype)
    y = w4a16_gemm(x, *weight, bias, group_size=case.group_size)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))
    packed = to_cpu_layout(*weight, case.group_size)
    assert torch.equal(y, w4a16_gemm(x, *packed, bias, group_size=case.group_size, layout="cpu"))


@settings(max_examples=25, deadline=None)
@given(
    M=st.integers(1, 14),
    N=st.integers(1, 140),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    symmetric=st.booleans(),
    layout=st.sampled_from(["canonical", "cpu"]),
    dtype=st.sampled_from([F32, BF16]),
)
def test_any_shape_matches_float64(M, N, groups, group_size, symmetric, layout, dtype):
    case = Case(M, N, groups * group_size, group_size, symmetric, bias=True)
    x, weight, bias, w = make(case, dtype, layout)
    y = w4a16_gemm(x, *weight, bias, group_size=group_size, layout=layout)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))


@pytest.mark.parametrize("M", [1, 4, 5, 16, 48, 300])
def test_error_is_not_above_that_of_a_bfloat16_matmul(backend, M):
    x, weight, _, w = make(Case(M, 96, 1024, 128), BF16)
    spec = exact(x, w, None)
    error = relative_error(w4a16_gemm(x, *weight, group_size=128), spec)
    assert error <= relative_error(F.linear(x, w.to(BF16)), spec)


@pytest.mark.parametrize("spread", [1e-6, 1e4], ids=["one_element_dominates", "wide_range"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_outliers_in_x_cost_no_accuracy(backend, dtype, spread):
    case = Case(6, 96, 512, 128, symmetric=False)
    x, weight, bias, w = make(case, dtype)
    x = x * spread
    x[:, 17::128] = torch.randn(6, 4).to(dtype) * 1e3
    y = w4a16_gemm(x, *weight, bias, group_size=128)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_magnitude_of_x_costs_no_accuracy(backend, scale):
    case = Case(2, 64, 128, 64)
    x, weight, bias, w = make(case, F32)
    x = x * scale
    y = w4a16_gemm(x, *weight, bias, group_size=64)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.float(), bias))


@pytest.mark.parametrize("layout", ["canonical", "cpu"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_unit_vectors_return_the_weight_bit_for_bit(backend, dtype, layout):
    case = Case(0, 70, 96, 32, symmetric=False, scale_dtype=dtype)
    _, weight, _, _ = make(case, dtype, layout)
    y = w4a16_gemm(torch.eye(96, dtype=dtype), *weight, group_size=32, layout=layout)
    w = dequantize_int4(*weight, group_size=32, dtype=dtype, layout=layout)
    assert torch.equal(y.t(), w)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_strided_x_is_read_in_place(backend, dtype):
    x, weight, bias, _ = make(Case(5, 64, 128, 64, bias=True), dtype)
    wide = torch.full((5, 200), float("nan"), dtype=dtype)
    wide[:, 7:135] = x
    out = w4a16_gemm(wide[:, 7:135], *weight, bias, group_size=64)
    assert torch.equal(out, w4a16_gemm(x, *weight, bias, group_size=64))
    transposed = w4a16_gemm(x.t().contiguous().t(), *weight, bias, group_size=64)
    assert torch.equal(out, transposed)


def test_strided_bias_is_read_right(backend):
    x, weight, bias, w = make(Case(2, 64, 64, 64, bias=True), F32)
    strided = torch.stack((bias, torch.full_like(bias, float("nan"))), 1)[:, 0]
    y = w4a16_gemm(x, *weight, strided, group_size=64)
    assert_matches(y, exact(x, w, bias), F.linear(x, w.float(), bias))


def test_no_columns_leave_the_bias():
    bias = torch.randn(4)
    weight = torch.empty(4, 0, dtype=torch.int32), torch.empty(4, 0)
    y = w4a16_gemm(torch.empty(2, 0), *weight, None, bias, group_size=32)
    assert torch.equal(y, bias.expand(2, 4))


def test_leading_dimensions_are_kept(backend):
    x, weight, _, _ = make(Case(6, 40, 64, 32), F32)
    y = w4a16_gemm(x.view(2, 3, 64), *weight, group_size=32)
    assert y.shape == (2, 3, 40)
    assert torch.equal(y.view(6, 40), w4a16_gemm(x, *weight, group_size=32))
    torch.testing.assert_close(y[1, 2], w4a16_gemm(x[5], *weight, group_size=32))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_depends_on_nothing_but_itself(isa, dtype, monkeypatch):
    """Not on M, its neighbours, the threads, the layout or the instruction set.

    Rows of bfloat16 x are summed in another way on AMX, from five on, and by bfloat16 dot products:
    those tiers have bits of their own. What torch multiplies is left out.
    """
    monkeypatch.setattr(OP, "_DENSE_ROWS", {})
    case = Case(200, 256, 512, 128, symmetric=False, bias=True)
    x, weight, bias, _ = make(case, dtype)
    packed = to_cpu_layout(*weight, 128)
    cpu = compiled_module("_cpu")[0]
    before, threads = cpu.isa(), torch.get_num_threads()
    own_bits = {"amx": 5, "zen4": 1}.get(isa) if dtype == BF16 else None
    try:
        torch.set_num_threads(3)
        cpu.set_isa(ISAS[-1])
        spec = w4a16_gemm(x, *weight, bias, group_size=128)
        cpu.set_isa(isa)
        spec_of_many = w4a16_gemm(x, *weight, bias, group_size=128)
        assert own_bits is not None or torch.equal(spec_of_many, spec)
        torch.set_num_threads(1)
        for first, last in ((0, 1), (3, 5), (6, 9), (9, 13), (10, 17), (40, 75), (150, 200)):
            rows = slice(first, last)
            y = w4a16_gemm(x[rows], *packed, bias, group_size=128, layout="cpu")
            want = spec_of_many if own_bits and last - first >= own_bits else spec
            assert torch.equal(y, want[rows])
    finally:
        cpu.set_isa(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["canonical", "cpu"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_many_rows_without_byte_dot_products_match_float64(dtype, symmetric, layout, monkeypatch):
    cpu = compiled_module("_cpu")[0]
    before = cpu.isa()
    launched = []
    monkeypatch.setattr(OP, "launch_cpu", lambda *args: launched.append(args))
    monkeypatch.setattr(OP, "_DENSE_BYTES", 64 * 512 * 4)  # pieces of 64 rows; the last has 6
    try:
        for isa in set(OP._DENSE_ROWS) & set(cpu.isas()):
            cpu.set_isa(isa)
            rows = OP._DENSE_ROWS[isa][dtype != F32]
            case = Case(rows, 134, 512, 128, symmetric=symmetric, bias=True)
            x, weight, bias, w = make(case, dtype, layout)
            y = w4a16_gemm(x, *weight, bias, group_size=128, layout=layout)
            assert_matches(y, exact(x, w, bias), F.linear(x, w.to(dtype), bias))
            assert not launched
            w4a16_gemm(x[1:], *weight, bias, group_size=128, layout=layout)
            assert len(launched) == 1
            launched.clear()
    finally:
        cpu.set_isa(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_stay_in_their_row(backend, value):
    x, weight, _, _ = make(Case(9, 70, 256, 64), F32)
    clean = w4a16_gemm(x, *weight, group_size=64)
    x[4, 77] = value
    y = w4a16_gemm(x, *weight, group_size=64)
    others = [row for row in range(9) if row != 4]
    assert torch.equal(y[others], clean[others])
    assert not torch.isfinite(y[4]).any()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["canonical", "cpu"])
def test_gradients_match_float64(backend, dtype, layout):
    x, weight, bias, w = make(Case(5, 70, 96, 32, symmetric=False, bias=True), dtype, layout)
    grad = torch.randn(5, 70).to(dtype)
    x.requires_grad_()
    bias.requires_grad_()
    w4a16_gemm(x, *weight, bias, group_size=32, layout=layout).backward(grad)
    assert_matches(x.grad, grad.double() @ w, grad @ w.to(dtype))
    assert_matches(bias.grad, grad.double().sum(0), grad.sum(0))


@pytest.mark.parametrize("layout", ["canonical", "cpu"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_opcheck(layout, symmetric):
    x, weight, bias, _ = make(Case(3, 70, 64, 32, symmetric, bias=True), F32, layout)
    op = torch.ops.llmkern.w4a16_gemm.default
    torch.library.opcheck(
        op, (x.requires_grad_(), *weight, bias.requires_grad_(), 32, layout, "float")
    )


def test_compiles_without_a_graph_break():
    x, weight, bias, _ = make(Case(3, 70, 64, 32, bias=True), F32)
    x.requires_grad_()
    compiled = torch.compile(
        lambda x: w4a16_gemm(x, *weight, bias, group_size=32).relu(),
        fullgraph=True,
        backend="aot_eager",
    )
    y = compiled(x)
    assert torch.equal(y, w4a16_gemm(x, *weight, bias, group_size=32).relu())
    (grad,) = torch.autograd.grad(y.sum(), x)
    (eager,) = torch.autograd.grad(w4a16_gemm(x, *weight, bias, group_size=32).relu().sum(), x)
    assert torch.equal(grad, eager)


def arguments():
    x, (qweight, scales, _), bias, _ = make(Case(2, 16, 64, 32, bias=True), F32)
    zeros = pack_codes(torch.zeros(2, 16, dtype=torch.uint8), 4).t().contiguous()
    return {"x": x, "qweight": qweight, "scales": scales, "zeros": zeros, "bias": bias}


ERRORS = {
    "x_dtype": (lambda a: {"x": a["x"].double()}, "x: got float64"),
    "x_width": (lambda a: {"x": a["x"][:, :32]}, r"x: got float32 \[2, 32\].*\[M, 64\]"),
    "qweight_dtype": (lambda a: {"qweight": a["qweight"].long()}, "qweight: got int64"),
    "qweight_shape": (lambda a: {"qweight": a["qweight"][:, :4]}, r"qweight: got int32 \[16, 4\]"),
    "qweight_strided": (
        lambda a: {"qweight": a["qweight"].t().contiguous().t()},
        "qweight: got .* expected a contiguous tensor",
    ),
    "scales_dtype": (lambda a: {"scales": a["scales"].double()}, "scales: got float64"),
    "scales_vector": (lambda a: {"scales": a["scales"][0]}, "scales: got"),
    "scales_strided": (
        lambda a: {"scales": a["scales"].t().contiguous().t()},
        "scales: got .* expected a contiguous tensor",
    ),
    "zeros_dtype": (lambda a: {"zeros": a["zeros"].byte()}, "zeros: got uint8"),
    "zeros_shape": (lambda a: {"zeros": a["zeros"][:1]}, r"zeros: got int32 \[1, 2\]"),
    "bias_dtype": (lambda a: {"bias": a["bias"].half()}, r"bias: got float16 .*float32 \[16\]"),
    "bias_shape": (lambda a: {"bias": a["bias"][:8]}, r"bias: got float32 \[8\]"),
    "group_size_zero": (lambda a: {"group_size": 0}, "group_size: got 0"),
    "group_size_48": (lambda a: {"group_size": 48}, "group_size: got 48"),
    "layout": (lambda a: {"layout": "marlin"}, "layout: got 'marlin'"),
    "layout_of_the_other_kind": (lambda a: {"layout": "cpu"}, "qweight: got int32"),
    "device": (lambda a: {"x": a["x"].to("meta")}, "x: got .* on meta"),
}


@pytest.mark.parametrize(("change", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused(change, message):
    args = {"group_size": 32, **arguments()}
    args.update(change(args))
    with pytest.raises(ValueError, match=f"w4a16_gemm: {message}"):
        w4a16_gemm(**args)


def test_a_forced_backend_that_cannot_serve_is_an_error():
    args = arguments()
    with (
        llmkern.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="w4a16_gemm: the cuda backend cannot serve"),
    ):
        w4a16_gemm(**args, group_size=32)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="isa: got sse9"):
        compiled_module("_cpu")[0].set_isa("sse9")


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("M", [1, 6, 40])
def test_int8_activation_matches_its_definition(backend, M, dtype):
    x, weight, bias, w = make(Case(M, 70, 320, 160, symmetric=False, bias=True), dtype)
    x[0, 3] = 40.0
    y = w4a16_gemm(x, *weight, bias, group_size=160, activation="int8")
    q = torch.clamp((x.double() / x.double().abs().amax(1, keepdim=True) * 127).round(), -127, 127)
    rounded = q * x.double().abs().amax(1, keepdim=True) / 127
    # A near tie may fall to the other side in float32.
    assert relative_error(y, exact(rounded, w, bias)) < (1e-2 if dtype == BF16 else 2e-3)
    assert 1e-3 < relative_error(y, exact(x, w, bias)) < 5e-2


def test_int8_activation_is_per_row_and_handles_extremes(backend):
    x, weight, _, w = make(Case(7, 70, 128, 64), F32)
    x[2] = 0
    x[3] *= 1e-42
    x[4] *= 1e30
    x[5, 5] = float("inf")
    y = w4a16_gemm(x, *weight, group_size=64, activation="int8")
    assert torch.equal(y[2:4], torch.zeros(2, 70))
    assert not torch.isfinite(y[5]).any()
    for row in (0, 1, 4, 6):
        assert relative_error(y[row], exact(x[row], w, None)) < 2e-2


def test_int8_activation_is_refused_where_it_is_not_served():
    with pytest.raises(ValueError, match="activation: got 'int4', expected one of float, int8"):
        w4a16_gemm(**arguments(), group_size=32, activation="int4")

"""IntLinear: values in every form a weight can take, exact round trips, and torch's own machinery."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import llmkern
from llmkern import use_backend
from llmkern._backends import compiled_module
from llmkern.formats.int4 import QuantFormat
from llmkern.nn import IntLinear
from llmkern.testing import assert_matches

# bits, K, group size, symmetric
CASES = {
    "as_the_kernel_reads_it": (4, 128, 32, True),
    "zero_points": (4, 128, 64, False),
    "per_channel": (4, 96, None, True),
    "three_bits": (3, 128, 128, True),
    "three_bits_zero_points": (3, 96, 32, False),
    "two_bits_zero_points": (2, 64, 32, False),
    "k_not_a_multiple_of_32": (4, 100, None, True),
    "group_of_16": (4, 96, 16, False),
    "group_of_48_three_bits": (3, 144, 48, False),
}
N = 50
case = pytest.mark.parametrize("shape", CASES.values(), ids=CASES)


def parts(bits: int, K: int, group_size: int | None, symmetric: bool, rows: int = N):
    """Random codes, scales, zeros of one weight, and the weight itself in float64."""
    groups = K // (group_size or K)
    codes = torch.randint(0, 1 << bits, (rows, K), dtype=torch.uint8)
    scales = torch.rand(rows, groups) * 0.02 + 0.001
    zeros = None
    if not symmetric:
        zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8)
    centre = 1 << (bits - 1) if zeros is None else zeros.double()[..., None]
    w = scales.double()[..., None] * (codes.double().view(rows, groups, -1) - centre)
    return codes, scales, zeros, w.reshape(rows, K)


def make(shape, bias: bool = True) -> IntLinear:
    codes, scales, zeros, _ = parts(*shape)
    bias_values = torch.randn(N) if bias else None
    return IntLinear.from_parts(
        codes, scales, zeros, bias_values, bits=shape[0], group_size=shape[2]
    )


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in layer.state_dict().items()}


def assert_same_tensors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_matches_the_dense_layer(shape, dtype):
    codes, scales, zeros, w = parts(*shape)
    bias = torch.randn(N)
    layer = IntLinear.from_parts(codes, scales, zeros, bias, bits=shape[0], group_size=shape[2])
    x = torch.randn(2, 3, shape[1], dtype=dtype)
    spec = x.double() @ w.T + bias.to(dtype).double()
    like = nn.functional.linear(x, w.to(dtype), bias.to(dtype))
    assert_matches(layer(x), spec, like)


@case
def test_dequantize_before_and_after_the_first_pass(shape):
    codes, scales, zeros, w = parts(*shape)
    layer = IntLinear.from_parts(codes, scales, zeros, bits=shape[0], group_size=shape[2])
    assert torch.equal(layer.dequantize(), w.float())
    layer(torch.randn(1, shape[1]))
    assert torch.equal(layer.dequantize(), w.float())
    assert torch.equal(layer.to_linear().weight, w.float())


@case
@pytest.mark.parametrize(
    "copied",
    [
        lambda layer: layer,
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.to("cpu"),
        lambda layer: layer.half().float(),
    ],
    ids=["itself", "deepcopy", "pickle", "to_cpu", "half_float"],
)
def test_state_dict_survives_a_forward_pass(shape, copied):
    layer = make(shape, bias=False)
    before = snapshot(layer)
    x = torch.randn(3, shape[1])
    y = layer(x)
    other = copied(layer)
    assert_same_tensors(other.state_dict(), before)
    assert torch.equal(other(x), y)
    assert_same_tensors(other.state_dict(), before)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4]),
    group_size=st.integers(1, 70),
    groups=st.integers(1, 4),
    rows=st.integers(1, 40),
    symmetric=st.booleans(),
)
def test_any_shape_repacks_and_comes_back(bits, group_size, groups, rows, symmetric):
    codes, scales, zeros, w = parts(bits, group_size * groups, group_size, symmetric, rows)
    layer = IntLinear.from_parts(codes, scales, zeros, bits=bits, group_size=group_size)
    before = snapshot(layer)
    x = torch.randn(2, group_size * groups)
    assert_matches(layer(x), x.double() @ w.T, x @ w.float().T)
    assert_same_tensors(layer.state_dict(), before)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_tensors_are_those_of_compressed_tensors(bits, symmetric):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    shape = (bits, 128, 32, symmetric)
    codes, scales, zeros, _ = parts(*shape)
    layer = IntLinear.from_parts(codes, scales, zeros, bits=bits, group_size=32)
    layer(torch.randn(1, 128))
    saved = layer.state_dict()
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(saved["weight_packed"], helpers.pack_to_int32(signed, bits))
    if zeros is not None:
        signed = (zeros.int() - (1 << (bits - 1))).to(torch.int8)
        packed = helpers.pack_to_int32(signed, bits, packed_dim=0)
        assert torch.equal(saved["weight_zero_point"], packed)
    assert saved["weight_shape"].tolist() == [N, 128]


@case
def test_from_linear_rounds_to_nearest(shape):
    bits, K, group_size, symmetric = shape
    linear = nn.Linear(K, N).bfloat16().eval()
    layer = IntLinear.from_linear(linear, bits, group_size, symmetric)
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.dtype == layer.weight_scale.dtype == torch.bfloat16
    w = linear.weight.float().view(N, -1, group_size or K)
    step = layer.weight_scale.float()[..., None]
    error = (layer.dequantize(torch.float32).view_as(w) - w).abs() / step
    # Half a step, and a little where the extremes of a group lie beside the rounded grid's ends.
    assert error.max() <= 0.55


def test_from_linear_takes_a_conv1d():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    conv = Conv1D(N, 64)
    linear = nn.Linear(64, N)
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
    x = torch.randn(3, 64)
    pair = [IntLinear.from_linear(layer, group_size=32) for layer in (conv, linear)]
    assert torch.equal(pair[0](x), pair[1](x))


def test_conversions_keep_codes_and_scales():
    layer = IntLinear.from_linear(nn.Linear(64, N), group_size=32)
    before = snapshot(layer)
    layer.bfloat16()
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight_scale.dtype == torch.float32
    layer.type(torch.float16)
    after = layer.state_dict()
    assert after["bias"].dtype == torch.float16
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        assert torch.equal(after[name], before[name]), name


@case
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_backend_has_its_layout_and_no_second_copy(shape, backend):
    if backend == "cpu":
        assert compiled_module("_cpu")[0], "the compiled CPU kernels are missing"
    codes, scales, zeros, w = parts(*shape, rows=64)
    layer = IntLinear.from_parts(codes, scales, zeros, bits=shape[0], group_size=shape[2])
    before = snapshot(layer)
    x = torch.randn(3, shape[1])
    with use_backend(backend):
        y = layer(x)
    assert_matches(y, x.double() @ w.T, x @ w.float().T)
    if backend == "cpu":
        assert "layout=cpu" in repr(layer)
        assert "weight_packed" not in dict(layer.named_buffers())
    groups = shape[1] // (shape[2] or shape[1])
    padded = groups * (-(-shape[1] // groups // 32) * 32)
    assert sum(t.nbytes for t in layer.buffers()) <= 64 * (padded // 2 + groups * 5) + 16
    assert_same_tensors(layer.state_dict(), before)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_has_the_dtype_of_x(x_dtype):
    layer = make(CASES["zero_points"]).bfloat16()
    assert layer(torch.randn(2, 128, dtype=x_dtype)).dtype == x_dtype


def test_autocast_casts_x_like_linear():
    layer = make(CASES["zero_points"])
    x = torch.randn(2, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


@case
def test_gradient_reaches_x_and_bias(shape):
    layer = make(shape)
    x = torch.randn(3, shape[1], requires_grad=True)
    layer(x).square().sum().backward()
    dense = layer.to_linear()
    bias = nn.Parameter(layer.bias.detach().clone())
    x_dense = x.detach().clone().requires_grad_()
    nn.functional.linear(x_dense, dense.weight.detach(), bias).square().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


def test_training_after_a_first_pass_in_inference_mode():
    layer = make(CASES["three_bits"])
    with torch.inference_mode():
        layer(torch.randn(1, 128))
    x = torch.randn(1, 128, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["as_the_kernel_reads_it", "group_of_16", "three_bits"])
def test_compiles_as_one_graph_before_any_eager_pass(name):
    torch._dynamo.reset()
    layer = make(CASES[name])
    before = snapshot(layer)
    x = torch.randn(3, CASES[name][1])
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert_same_tensors(compiled._orig_mod.state_dict(), before)
    compiled.bfloat16()
    assert compiled(x.bfloat16()).dtype == torch.bfloat16


def test_export_leaves_the_layer_intact():
    layer = make(CASES["three_bits"])
    before = snapshot(layer)
    x = torch.randn(2, 128)
    program = torch.export.export(layer, (x,), strict=False)
    assert_same_tensors(layer.state_dict(), before)
    assert torch.equal(program.module()(x), layer(x))


def test_two_threads_may_share_the_first_pass():
    layer = make(CASES["group_of_16"])
    x = torch.randn(2, 96)
    wanted = copy.deepcopy(layer)(x)
    with ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: layer(x), range(8)):
            assert torch.equal(y, wanted)


@pytest.mark.parametrize("offload_buffers", [False, True], ids=["weights", "buffers_too"])
def test_runs_under_offloading_hooks(offload_buffers):
    accelerate = pytest.importorskip("accelerate")
    layer = make(CASES["three_bits_zero_points"])
    x = torch.randn(2, 96)
    wanted = copy.deepcopy(layer)(x)
    model = accelerate.cpu_offload(nn.Sequential(layer), "cpu", offload_buffers=offload_buffers)
    for _ in range(2):
        assert torch.equal(model(x), wanted)


def test_weight_answers_without_expanding(monkeypatch):
    layer = make(CASES["three_bits"]).bfloat16()
    monkeypatch.setattr(IntLinear, "dequantize", None)
    weight = layer.weight
    assert (weight.dtype, weight.device.type) == (torch.bfloat16, "cpu")
    assert tuple(weight.shape) == (N, 128)
    assert "weight" not in dict(layer.named_parameters())


def test_weight_reads_as_dense():
    layer = make(CASES["three_bits"])
    x = torch.randn(2, 128)
    spec = x @ layer.dequantize().T
    torch.testing.assert_close(nn.functional.linear(x, layer.weight), spec)
    torch.testing.assert_close(x @ layer.weight.t(), spec)
    assert (layer.weight.numpy() == layer.dequantize().numpy()).all()
    assert torch.equal(copy.deepcopy(layer.weight), layer.dequantize())


@case
@pytest.mark.parametrize("assign", [True, False], ids=["assign_to_meta", "copy"])
def test_loads_into_a_fresh_layer(shape, assign):
    layer = make(shape)
    x = torch.randn(2, shape[1])
    fresh = IntLinear(
        shape[1],
        N,
        format=layer.format,
        device="meta" if assign else None,
        # The scales' dtype is the file's, not the skeleton's.
        dtype=torch.bfloat16,
    )
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert fresh.weight_scale.dtype == torch.float32
    if assign:
        assert torch.equal(fresh(x), layer(x))


def test_loading_replaces_a_repacked_weight():
    one, two = make(CASES["three_bits"]), make(CASES["three_bits"])
    x = torch.randn(2, 128)
    assert not torch.equal(one(x), two(x))
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(x), two(x))


WRONG = {
    "packed_shape": ("weight_packed", lambda t: t[:, 1:], r"weight_packed: got int32 \[50, 11\]"),
    "packed_dtype": ("weight_packed", lambda t: t.float(), "weight_packed: got float32"),
    "scale_shape": ("weight_scale", lambda t: t[1:], r"weight_scale: got float32 \[49, 1\]"),
    "scale_dtype": ("weight_scale", lambda t: t.double(), "weight_scale: got float64"),
    "shape": ("weight_shape", lambda t: t.flip(0), r"weight_shape: got \[128, 50\]"),
    "zero_point": ("weight_zero_point", lambda t: t[1:], r"weight_zero_point: got int32 \[4, 1\]"),
    "bias": ("bias", lambda t: t[1:], r"bias: got float32 \[49\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_load_names_the_wrong_tensor(name):
    key, spoil, message = WRONG[name]
    layer = make((3, 128, 128, False))
    wrong = {**layer.state_dict(), key: spoil(layer.state_dict()[key])}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(wrong)


def test_load_needs_the_zero_points_that_the_format_has():
    layer = make((4, 128, 128, False))
    tensors = layer.state_dict()
    without = {name: t for name, t in tensors.items() if name != "weight_zero_point"}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_zero_point"):
        layer.load_state_dict(without)
    symmetric = IntLinear(128, N, format=QuantFormat(4, 128, True))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_zero_point"):
        symmetric.load_state_dict(tensors)


BAD = {
    "eight_bits": (lambda: IntLinear(64, 8, format=QuantFormat(8, 32)), "bits: got 8"),
    "group": (lambda: IntLinear(64, 8, format=QuantFormat(4, 48)), "group_size: got 48"),
    "x_width": (lambda: make(CASES["zero_points"])(torch.randn(2, 64)), r"x: got \[2, 64\]"),
    "codes_dtype": (
        lambda: IntLinear.from_parts(torch.zeros(8, 64), torch.ones(8, 1), group_size=64),
        "codes: got torch.float32",
    ),
    "code_too_large": (
        lambda: IntLinear.from_parts(
            torch.full((8, 64), 9, dtype=torch.uint8), torch.ones(8, 1), bits=3, group_size=64
        ),
        "codes: got a value of 9",
    ),
    "nan_scale": (
        lambda: IntLinear.from_parts(
            torch.zeros(8, 64, dtype=torch.uint8), torch.full((8, 1), torch.nan), group_size=64
        ),
        "weight_scale: got NaN or Inf",
    ),
    "nan_weight": (
        lambda: IntLinear.from_linear(nn.Linear(64, 8).to_empty(device="cpu").apply(spoil)),
        "got NaN or Inf",
    ),
    "not_a_linear": (lambda: IntLinear.from_linear(nn.LayerNorm(8)), "linear: got LayerNorm"),
}


def spoil(linear: nn.Module) -> None:
    nn.init.constant_(linear.weight, torch.inf)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_shows_the_format_and_the_layout():
    layer = make(CASES["three_bits"])
    assert "bits=3, group_size=128, symmetric=True, layout=file" in repr(layer)


def test_old_name_stays_importable() -> None:
    assert llmkern.Int4Linear is llmkern.nn.Int4Linear is llmkern.IntLinear

"""Lut4Linear: values, state dicts in both forms, repacking, moving, copying, training on top."""

import copy
import io

import pytest
import torch
from torch import nn

import llmkern
from llmkern.formats.lut4 import FP4_CODEBOOK, NF4_CODEBOOK
from llmkern.nn import Lut4Linear
from llmkern.testing import assert_matches, relative_error

BNB_KEYS = {"weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"}
BOOK = torch.linspace(-1, 1, 16) ** 3


def linear(K=96, N=40, bias=True, dtype=torch.float32):
    return nn.Linear(K, N, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("book", ["nf4", "fp4", BOOK], ids=["nf4", "fp4", "own"])
def test_multiplies_with_the_weight_that_it_dequantizes(book, dtype):
    dense = linear(dtype=dtype)
    packed = Lut4Linear.from_linear(dense, book, 32)
    x = torch.randn(2, 3, 96).to(dtype)
    w = packed.dequantize(torch.float32)
    spec = x.double() @ w.double().t() + dense.bias.double()
    assert_matches(packed(x), spec, nn.functional.linear(x, w.to(dtype), dense.bias))
    assert packed.bias is dense.bias
    assert torch.equal(packed.to_linear().weight, w.to(dtype))


@pytest.mark.parametrize(("block", "most"), [(32, 0.1), (64, 0.105), (256, 0.125)])
def test_nf4_keeps_a_normal_weight_within_its_known_error(block, most):
    dense = linear(512, 256)
    nn.init.normal_(dense.weight)
    w = Lut4Linear.from_linear(dense, "nf4", block).dequantize()
    assert 0.05 < relative_error(w, dense.weight.detach()) < most


@pytest.mark.parametrize("repacked", [False, True])
def test_nf4_state_dict_is_that_of_bitsandbytes(repacked):
    packed = Lut4Linear.from_linear(linear(), "nf4", 64)  # blocks cross the rows of 96
    plain = packed.state_dict()
    if repacked:
        packed(torch.randn(1, 96))
        assert packed._layout == "cpu"
    state = packed.state_dict()
    assert set(state) == BNB_KEYS | {"bias"}
    assert state["weight"].shape == (96 * 40 // 2, 1)
    assert state["weight.absmax"].shape == (60,)
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    assert set(Lut4Linear.from_linear(linear(), "fp4").state_dict()) > {
        "weight.quant_state.bitsandbytes__fp4"
    }


def test_other_books_are_saved_canonically():
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    rows = Lut4Linear.from_parts(codes, torch.randn(5, 16), group_size=32)
    assert set(rows.state_dict()) == {"weight_packed", "weight_codebook"}
    assert torch.equal(rows.dequantize(), rows.weight_codebook.gather(1, codes.long()))
    own = Lut4Linear.from_linear(linear(), BOOK, 32)
    assert set(own.state_dict()) == {"weight_packed", "weight_codebook", "weight_scale", "bias"}


@pytest.mark.parametrize("book", ["nf4", BOOK], ids=["nf4", "own"])
def test_state_dict_loads_inside_a_model(book):
    source = nn.Sequential(Lut4Linear.from_linear(linear(), book, 32), nn.ReLU())
    target = nn.Sequential(Lut4Linear.from_linear(linear(), book, 32), nn.ReLU())
    x = torch.randn(4, 96)
    target(x)
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(target(x), source(x))


def test_from_bitsandbytes_takes_its_tensors_and_bias():
    packed = Lut4Linear.from_linear(linear(), "nf4", 64)
    again = Lut4Linear.from_bitsandbytes(packed.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(again(x), packed(x))
    assert (again.block_size, again.group_size, again.dtype) == (64, 32, torch.float32)


def test_dtype_conversions_touch_the_bias_alone():
    packed = Lut4Linear.from_linear(linear(), "nf4", 32)
    before = packed.state_dict()
    packed(torch.randn(1, 96))
    packed.half()
    assert packed.dtype == packed.weight.dtype == packed.bias.dtype == torch.float16
    for name in ("weight", "weight.absmax", "weight.quant_map"):
        assert torch.equal(packed.state_dict()[name], before[name])
    assert packed(torch.randn(1, 96).half()).dtype == torch.float16


def test_copies_and_pickles_hold_the_file_tensors():
    packed = Lut4Linear.from_linear(linear(), BOOK, 32)
    x = torch.randn(2, 96)
    y = packed(x)
    stream = io.BytesIO()
    torch.save(packed, stream)
    stream.seek(0)
    for other in (copy.deepcopy(packed), torch.load(stream, weights_only=False)):
        assert other._layout is None
        assert torch.equal(other(x), y)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_forced_backends_agree(name):
    packed = Lut4Linear.from_linear(linear(), "fp4", 32)
    x = torch.randn(2, 96)
    with llmkern.use_backend(name):
        y = packed(x)
    torch.testing.assert_close(y, packed.to_linear()(x))


def test_gradients_reach_x_and_bias():
    packed = Lut4Linear.from_linear(linear(), "nf4", 32)
    x = torch.randn(5, 96, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(5, 96))
    assert torch.equal(packed.bias.grad, torch.full((40,), 5.0))


def test_compiles_without_a_graph_break():
    packed = Lut4Linear.from_linear(linear(), "nf4", 32)
    x = torch.randn(5, 96)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), packed(x))


def test_autocast_lowers_x():
    packed = Lut4Linear.from_linear(linear(), "nf4", 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(1, 96)).dtype == torch.bfloat16


CODES = torch.zeros(4, 64, dtype=torch.uint8)
ERRORS = {
    "unknown_book": (lambda: Lut4Linear.from_linear(linear(), "nf3"), "codebook: got 'nf3'"),
    "rows_of_80": (lambda: Lut4Linear.from_linear(linear(80)), "block: got 64 for rows of K = 80"),
    "group_size": (
        lambda: Lut4Linear.from_parts(CODES, NF4_CODEBOOK, group_size=48),
        "group_size: got 48",
    ),
    "scales": (
        lambda: Lut4Linear.from_parts(CODES, NF4_CODEBOOK, torch.ones(4, 1), group_size=32),
        r"weight_scale: got float32 \[4, 1\]",
    ),
    "bias": (
        lambda: Lut4Linear.from_parts(CODES, NF4_CODEBOOK, bias=torch.ones(5), group_size=32),
        r"bias: got float32 \[5\]",
    ),
    "odd_k": (
        lambda: Lut4Linear.from_parts(CODES[:, :40], NF4_CODEBOOK, group_size=32),
        r"codes: got \[4, 40\]",
    ),
    "width_of_x": (
        lambda: Lut4Linear.from_linear(linear())(torch.zeros(1, 64)),
        r"x: got \[1, 64\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_state_dict_of_another_shape_or_block_is_refused():
    packed = Lut4Linear.from_linear(linear(), "nf4", 32)
    other = Lut4Linear.from_linear(linear(), "nf4", 64)
    with pytest.raises(RuntimeError, match=r"weight: got .* in blocks of 64, expected .* of 32"):
        packed.load_state_dict(other.state_dict())
    own = Lut4Linear.from_linear(linear(), FP4_CODEBOOK * 0.5, 32)
    with pytest.raises(RuntimeError, match=r"weight_packed: got int32 \[5, 12\]"):
        own.load_state_dict({**own.state_dict(), "weight_packed": own.weight_packed[:5]})

"""Sparse24Linear and Sparse24Int4Linear: drop-in, exact, nothing lost on the way through the kernels."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmkern
from llmkern import IntLinear, Sparse24Int4Linear, Sparse24Linear
from llmkern.testing import (
    assert_matches,
    random_sparse24_int4_weight,
    random_sparse24_weight,
    relative_error,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def sparse_linear(N=48, K=96, dtype=F32, bias=True):
    """A dense linear with a 2:4 sparse weight."""
    from llmkern.formats.sparse24 import decompress

    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    linear.weight.data = decompress(*random_sparse24_weight(N, K, dtype))
    return linear


def int4_layer(N=48, K=192, symmetric=True, dtype=F32):
    from llmkern.formats.int4 import unpack_zeros
    from llmkern.formats.sparse24 import decompress_codes

    qvalues, meta, scales, zeros = random_sparse24_int4_weight(N, K, 64, symmetric=symmetric)
    points = None if zeros is None else unpack_zeros(zeros, 4, N)
    codes, mask = decompress_codes(qvalues, meta, points)
    parts = (codes, scales.to(dtype), points, torch.randn(N).to(dtype))
    return Sparse24Int4Linear.from_parts(*parts, group_size=64, mask=mask)


MAKE = {
    "floats": lambda **kw: Sparse24Linear.from_linear(sparse_linear(**kw)),
    "floats_n_odd": lambda **kw: Sparse24Linear.from_linear(sparse_linear(N=37, K=40, **kw)),
    "codes": int4_layer,
    "codes_n_odd": lambda **kw: int4_layer(N=37, **kw),
    "codes_zeros": lambda **kw: int4_layer(symmetric=False, **kw),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_forward_matches_the_dense_layer(make, dtype):
    layer = make(dtype=dtype)
    x = torch.randn(2, 3, layer.in_features).to(dtype)
    y = layer(x)
    w = layer.dequantize(F32).double()
    assert_matches(
        y, x.double() @ w.t() + layer.bias.double(), F.linear(x, w.to(dtype), layer.bias)
    )
    assert layer._layout in ("cpu", None, "canonical")
    assert isinstance(layer, nn.Linear)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_state_survives_the_kernel_layout_bit_for_bit(make):
    layer = make()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(3, layer.in_features)
    y = layer(x)
    for other in (
        layer,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        layer.to(torch.device("cpu")),
    ):
        after = other.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], t) for name, t in before.items())
        assert torch.equal(other(x), y)
    empty = make()
    empty.load_state_dict(before)
    assert torch.equal(empty(x), y)


@pytest.mark.parametrize("make", [MAKE["floats"], MAKE["codes_zeros"]])
def test_meta_layer_is_loaded_by_assignment(make):
    layer = make()
    x = torch.randn(3, layer.in_features)
    meta = make().to("meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))


def test_floats_are_saved_as_the_dense_linear_and_loaded_from_it():
    linear = sparse_linear()
    layer = Sparse24Linear.from_linear(linear)
    layer(torch.randn(1, 96))
    assert layer.state_dict().keys() == linear.state_dict().keys()
    linear.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight.clone(), linear.weight)
    stream = io.BytesIO()
    torch.save(linear.state_dict(), stream)
    stream.seek(0)
    other = Sparse24Linear(96, 48)
    other.load_state_dict(torch.load(stream))
    assert torch.equal(other.to_linear().weight, linear.weight)
    bad = {**linear.state_dict(), "weight": torch.ones(48, 96)}
    with pytest.raises(RuntimeError, match="weight: got 4 kept of 4 in row 0, columns 0"):
        other.load_state_dict(bad)
    assert torch.equal(other.to_linear().weight, linear.weight)
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        other.load_state_dict({"bias": linear.bias})


def test_codes_are_saved_as_the_int4_layer_and_loaded_from_it():
    layer = int4_layer(symmetric=False)
    dense = IntLinear(192, 48, format=layer.format)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(3, 192)
    assert relative_error(layer(x), dense(x)) < 1e-5
    assert torch.equal(layer.dequantize(), dense.dequantize())
    crowded = IntLinear.from_linear(nn.Linear(192, 48), group_size=64, symmetric=False)
    with pytest.raises(RuntimeError, match=r"weight_packed: got [34] kept of 4 in row 0"):
        layer.load_state_dict(crowded.state_dict())


def test_only_what_is_kept_is_held_and_counted():
    linear = sparse_linear(N=64, K=256, bias=False)
    layer = Sparse24Linear.from_linear(linear)
    layer(torch.randn(1, 256))
    held = sum(b.nbytes for b in layer.buffers())
    assert held == linear.weight.nbytes * (1 / 2 + 1 / 32)
    from llmkern.evaluate import weight_bytes

    assert weight_bytes(layer) == held
    codes = int4_layer(N=64, K=256)
    before = sum(b.nbytes for b in codes.buffers())
    codes(torch.randn(1, 256))
    after = sum(b.nbytes for b in codes.buffers())
    assert before - after == 64 * 256 // 8


def test_rounding_keeps_the_zeros():
    linear = sparse_linear(K=256)
    for symmetric in (True, False):
        layer = Sparse24Int4Linear.from_linear(linear, group_size=64, symmetric=symmetric)
        assert bool((layer.dequantize()[linear.weight == 0] == 0).all())
        assert relative_error(layer(torch.eye(256)).t(), linear.weight + linear.bias[:, None]) < 0.2


def test_dtype_changes_round_as_those_of_a_linear():
    linear = sparse_linear()
    layer = Sparse24Linear.from_linear(linear)
    x = torch.randn(3, 96)
    layer(x)
    layer.to(BF16)
    assert layer.dtype == layer.weight.dtype == layer(x.to(BF16)).dtype == BF16
    assert torch.equal(layer.dequantize(), linear.weight.to(BF16))
    with pytest.raises(
        ValueError, match=r"x: got float32 .* expected the dtype of values, bfloat16"
    ):
        layer(x)
    with torch.autocast("cpu", dtype=F16):
        y = layer(x.to(BF16))
    assert y.dtype == F16


@pytest.mark.parametrize("make", [MAKE["floats"], MAKE["codes"]])
def test_gradients_reach_x_and_bias_through_the_kernel_layout(make):
    layer = make()
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert_matches(
        x.grad,
        layer.dequantize().double().sum(0).expand(3, -1),
        layer.dequantize().sum(0).expand(3, -1),
    )
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 3))


@pytest.mark.parametrize("make", [MAKE["floats"], MAKE["codes"]])
def test_compiles_without_a_graph_break(make):
    layer = make()
    x = torch.randn(3, layer.in_features)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("make", [MAKE["floats"], MAKE["codes"]])
def test_reference_backend_serves_the_layers(make):
    layer = make()
    x = torch.randn(3, layer.in_features)
    with llmkern.use_backend("reference"):
        spec = layer(x)
        assert layer._layout != "cpu"
    assert relative_error(layer(x), spec) < 1e-6


def test_bad_input_is_refused():
    linear = nn.Linear(96, 48)
    with pytest.raises(ValueError, match="got 4 kept of 4 in row 0, columns 0"):
        Sparse24Linear.from_linear(linear)
    with pytest.raises(ValueError, match=r"weight_packed: got [34] kept of 4 in row 0"):
        Sparse24Int4Linear.from_linear(nn.Linear(128, 48))
    with pytest.raises(ValueError, match="in_features: got 12, expected a multiple of 8"):
        Sparse24Linear(12, 4)
    with pytest.raises(ValueError, match="bits: got 3, expected 4"):
        Sparse24Int4Linear(128, 4, format=llmkern.QuantFormat(3, 128))
    with pytest.raises(ValueError, match="group_size: got 48, expected a multiple of 32"):
        Sparse24Int4Linear(96, 4, format=llmkern.QuantFormat(4, 48))
    values, meta = random_sparse24_weight(4, 32, F32)
    with pytest.raises(ValueError, match=r"bias: got \[5\] on cpu, expected \[4\]"):
        Sparse24Linear.from_parts(values, meta, torch.zeros(5))
    with pytest.raises(ValueError, match="meta: got 0x0 in row 0"):
        Sparse24Linear.from_parts(values, meta * 0)
    with pytest.raises(ValueError, match=r"x: got \[2, 31\], expected \[..., 32\]"):
        Sparse24Linear.from_parts(values, meta)(torch.zeros(2, 31))

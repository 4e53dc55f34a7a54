"""No write to the weight of a packed layer is lost: it makes the layer dense, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmkern import Int4Linear, Lut4Linear, QuantFormat, Sparse24Int4Linear, Sparse24Linear
from llmkern.nn import PackedWeight, is_packed
from llmkern.nn.packed import PACKED

N, K = 32, 64
ONES = torch.ones(N, K)
DENSE = pytest.warns(UserWarning, match="got a write, so this .* is a dense nn.Linear")


def linear() -> nn.Linear:
    made = nn.Linear(K, N)
    made.weight.data.view(-1, 4)[:, 1:3] = 0
    return made


MAKE: dict[str, Callable[[], Any]] = {
    "int4": lambda: Int4Linear.from_linear(linear(), group_size=32),
    "lut4": lambda: Lut4Linear.from_linear(linear()),
    "sparse24": lambda: Sparse24Linear.from_linear(linear()),
    "sparse24_int4": lambda: Sparse24Int4Linear.from_linear(linear(), group_size=32),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def assign_data(w: Tensor) -> None:
    w.data = 2 * ONES


def add_to_data(w: Tensor) -> None:
    w.data += ONES


def subtract_and_multiply(w: Tensor) -> None:
    w.data -= ONES
    w.mul_(2)


def write_a_row(w: Tensor) -> None:
    w[3] = 1.0


def write_where_positive(w: Tensor) -> None:
    w[w > 0] = 0.5


def write_the_transpose(w: Tensor) -> None:
    w.t()[2].copy_(torch.arange(N))


def write_a_chunk(w: Tensor) -> None:
    w.chunk(2)[1].zero_()


def write_rows_one_by_one(w: Tensor) -> None:
    for row in w:
        row.fill_(3)


def scatter_into_the_flat_data(w: Tensor) -> None:
    w.data.reshape(-1).scatter_add_(0, torch.arange(5), torch.ones(5))


def write_as_output(w: Tensor) -> None:
    torch.add(ONES, 1, out=w)


def write_in_a_list(w: Tensor) -> None:
    torch._foreach_mul_([w], 2.0)


def initialise(w: Tensor) -> None:
    nn.init.constant_(w, 0.1)


def from_a_vector(w: Tensor) -> None:
    nn.utils.vector_to_parameters(torch.arange(float(N * K)), [w])


WRITES = [
    assign_data,
    add_to_data,
    subtract_and_multiply,
    write_a_row,
    write_where_positive,
    write_the_transpose,
    write_a_chunk,
    write_rows_one_by_one,
    scatter_into_the_flat_data,
    write_as_output,
    write_in_a_list,
    initialise,
    from_a_vector,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "ran"])
def test_a_write_is_what_it_is_on_a_dense_layer(write: Callable[[Tensor], None], ran: bool) -> None:
    layer = MAKE["int4"]()
    x = torch.randn(2, K)
    if ran:
        layer(x)
    dense = copy.deepcopy(layer).to_linear()
    before = layer.weight
    with torch.no_grad():
        write(dense.weight)
        with DENSE:
            write(layer.weight)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer.weight, dense.weight)
    torch.testing.assert_close(layer(x), dense(x))
    assert torch.equal(before, layer.weight), "a stand-in from before reads what was written"


@kinds
def test_the_layer_is_a_plain_linear_afterwards(kind: str) -> None:
    layer, x = MAKE[kind](), torch.randn(2, K)
    bias, wanted = layer.bias, layer.dequantize()
    layer(x)
    with DENSE:
        layer.weight.data += 1
    assert type(layer) is nn.Linear
    assert layer.bias is bias
    torch.testing.assert_close(layer.weight, nn.Parameter(wanted + 1))
    assert not layer.weight.requires_grad, "as it was"
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert set(vars(layer)) == set(vars(linear())), "nothing of the packed layer is left"
    copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16())


@kinds
@pytest.mark.parametrize("kept", [True, False], ids=["parameter", "tensor"])
def test_an_assigned_weight_takes_its_place(kind: str, kept: bool) -> None:
    layer, new = MAKE[kind](), nn.Parameter(torch.randn(N, K))
    with DENSE:
        layer.weight = new if kept else new.detach()
    assert type(layer) is nn.Linear
    assert layer.weight.data_ptr() == new.data_ptr()
    assert (layer.weight is new) is kept


def test_assigning_its_own_weight_changes_nothing() -> None:
    layer = MAKE["int4"]()
    layer.weight = layer.weight
    weight = layer.weight
    weight.data = layer.weight.data
    assert is_packed(layer)


def test_another_packed_weight_is_taken_by_its_values() -> None:
    layer, other = MAKE["int4"](), MAKE["lut4"]()
    with DENSE:
        layer.weight = other.weight
    assert is_packed(other)
    assert torch.equal(layer.weight, other.dequantize())
    with DENSE:
        other.weight.data = layer.weight.data
    assert torch.equal(layer.weight, other.weight)


def test_a_parameter_that_takes_over_what_was_written_has_its_values() -> None:
    layer = MAKE["int4"]()
    weight = layer.weight
    with DENSE:
        weight.data -= ONES
    wanted = layer.weight.detach().clone()
    layer.weight.data = weight
    torch.testing.assert_close(layer(torch.eye(K)), wanted.t() + layer.bias)


def test_a_layer_behind_a_hook_of_accelerates_runs_dense() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer, x = MAKE["int4"](), torch.randn(2, K)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu"))
    layer(x)
    with DENSE:
        layer.weight.data *= 2
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_write_under_inference_mode_leaves_a_weight_that_trains() -> None:
    layer = MAKE["int4"]()
    with torch.inference_mode(), DENSE:
        layer.weight = 2 * ONES
    x = torch.randn(2, K, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "training_it": (
        lambda layer: layer.weight.requires_grad_(True),
        RuntimeError,
        "got requires_grad = True, expected False: .* train an adapter",
    ),
    "unfreezing_it": (
        lambda layer: setattr(layer.weight, "requires_grad", True),
        RuntimeError,
        "got requires_grad = True, expected False",
    ),
    "a_parameter_of_it": (
        lambda layer: nn.Parameter(layer.weight),
        RuntimeError,
        "got requires_grad = True, expected False",
    ),
    "sharing_its_memory": (
        lambda layer: torch.from_dlpack(layer.weight),
        RuntimeError,
        "got __dlpack__, expected no access to its memory",
    ),
    "another_shape": (
        lambda layer: setattr(layer, "weight", torch.ones(N, 8)),
        ValueError,
        r"weight: got \[32, 8\], expected \[32, 64\]",
    ),
    "no_tensor": (
        lambda layer: setattr(layer, "weight", None),
        TypeError,
        "weight: got NoneType, expected a tensor",
    ),
    "data_of_a_view": (
        lambda layer: setattr(layer.weight.t(), "data", torch.ones(K, N)),
        RuntimeError,
        "got a view to assign .data to",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_kept_is_refused(what: str) -> None:
    attempt, error, message = REFUSED[what]
    layer = MAKE["int4"]()
    with pytest.raises(error, match=message):
        attempt(layer)
    assert is_packed(layer)


def test_an_array_of_it_is_read_only() -> None:
    array = MAKE["int4"]().weight.numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_a_layer_without_values_cannot_be_written() -> None:
    layer = Int4Linear(K, N, format=QuantFormat(4, 32), device="meta")
    with pytest.raises(RuntimeError, match=r"got a write while the layer's tensors are .* on meta"):
        layer.weight.data += 1
    assert is_packed(layer)


def test_a_layer_that_is_to_be_trained_itself_becomes_dense() -> None:
    layer = MAKE["int4"]()
    wanted = layer.dequantize()
    layer.requires_grad_(False)
    assert is_packed(layer)
    with DENSE:
        assert layer.requires_grad_(True) is layer
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, wanted)


def test_views_that_are_read_are_not_written() -> None:
    layer = MAKE["int4"]()
    w = layer.dequantize()
    for view in (
        lambda t: t[3:5, ::2],
        lambda t: t.t().reshape(-1),
        lambda t: t.split(8)[2],
        lambda t: t.view(N, 2, -1).permute(2, 0, 1),
        lambda t: t.diagonal(),
        lambda t: t.detach().unbind(1)[7],
    ):
        assert isinstance(view(layer.weight), Tensor)
        assert torch.equal(view(layer.weight) + 0, view(w) + 0)
        assert view(layer.weight).stride() == view(w).stride()
    assert isinstance(layer.weight.t(), PackedWeight)
    assert is_packed(layer)


def test_every_packed_module_is_tried_here() -> None:
    assert {type(make()) for make in MAKE.values()} == {*PACKED}

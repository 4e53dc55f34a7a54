"""Weights of linears as [N, K], whichever way they are stored; what is shared, and what holds stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llmkern
from llmkern.models.experts import find_expert_matrices
from llmkern.models.heads import is_head, is_router, shared_weights
from llmkern.models.linears import (
    dense_weight,
    find_linears,
    is_conv1d,
    is_linear,
    keep_columns,
    keep_rows,
    set_weight,
    shape_of,
    weight_rows,
    write_weight,
)
from llmkern.patch import expand_packed
from tests.helpers.tiny_models import tiny


def conv1d(N: int, K: int) -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(N, K)


@pytest.fixture(params=["linear", "conv1d"])
def linear(request: pytest.FixtureRequest) -> nn.Module:
    return nn.Linear(64, 48) if request.param == "linear" else conv1d(48, 64)


def product(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x @ weight_rows(linear).t() + linear.bias


def test_weight_is_out_features_by_in_features(linear: nn.Module) -> None:
    x = torch.randn(5, 64)
    assert shape_of(linear) == (48, 64)
    assert weight_rows(linear).data_ptr() == linear.weight.data_ptr()
    assert torch.equal(dense_weight(linear), weight_rows(linear))
    assert dense_weight(linear).is_contiguous()
    torch.testing.assert_close(linear(x), product(linear, x))


def test_weight_is_written_in_place(linear: nn.Module) -> None:
    parameter, new = linear.weight, torch.randn(48, 64, requires_grad=True)
    write_weight(linear, new)
    assert linear.weight is parameter
    assert parameter.is_leaf
    assert torch.equal(weight_rows(linear), new)


def test_sizes_follow_the_weight(linear: nn.Module) -> None:
    set_weight(linear, torch.randn(48, 32))
    keep_rows(linear, torch.tensor([7, 3]))
    keep_columns(linear, torch.arange(16))
    assert shape_of(linear) == (2, 16)
    torch.testing.assert_close(linear(torch.ones(1, 16)), product(linear, torch.ones(1, 16)))


def test_packed_linears_have_a_shape_and_values() -> None:
    layer = llmkern.IntLinear.from_linear(nn.Linear(64, 48), 4, 32)
    assert is_linear(layer)
    assert shape_of(layer) == (48, 64)
    assert dense_weight(layer).shape == (48, 64)


def test_other_modules_are_refused() -> None:
    assert not is_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="linear: got Embedding, expected"):
        dense_weight(nn.Embedding(3, 4))


def test_a_shared_linear_is_found_under_each_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Embedding(4, 4)})
    model["again"] = model["a"]
    model["c"].weight = model["b"].weight
    assert list(find_linears(model)) == ["a", "b", "again"]
    assert list(shared_weights(model).values()) == [["b", "c"]]


def test_heads_and_routers_go_by_the_last_name() -> None:
    assert is_head("lm_head")
    assert is_head("model.score")
    assert not is_head("lm_head.inner")
    assert is_router("layers.0.mlp.gate")
    assert not is_router("layers.0.mlp.gate_proj")


def test_stacked_matrices_are_found_and_convolutions_are_not() -> None:
    model = nn.ModuleDict({"experts": nn.Module(), "conv": nn.Conv1d(4, 4, 3)})
    model["experts"].up = nn.Parameter(torch.zeros(2, 3, 4))
    assert find_expert_matrices(model) == {
        "experts": "its matrices are held in 3-D parameters (up [2, 3, 4])"
    }


def test_an_expanded_conv1d_is_written_as_one(tmp_path):
    model = tiny("gpt2", seed=0, std=0.1)
    llmkern.quantize(model, "rtn", group_size=32)
    ids = torch.arange(12)[None]
    wanted = model(ids).logits
    expand_packed(model)
    block = model.transformer.h[0]
    assert is_conv1d(block.attn.c_proj)  # square: its shape would not tell
    torch.testing.assert_close(model(ids).logits, wanted)
    llmkern.save(model, tmp_path / "expanded")
    torch.testing.assert_close(llmkern.load(tmp_path / "expanded")(ids).logits, wanted)


def test_a_packed_conv1d_that_was_written_to_is_saved_as_one(tmp_path):
    model = tiny("gpt2", seed=0, std=0.1)
    llmkern.quantize(model, "rtn", group_size=32)
    ids = torch.arange(12)[None]
    layer = model.transformer.h[0].attn.c_proj
    with pytest.warns(UserWarning, match="dense"):
        layer.weight.data += 0.25
    wanted, before = model(ids).logits, dict(model.named_parameters())
    llmkern.save(model, tmp_path / "merged")
    assert model.transformer.h[0].attn.c_proj is layer
    assert all(p is before[name] for name, p in model.named_parameters())  # an optimizer has them
    torch.testing.assert_close(llmkern.load(tmp_path / "merged")(ids).logits, wanted)

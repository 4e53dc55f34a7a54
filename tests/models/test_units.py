"""Neurons and heads are found with the rows and columns that make and read them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import nn

from llmkern.models import find_blocks, find_units
from llmkern.nn import IntLinear

_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(model_type: str, **changes: Any) -> nn.Module:
    model: nn.Module = tiny_models.tiny(model_type, **_CONFIG | changes)
    return model


def test_separate_projections_group_query_heads_with_their_key_value_head() -> None:
    attention, mlp = find_units(tiny("llama"))[0]
    rows = torch.arange(32).view(2, 16)
    assert torch.equal(attention.producers["self_attn.q_proj"], rows)
    assert torch.equal(attention.producers["self_attn.k_proj"], torch.arange(16).view(2, 8))
    assert torch.equal(attention.columns, rows)
    assert (attention.consumer, attention.heads, attention.head_dim) == ("self_attn.o_proj", 2, 8)
    assert (mlp.kind, len(mlp), mlp.consumer) == ("glu", 64, "mlp.down_proj")
    assert set(mlp.producers) == {"mlp.gate_proj", "mlp.up_proj"}


def test_parameters_per_unit_are_what_removing_one_saves() -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True)
    block = find_blocks(model).modules[0]
    attention, mlp = find_units(model)[0]
    assert mlp.parameters_per_unit(block) == 3 * 32 + 2
    assert attention.parameters_per_unit(block) == 16 * 33 + 2 * 8 * 33 + 32 * 16


def test_fused_projections_of_phi3_lie_one_after_the_other() -> None:
    attention, mlp = find_units(tiny("phi3"))[0]
    q, k, v = torch.arange(16, 32), torch.arange(40, 48), torch.arange(56, 64)
    assert torch.equal(attention.producers["self_attn.qkv_proj"][1], torch.cat((q, k, v)))
    assert mlp.producers["mlp.gate_up_proj"][3].tolist() == [3, 67]


def test_fused_projection_of_gpt_neox_lies_head_by_head() -> None:
    attention, mlp = find_units(tiny("gpt_neox"))[0]
    assert torch.equal(
        attention.producers["attention.query_key_value"], torch.arange(96).view(4, 24)
    )
    assert mlp.kind == "mlp"


def test_projection_of_gate_and_up_in_pairs_is_told_from_halves() -> None:
    """No layout is assumed: this model is Phi-3 with the rows of gate and up side by side."""
    model = tiny("phi3")

    class Interleaved(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.gate_up_proj(x)
            return self.down_proj(y[..., 0::2].sigmoid() * y[..., 1::2])

    block = find_blocks(model).modules[0]
    block.mlp = Interleaved(block.mlp)
    assert find_units(model)[0][1].producers["mlp.gate_up_proj"][3].tolist() == [6, 7]


def test_silent_units_and_biases_do_not_hide_the_structure() -> None:
    model = tiny("opt", ffn_dim=64, word_embed_proj_dim=32)
    for block in find_blocks(model).modules:
        nn.init.constant_(block.fc1.bias, -100.0)  # ReLU lets nothing through
    assert [units.kind for units in find_units(model)[0]] == ["attention", "mlp"]


def test_finding_changes_nothing() -> None:
    model = tiny("phi3")
    before = {name: p.clone() for name, p in model.named_parameters()}
    find_units(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_experts_and_packed_layers_have_no_units() -> None:
    model = tiny("mixtral", num_local_experts=2, num_experts_per_tok=1)
    assert [[u.kind for u in block] for block in find_units(model)] == [["attention"]] * 2
    model = tiny("llama")
    block = find_blocks(model).modules[1]
    block.set_submodule("mlp.up_proj", IntLinear.from_linear(block.mlp.up_proj, group_size=32))
    assert [[u.kind for u in b] for b in find_units(model)] == [["attention", "glu"], ["attention"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny("phi3").to(dtype)
    assert [u.kind for u in find_units(model)[0]] == ["attention", "glu"]

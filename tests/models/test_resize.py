"""A width or depth change in every architecture: saved, read by plain transformers, the same logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmkern.models import (
    adopt_settings,
    find_blocks,
    find_units,
    keep_blocks,
    keep_units,
    set_width,
    skeleton,
    unit_overrides,
)
from llmkern.models.resize import changed_config

_BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _BASE | {"num_key_value_heads": 2}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SLIDING |= {"num_hidden_layers": 4}

# name: (model type, config, kind of MLP, whether its config can hold fewer heads of the same size)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "llama": ("llama", _GQA, "glu", True),
    "llama_bias": ("llama", _GQA | {"attention_bias": True, "mlp_bias": True}, "glu", True),
    "mistral": ("mistral", _GQA | {"sliding_window": 4}, "glu", True),
    "qwen2": ("qwen2", _GQA, "glu", True),
    "qwen2_sliding": ("qwen2", _GQA | _SLIDING | {"use_sliding_window": True}, "glu", True),
    "qwen3": ("qwen3", _GQA | {"head_dim": 16}, "glu", True),
    "gemma": ("gemma", _GQA | {"head_dim": 16}, "glu", True),
    "gemma2": ("gemma2", _GQA | _SLIDING | {"head_dim": 16}, "glu", True),
    "phi3": ("phi3", _GQA, "glu", True),
    "opt": ("opt", _BASE | {"ffn_dim": 64, "word_embed_proj_dim": 16}, "mlp", False),
    "gpt2": (
        "gpt2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
        "mlp",
        False,
    ),
    "gpt_neox": ("gpt_neox", _BASE, "mlp", False),
}


def tiny(architecture: str) -> nn.Module:
    kind, config, _, _ = ARCHITECTURES[architecture]
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at birth, which would hide a bias that went astray
            nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(12).remainder(96)[None]
    with torch.no_grad():
        return model(input_ids=tokens).logits


def generated(model: nn.Module) -> list[int]:
    """Tokens decoded with a cache, whose layers must be numbered as the blocks are."""
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
    return out[0].tolist()


def check_reload(model: nn.Module, directory: Path) -> nn.Module:
    model.save_pretrained(directory)
    again, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(logits(again), logits(model))
    assert generated(again) == generated(model)
    return again


def narrow(model: nn.Module, kind: str, kept: torch.Tensor) -> dict[str, Any]:
    """Leave the units `kept` of one kind in every block; the config entries that say so."""
    units = [next(u for u in block if u.kind == kind) for block in find_units(model)]
    overrides = unit_overrides(model, units[0], len(kept))
    built = find_blocks(skeleton(model, changed_config(model.config, overrides))).modules
    for block, twin, found in zip(find_blocks(model).modules, built, units, strict=True):
        keep_units(block, found, kept)
        adopt_settings(block, twin)
    set_width(model, overrides)
    return overrides


def zero_columns(model: nn.Module, kind: str, kept: torch.Tensor) -> nn.Module:
    """The same model, with nothing removed: the columns that read the other units are zero."""
    other = copy.deepcopy(model)
    for block, found in zip(find_blocks(other).modules, find_units(other), strict=True):
        units = next(u for u in found if u.kind == kind)
        dead = torch.tensor(sorted(set(range(len(units))) - set(kept.tolist())))
        weight = block.get_submodule(units.consumer).weight.data
        view = (
            weight.t() if type(block.get_submodule(units.consumer)).__name__ == "Conv1D" else weight
        )
        view[:, units.columns[dead].flatten()] = 0
    return other


def test_neurons_are_removed(architecture: str, tmp_path: Path) -> None:
    model, kind = tiny(architecture), ARCHITECTURES[architecture][2]
    kept = torch.arange(40) if kind == "glu" else torch.arange(0, 64, 2)
    expected = logits(zero_columns(model, kind, kept))
    before = model.num_parameters()
    (width,) = narrow(model, kind, kept).values()
    assert width == len(kept)
    assert model.num_parameters() < before
    torch.testing.assert_close(logits(model), expected)
    check_reload(model, tmp_path)


def test_heads_are_removed(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    if not ARCHITECTURES[architecture][3]:
        with pytest.raises(ValueError, match=r"got 2 of 4 key/value heads to stay, expected"):
            narrow(model, "attention", torch.tensor([1, 3]))
        check_reload(model, tmp_path)  # and nothing has changed
        return
    kept = torch.tensor([1])
    expected = logits(zero_columns(model, "attention", kept))
    overrides = narrow(model, "attention", kept)
    assert overrides["num_attention_heads"] == 2
    assert overrides["num_key_value_heads"] == 1
    torch.testing.assert_close(logits(model), expected)
    again = check_reload(model, tmp_path)
    assert again.config.num_attention_heads == 2
    assert again.config.head_dim == overrides["head_dim"]


def test_blocks_are_removed(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    depth = len(find_blocks(model))
    types = getattr(model.config, "layer_types", None)
    kept = [0, *range(2, depth)]
    modules = [find_blocks(model).modules[i] for i in kept]
    keep_blocks(model, kept)
    assert list(find_blocks(model).modules) == modules
    if types is not None:
        assert model.config.layer_types == [types[i] for i in kept]
    again = check_reload(model, tmp_path)
    assert again.config.num_hidden_layers == depth - 1

"""Tiny models of several architectures, and what tests of pruning ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 96
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_head": 4, "n_positions": 64}
SPECIAL = {
    "gpt2": _GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


def make(model_type: str, **changes: Any) -> nn.Module:
    """A tiny model with random weights and biases, in evaluation mode."""
    config = {**BASE, **SPECIAL.get(model_type, {}), **changes}
    if model_type == "gpt2":
        config = {**_GPT2, "n_layer": config["num_hidden_layers"], **SPECIAL["gpt2"]}
    elif model_type not in ("opt", "gpt_neox"):
        config.setdefault("num_key_value_heads", 2)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)  # so that every layer tells in the logits
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (6, 24))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens).logits
    return out


@pytest.fixture
def logits() -> Callable[[nn.Module, Tensor], Tensor]:
    return _logits

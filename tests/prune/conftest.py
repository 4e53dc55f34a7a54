"""Tiny models of several architectures, and what tests of pruning ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

VOCAB = 96
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


def make(model_type: str, **changes: Any) -> nn.Module:
    """With weights and biases that tell in the logits."""
    experts = EXPERTS if model_type == "mixtral" else {}
    model: nn.Module = tiny_models.tiny(model_type, std=0.15, **SIZES | experts | changes)
    return model


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

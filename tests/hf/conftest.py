"""Tiny models, and checkpoints that compressed-tensors itself writes, through its public API."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CTArgs = tuple[int, int | None, bool]  # bits, group size or None per channel, symmetric


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.tensor([[1, 2, 3, 5, 8, 13]])


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    return partial(
        tiny_models.tiny,
        dtype=torch.bfloat16,
        hidden_size=128,
        intermediate_size=256,
        vocab_size=128,
    )


@pytest.fixture
def moe() -> Callable[[], Qwen3MoeForCausalLM]:
    def make() -> Qwen3MoeForCausalLM:
        config = Qwen3MoeConfig(
            hidden_size=64,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=128,
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    return make


@pytest.fixture
def ct_compress() -> Callable[[PreTrainedModel, dict[str, CTArgs]], PreTrainedModel]:
    """Compress a model in memory, min-max scales: {target: (bits, group size, symmetric)}."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    def compress(model: PreTrainedModel, targets: dict[str, CTArgs]) -> PreTrainedModel:
        groups = {}
        for index, (target, (bits, group_size, symmetric)) in enumerate(targets.items()):
            weights = QuantizationArgs(
                num_bits=bits,
                symmetric=symmetric,
                strategy="channel" if group_size is None else "group",
                group_size=group_size,
            )
            groups[f"group_{index}"] = QuantizationScheme(targets=[target], weights=weights)
        config = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
        apply_quantization_config(model, config, show_progress=False)
        for module in model.modules():
            scheme = getattr(module, "quantization_scheme", None)
            if isinstance(module, nn.Linear) and scheme is not None:
                w = module.weight.detach()
                w = w.view(len(w), -1, scheme.weights.group_size or w.shape[1])
                scale, zero_point = calculate_qparams(w.amin(-1), w.amax(-1), scheme.weights)
                module.weight_scale.data.copy_(scale)
                if not scheme.weights.symmetric:
                    module.weight_zero_point.data.copy_(zero_point)
        model.ct_compressor = ModelCompressor.from_pretrained_model(model)
        model.ct_compressor.compress_model(model)
        return model

    return compress


@pytest.fixture
def ct_directory(ct_compress, tmp_path) -> Callable[..., Path]:
    """The same, written as a checkpoint."""

    def write(model: PreTrainedModel, targets: dict[str, CTArgs]) -> Path:
        ct_compress(model, targets)
        model.save_pretrained(tmp_path / "ct")
        model.ct_compressor.update_config(str(tmp_path / "ct"))
        return tmp_path / "ct"

    return write

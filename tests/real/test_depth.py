"""Fewer blocks: the same function when read again, or a refusal before anything is scored."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import llmkern
from llmkern.calibrate import skipped
from llmkern.models import find_blocks, keep_blocks
from llmkern.pipeline import Prune
from llmkern.pipeline.preflight import check
from llmkern.prune import depth

VOCAB, BLOCKS = 96, 6
TOKENS = torch.arange(4 * 24).view(4, 24) * 7 % 80 + 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK = MLA | {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
BAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
JAMBA = MOE | {
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2

# What is in the config -> model type, its entries, blocks that stay, entries afterwards.
FOLLOWS: dict[str, tuple[str, dict[str, Any], list[int], dict[str, Any]]] = {
    "one_value_per_block": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 8, "layer_types": LAYER_TYPES},
        [0, 2, 5],
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "flags_per_block": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1, 1, 0, 1]},
        [1, 2, 4],
        {"no_rope_layers": [0, 1, 0]},
    ),
    "numbers_of_blocks": (
        "qwen2_moe",
        MOE | {"shared_expert_intermediate_size": 32, "mlp_only_layers": [1, 4]},
        [0, 1, 3, 4],
        {"mlp_only_layers": [1, 3]},
    ),
    "numbers_that_all_go": (
        "qwen3_moe",
        MOE | {"head_dim": 8, "mlp_only_layers": [2]},
        [0, 1, 5],
        {"mlp_only_layers": []},
    ),
    "attention_among_mamba": (
        "bamba",
        BAMBA | {"attn_layer_indices": [2, 5]},
        [0, 2, 4, 5],
        {"attn_layer_indices": [1, 3]},
    ),
    "the_first_blocks_are_dense": (
        "deepseek_v3",
        DEEPSEEK | {"first_k_dense_replace": 2},
        [0, 3, 4],
        {"first_k_dense_replace": 1},
    ),
    "windows_from_a_block_on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
        [0, 4, 5],
        {"max_window_layers": 1},
    ),
    "kinds_by_a_pattern": (
        "gpt_neo",
        {
            "num_layers": BLOCKS,
            "num_heads": 4,
            "window_size": 8,
            "attention_types": [[["global", "local"], 3]],
        },
        [0, 1, 4, 5],
        {},
    ),
}
# What the class does -> model type, its entries, what the refusal says.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "constant_of_the_number": ("diffllama", {}, r"self_attn.lambda_init would be 0\.\d+, not"),
    "constant_of_the_depth": ("minicpm3", MLA, "residual_scale would be"),
    "scaled_by_the_number": ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scaling"),
    "embeddings_per_block": ("gemma4_text", GEMMA4, "would be|layer types"),
    "kind_by_the_number": (
        "recurrent_gemma",
        {
            "lru_width": 32,
            "attention_window_size": 32,
            "block_types": ["recurrent"] * 2 + ["attention"],
        },
        "would be|does not run",
    ),
}


def made(model_type: str, entries: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    sizes = {} if model_type == "gpt2" else SIZES
    config = AutoConfig.for_model(model_type, **sizes | entries)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def without(model: nn.Module, kept: list[int]) -> Tensor:
    """Logits of the whole model, whose other blocks hand on what they are given."""
    with ExitStack() as stack:
        for index, block in enumerate(find_blocks(model).modules):
            if index not in kept:
                stack.enter_context(skipped(block))
        return logits(model)


@pytest.mark.parametrize("what", FOLLOWS)
def test_the_config_follows_the_blocks(what: str, tmp_path: Path) -> None:
    model_type, entries, kept, after = FOLLOWS[what]
    model = made(model_type, entries)
    wanted = without(model, kept)
    keep_blocks(model, kept)
    assert {name: getattr(model.config, name) for name in after} == after
    torch.testing.assert_close(logits(model), wanted)
    llmkern.save(model, tmp_path / "out")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_scored(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, entries, reason = REFUSED[what]
    model = made(model_type, entries)
    before, config = logits(model), copy.deepcopy(model.config.to_dict())
    monkeypatch.setattr(depth, "_scores", lambda *args: pytest.fail("blocks were scored"))
    with pytest.raises(ValueError, match=f"got blocks .* to be left of 6, expected .*({reason})"):
        llmkern.prune(model, "depth", blocks=1, calibration=TOKENS)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    found = check(model, [Prune("depth", blocks=1)], calibration=TOKENS)
    assert any("to be left of 6" in str(error) for error in found.errors)


class Deep(LlamaForCausalLM):
    """A model whose forward asks how deep it is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.num_hidden_layers
        return output


def test_what_only_the_values_tell() -> None:
    model = made("llama", {})
    model.__class__ = Deep
    with pytest.raises(ValueError, match="its logits are not those of the whole model"):
        llmkern.prune(model, "depth", blocks=1, calibration=TOKENS)
    assert len(find_blocks(model)) == BLOCKS


def test_neighbours_go_where_others_cannot(tmp_path: Path) -> None:
    """Every second block of Jamba is attention, by its number: blocks go in pairs."""
    model = made("jamba", JAMBA)
    blocks = find_blocks(model).modules
    for index in (1, 4):  # the least: they cannot go together
        for name, parameter in blocks[index].named_parameters():
            if "o_proj" in name or "out_proj" in name or "down_proj" in name:
                parameter.data *= 0.01
    report = llmkern.prune(model, "depth", blocks=2, keep_first=0, keep_last=0, calibration=TOKENS)
    first, second = report.removed_blocks
    assert second == first + 1
    assert any("neighbouring blocks" in note for note in report.notes)
    wanted = without(made("jamba", JAMBA), [])
    assert wanted.isfinite().all()
    llmkern.save(model, tmp_path / "out")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(plain), logits(model))

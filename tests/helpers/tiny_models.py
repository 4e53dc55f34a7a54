"""Tiny models and tokenizers with random weights."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "five",
    "sun",
    "moon",
    "star",
    "sea",
]


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# What GPT-2 calls them; it has no others of them.
GPT2 = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    """A config of SIZES and `changes`, given by the names that most architectures use."""
    sizes = SIZES | changes
    if model_type == "gpt2":
        named = {GPT2[name]: sizes[name] for name in GPT2}
        others = {name: value for name, value in changes.items() if name not in SIZES}
        return AutoConfig.for_model(
            "gpt2", **{"bos_token_id": 1, "eos_token_id": 2} | named | others
        )
    if model_type in ("opt", "gpt_neox"):
        del sizes["num_key_value_heads"]
    if model_type == "opt":
        sizes |= {
            "ffn_dim": sizes["intermediate_size"],
            "word_embed_proj_dim": sizes["hidden_size"],
        }
        sizes.setdefault("pad_token_id", 0)
    return AutoConfig.for_model(model_type, **sizes)


def tiny(
    model_type: str = "llama",
    *,
    seed: int | None = None,
    std: float | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """A model of SIZES with random weights, in evaluation mode.

    Args:
        model_type: of transformers' AutoConfig.
        seed: of the weights; None: they follow the test's own seed.
        std: of matrices and biases, so that every layer tells in the logits; None: as the architecture
            is born, with small weights and biases of zero.
        dtype: of the weights; `.to(dtype)` would round the rotary frequencies too.
        changes: other entries of the config, by the names of `tiny_config`.
    """
    if seed is not None:
        torch.manual_seed(seed)
    config = tiny_config(model_type, **changes)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if std is not None:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                nn.init.normal_(parameter, std=std)
    return model.eval()


def llama(seed: int = 0, **changes: Any) -> Any:
    """For distillation: so small that it learns in a few steps, with the special tokens of `words`."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 16,
        "max_position_embeddings": 48,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.4,
    }
    return tiny(seed=seed, **sizes | changes).train()


def words(*order: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, numbered in the order given."""
    vocabulary = ["<s>", "</s>", "<pad>", "<unk>", *(order or WORDS)]
    table = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made

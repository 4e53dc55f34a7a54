"""Tiny models and tokenizers for the tests of distillation."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
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
    torch.manual_seed(seed)
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes | changes), dtype=torch.float32)


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

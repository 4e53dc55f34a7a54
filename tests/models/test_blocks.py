"""Blocks and linears are found by structure in every architecture that is named here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from llmkern.calibrate import Block, walk
from llmkern.models import (
    block_linears,
    check_reads_text,
    check_writes_text,
    context_length,
    find_blocks,
    vocabulary_size,
)
from llmkern.nn import IntLinear

VOCAB = 96

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GQA = _BASE | {"num_key_value_heads": 2, "head_dim": 8}
_SLIDING = _GQA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SLIDING["num_hidden_layers"] = 4
_MOE = _GQA | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_ATTENTION = [f"self_attn.{p}_proj" for p in "qkvo"]
_GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_SHARED = [f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")]

# model type: (config, name of the list of blocks, linears of one block, groups that share an input)
ARCHITECTURES: dict[str, tuple[dict[str, Any], str, list[str], list[set[str]]]] = {
    "llama": (_GQA, "model.layers", _ATTENTION + _GATED, [set(_ATTENTION[:3]), set(_GATED[:2])]),
    "mistral": (
        _GQA | {"sliding_window": 4},
        "model.layers",
        _ATTENTION + _GATED,
        [set(_ATTENTION[:3]), set(_GATED[:2])],
    ),
    "qwen2": (_GQA, "model.layers", _ATTENTION + _GATED, [set(_ATTENTION[:3]), set(_GATED[:2])]),
    "qwen3": (_GQA, "model.layers", _ATTENTION + _GATED, [set(_ATTENTION[:3]), set(_GATED[:2])]),
    "gemma": (_GQA, "model.layers", _ATTENTION + _GATED, [set(_ATTENTION[:3]), set(_GATED[:2])]),
    "gemma2": (_SLIDING, "model.layers", _ATTENTION + _GATED, [set(_ATTENTION[:3])]),
    "gemma3_text": (_SLIDING, "model.layers", _ATTENTION + _GATED, [set(_ATTENTION[:3])]),
    "phi3": (
        _GQA,
        "model.layers",
        ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
        [],
    ),
    "opt": (
        _BASE | {"ffn_dim": 64, "word_embed_proj_dim": 16},
        "model.decoder.layers",
        [f"self_attn.{p}" for p in ("k_proj", "v_proj", "q_proj", "out_proj")] + ["fc1", "fc2"],
        [{"self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"}],
    ),
    "gpt2": (
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "transformer.h",
        ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        [],
    ),
    "gpt_neox": (
        _BASE,
        "gpt_neox.layers",
        [
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ],
        [],
    ),
    "mixtral": (_MOE, "model.layers", _ATTENTION, [set(_ATTENTION[:3])]),
    "qwen2_moe": (
        _MOE | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "model.layers",
        [*_ATTENTION, *_SHARED, "mlp.shared_expert_gate"],
        [set(_ATTENTION[:3]), {*_SHARED[:2], "mlp.shared_expert_gate"}],
    ),
    "qwen3_moe": (_MOE | {"moe_intermediate_size": 32}, "model.layers", _ATTENTION, []),
}


def tiny(model_type: str) -> nn.Module:
    config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type][0])
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.fixture(params=list(ARCHITECTURES))
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_blocks_and_linears_are_found(model_type: str) -> None:
    _, name, linears, _ = ARCHITECTURES[model_type]
    model = tiny(model_type)
    blocks = find_blocks(model)
    assert blocks.name == name
    assert len(blocks) == (4 if ARCHITECTURES[model_type][0] is _SLIDING else 3)
    for full, block in blocks.items():
        assert model.get_submodule(full) is block
        assert set(block_linears(block)) == set(linears)
    assert vocabulary_size(model) == VOCAB
    assert context_length(model) == 64


def _own_inputs(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states that enter each block, and those that leave the last, in a plain forward."""
    seen: list[torch.Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    blocks = find_blocks(model).modules
    handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks]
    handles.append(blocks[-1].register_forward_hook(lambda m, a, out: seen.append(out.clone())))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_uncompressed_walk_equals_the_models_own_forward(model_type: str) -> None:
    """Masks, positions and their differences between blocks are those that the model gives."""
    model = tiny(model_type)
    tokens = torch.randint(1, VOCAB, (5, 12))
    own = [_own_inputs(model, rows) for rows in tokens.split(2)]
    walked: list[list[torch.Tensor]] = []

    def stage(block: Block) -> None:
        walked.append(list(block.states.hidden.clone().split(2)))
        if block.index == len(find_blocks(model)) - 1:
            walked.append([block.run(i) for i in range(block.states.batches())])

    walk(model, tokens, stage, batch_size=2)
    for depth, batches in enumerate(walked):
        for batch, hidden in enumerate(batches):
            assert torch.equal(hidden, own[batch][depth]), f"block {depth}, batch {batch}"


def test_linears_are_grouped_by_shared_input(model_type: str) -> None:
    _, _, linears, shared = ARCHITECTURES[model_type]
    model = tiny(model_type)
    found: list[list[tuple[str, ...]]] = []
    walk(model, torch.randint(1, VOCAB, (2, 8)), lambda block: found.append(block.groups()))
    for groups in found:
        assert sorted(name for group in groups for name in group) == sorted(linears)
        for want in shared:
            assert want in [set(group) for group in groups]


def test_packed_linears_are_no_longer_found() -> None:
    model = tiny("llama")
    block = find_blocks(model).modules[0]
    block.set_submodule("mlp.up_proj", IntLinear.from_linear(block.mlp.up_proj, group_size=32))
    assert "mlp.up_proj" not in block_linears(block)
    assert "mlp.down_proj" in block_linears(block)


def test_lists_inside_a_block_are_not_taken_for_blocks() -> None:
    class Expert(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Expert() for _ in range(8)])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
            self.stack = nn.ModuleList([Layer(), Layer()])

    assert find_blocks(Model()).name == "stack"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), ValueError, "no nn.ModuleList of decoder blocks"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
            ),
            NotImplementedError,
            "encoder-decoder T5ForConditionalGeneration",
        ),
    ],
    ids=["no_blocks", "encoder_decoder"],
)
def test_models_without_decoder_blocks_are_refused(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_blocks(make())


_LLAMA = LlamaConfig(**_GQA)
_BERT = BertConfig(**_BASE)
_VIT = ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
_T5 = T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
# class, config, and what is wrong with it where text is read, and where it is to be written
OTHERS: dict[str, tuple[Any, Any, str | None, str | None]] = {
    "causal": (LlamaForCausalLM, _LLAMA, None, None),
    "masked": (
        BertForMaskedLM,
        _BERT,
        None,
        "student: got BertForMaskedLM, which does not generate",
    ),
    "classifier": (LlamaForSequenceClassification, _LLAMA, None, "which does not generate text"),
    "pictures": (
        ViTForImageClassification,
        _VIT,
        *["student: got ViT.*, which reads pixel_values"] * 2,
    ),
    "two_stacks": (T5ForConditionalGeneration, _T5, *["student: got the encoder-decoder T5"] * 2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_reads_or_writes_no_text_is_refused(kind: str) -> None:
    model_class, config, reading, writing = OTHERS[kind]
    with torch.device("meta"):
        model = model_class(config)
    for check, message in ((check_reads_text, reading), (check_writes_text, writing)):
        if message is None:
            check(model, "student")
        else:
            with pytest.raises((ValueError, NotImplementedError), match=message):
                check(model, "student")


def test_a_module_that_says_nothing_of_itself_passes() -> None:
    check_writes_text(nn.Linear(2, 2))

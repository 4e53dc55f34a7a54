"""The norm or linear in whose weights the scales of a group of linears can be folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from llmkern.calibrate.walker import Block, walk
from llmkern.models import Source, find_blocks, find_sources, fold, scale_columns
from llmkern.models.linears import shape_of

_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = torch.arange(48).view(4, 12)


def tiny(model_type: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    model: nn.Module = tiny_models.tiny(model_type, seed=0, **_CONFIG | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases that differ from feature to feature, as those of trained models.
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(5)
    return model.to(dtype)


Found = list[dict[tuple[str, ...], Source | None]]


def sources_of(model: nn.Module) -> Found:
    found: Found = []

    def stage(block: Block) -> None:
        groups = block.groups()
        sources = find_sources(block.module, lambda: block.run(0), groups)
        found.append(dict(zip(groups, sources, strict=True)))

    walk(model, TOKENS, stage, batch_size=2)
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.double()


def scales(source: Source) -> Tensor:
    made = torch.rand(int(source.rows.max()) + 1, generator=torch.Generator().manual_seed(1))
    return (4 * made - 2).exp()[source.rows]


def rescale(block: nn.Module, group: tuple[str, ...], source: Source) -> None:
    s = scales(source)
    fold(block, source, s)
    for name in group:
        assert shape_of(block.get_submodule(name))[1] == len(s)
        scale_columns(block.get_submodule(name), s)


QKV = tuple(f"self_attn.{n}_proj" for n in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA = {
    QKV: "input_layernorm",
    ("self_attn.o_proj",): "self_attn.v_proj",
    GATE_UP: "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}
GPT2 = {
    ("attn.c_attn",): "ln_1",
    ("attn.c_proj",): "attn.c_attn",
    ("mlp.c_fc",): "ln_2",
    ("mlp.c_proj",): None,  # GELU lies between
}
OPT = {
    QKV: "self_attn_layer_norm",
    ("self_attn.out_proj",): "self_attn.v_proj",
    ("fc1",): "final_layer_norm",
    ("fc2",): "fc1",  # across ReLU
}
OPT_SIZES = {"ffn_dim": 64, "word_embed_proj_dim": 32}
CASES: dict[str, tuple[str, dict[str, Any], dict[tuple[str, ...], str | None]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}, LLAMA),
    "qwen2": ("qwen2", {}, LLAMA),
    "qwen3": ("qwen3", {"head_dim": 8}, LLAMA),
    "gemma2": (
        "gemma2",
        {"head_dim": 8},
        LLAMA | {GATE_UP: "pre_feedforward_layernorm"},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, GPT2),
    "opt": ("opt", OPT_SIZES, OPT),
    # The norm's output is the residual, too.
    "opt_norm_after": (
        "opt",
        OPT_SIZES | {"do_layer_norm_before": False},
        OPT | {("fc1",): None, QKV: None},
    ),
    "phi3": (
        "phi3",
        {},
        {
            ("self_attn.qkv_proj",): "input_layernorm",
            ("self_attn.o_proj",): "self_attn.qkv_proj",
            ("mlp.gate_up_proj",): "post_attention_layernorm",
            ("mlp.down_proj",): "mlp.gate_up_proj",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scales_are_folded_into_what_makes_the_input(case: str) -> None:
    model_type, changes, wanted = CASES[case]
    model = tiny(model_type, **changes)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    found = sources_of(model)
    for per_block in found:
        got = {group: source and source.name for group, source in per_block.items()}
        assert got == wanted
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    model = model.double()
    expected = logits(model)
    for block, per_block in zip(find_blocks(model).modules, found, strict=True):
        for group, source in per_block.items():
            if source is not None:
                rescale(block, group, source)
    changed = sum(not torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert changed > 2 * len(wanted)
    assert (logits(model) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "phi3"])
def test_half_precision_finds_the_same(case: str) -> None:
    model_type, changes, wanted = CASES[case]
    for per_block in sources_of(tiny(model_type, torch.bfloat16, **changes)):
        assert {group: source and source.name for group, source in per_block.items()} == wanted


def test_norms_say_whether_they_add_one() -> None:
    def offsets(model_type: str, **changes: Any) -> set[int]:
        found = sources_of(tiny(model_type, **changes))[0].values()
        return {source.offset for source in found if source is not None and source.kind == "norm"}

    assert offsets("llama") == {0}
    assert offsets("gemma2", head_dim=8) == {1}


def test_query_heads_of_one_key_value_head_are_tied() -> None:
    per_block = sources_of(tiny("llama"))[0]
    source = per_block["self_attn.o_proj",]
    assert source is not None
    # Two heads of width 8 read each of the two value heads.
    heads = torch.arange(16).view(2, 1, 8).expand(2, 2, 8).reshape(-1)
    assert source.tie is not None
    assert torch.equal(source.tie, heads)
    others = [s for group, s in per_block.items() if s is not None and s is not source]
    assert all(s.tie is None for s in others)
    single = sources_of(tiny("llama", num_key_value_heads=4))[0]["self_attn.o_proj",]
    assert single is not None
    assert single.tie is None


def test_router_of_stacked_experts_reads_the_norm_too() -> None:
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    per_block = sources_of(tiny("qwen3_moe", head_dim=8, **sizes))[0]
    assert per_block[QKV] is not None
    assert all(
        source is None or source.name != "post_attention_layernorm" for source in per_block.values()
    )


BAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "shape": (lambda s: s[:4], r"s: got \[4\], expected \[32\]"),
    "zero": (lambda s: s * 0, "s: got numbers that are not positive"),
    "nan": (lambda s: s * torch.nan, "s: got numbers that are not positive"),
    "tie": (lambda s: s + torch.arange(32), "s: got scales that differ inside a tie"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_scales_are_refused_and_nothing_changes(case: str) -> None:
    change, message = BAD[case]
    model = tiny("llama")
    source = sources_of(model)[0]["self_attn.o_proj",]
    assert source is not None
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        fold(find_blocks(model).modules[0], source, change(torch.ones(32)))
    assert torch.equal(logits(model), before)

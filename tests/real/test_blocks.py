"""Blocks that do more than turn hidden states into hidden states: they work, or are refused by name."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import llmkern
from llmkern.calibrate import Block, walk
from llmkern.models import find_blocks

VOCAB = 96
TOKENS = torch.arange(6 * 24).view(6, 24) * 7 % 80 + 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
SHARED_KV = SLIDING | {
    "head_dim": 16,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 2,
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
}
MIXED = ["linear_attention", "full_attention"] * 2

# What is odd about its blocks -> model type, entries of its config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "streams_and_shared_keys": (
        "gemma3n_text",
        SHARED_KV
        | {
            "laurel_rank": 32,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "intermediate_size": [128] * 4,
        },
    ),
    "as_many_streams_as_windows": (
        "gemma3n_text",
        SHARED_KV
        | {
            "laurel_rank": 32,
            "altup_num_inputs": 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [128] * 4,
        },
    ),
    "shared_keys": ("gemma4_text", SHARED_KV | {"global_head_dim": 16}),
    "two_kinds_of_blocks": (
        "recurrent_gemma",
        {"lru_width": 64, "attention_window_size": 32, "block_types": ["recurrent", "attention"]},
    ),
    "mamba_and_attention": (
        "bamba",
        MAMBA | {"mamba_expand": 2, "mamba_chunk_size": 8, "attn_layer_indices": [1, 3]},
    ),
    "deltas_and_attention": (
        "qwen3_next",
        {
            "layer_types": MIXED,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "convolutions_and_attention": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    ),
}


def made(kind: str) -> Any:
    model_type, entries = MODELS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | entries))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(params=list(MODELS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def leaving(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """What leaves each block in the model's own forward."""
    found: list[Tensor] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).clone())

    handles = [b.register_forward_hook(keep) for b in find_blocks(model).modules]
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_the_walk_computes_what_the_model_computes(kind: str) -> None:
    model = made(kind)
    wanted = [leaving(model, rows) for rows in TOKENS.split(4)]

    def on_block(block: Block) -> None:
        for batch in range(block.states.batches()):
            again = [block.run(batch) for _ in range(2)]
            assert torch.equal(again[0], again[1])
            assert torch.equal(again[0], wanted[batch][block.index])

    walk(model, TOKENS, on_block, batch_size=4)


@contextmanager
def stopped_at(index: int) -> Iterator[None]:
    """The run is killed when it gets to block `index`."""
    groups = Block.groups

    def stop(block: Block) -> Any:
        if block.index == index:
            raise KeyboardInterrupt
        return groups(block)

    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.suppress(KeyboardInterrupt),
    ):
        warnings.simplefilter("ignore")
        patch.setattr(Block, "groups", stop)
        yield
        pytest.fail("nothing stopped it")


@pytest.mark.filterwarnings("ignore:prune")
@pytest.mark.parametrize("index", [1, 3])
def test_a_run_goes_on_with_the_same_bits(kind: str, index: int, tmp_path: Path) -> None:
    def prune(model: nn.Module, **options: Any) -> dict[str, Tensor]:
        llmkern.prune(model, "wanda", sparsity=0.5, calibration=TOKENS, batch_size=4, **options)
        return model.state_dict()

    wanted = prune(made(kind))
    with stopped_at(index):
        prune(made(kind), checkpoint=tmp_path)
    got = prune(made(kind), checkpoint=tmp_path, resume=True)
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


class Passing(nn.Module):
    """A block whose second output the next one takes."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.pair = nn.Linear(16, 16), nn.Linear(16, 16), pair

    def forward(self, hidden_states: Tensor, bias: Any = None) -> tuple[Tensor, Any]:
        if bias is not None:
            hidden_states = hidden_states + (bias[1] if self.pair else bias)
        out = hidden_states + self.b(torch.tanh(self.a(hidden_states)))
        return out, (hidden_states, out.sin()) if self.pair else out.sin()


class Listing(Passing):
    """A block that adds to a list and reads all that is in it."""

    def forward(self, hidden_states: Tensor, seen: list[Tensor]) -> Tensor:  # type: ignore[override]
        seen.append(hidden_states)
        return sum(seen) + self.b(torch.tanh(self.a(hidden_states)))  # type: ignore[no-any-return]


class Chain(nn.Module):
    """A model of blocks, run by `how`."""

    def __init__(self, blocks: list[nn.Module], how: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.layers, self.how = nn.Embedding(VOCAB, 16), nn.ModuleList(blocks), how

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        return self.how(self.layers, self.embedding(input_ids))


def passed_on(layers: Any, x: Tensor) -> Tensor:
    left = None
    for layer in layers:
        x, left = layer(x, left)
    return x


def by_keyword(layers: Any, x: Tensor) -> Tensor:
    left = None
    for layer in layers:
        x, left = layer(bias=left, hidden_states=x)
    return x


def into_a_list(layers: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    for layer in layers:
        x = layer(x, seen)
    return x


def scaled_between(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(2 * x)[0]
    return x


def first_value_for_all(layers: Any, x: Tensor) -> Tensor:
    x, left = layers[0](x)
    for layer in layers[1:]:
        x, _ = layer(x, left)
    return x


def twice(layers: Any, x: Tensor) -> Tensor:
    for layer in (*layers, *layers):
        x = layer(x)[0]
    return x


def but_the_last(layers: Any, x: Tensor) -> Tensor:
    for layer in layers[:-1]:
        x = layer(x)[0]
    return x


class Counting(Passing):
    """A block with a memory of its own."""

    calls = 0

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        self.calls += 1
        return hidden_states * self.calls + self.b(self.a(hidden_states))


WORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "second_output": (Passing, passed_on),
    "pair_in_second_output": (lambda: Passing(pair=True), passed_on),
    "keywords_only": (Passing, by_keyword),
    "growing_list": (Listing, into_a_list),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], str]] = {
    "changed_between": (
        Passing,
        scaled_between,
        r"layers.1 \(Passing\) reads something else than layers.0 made",
    ),
    "output_of_the_first_for_all": (
        Passing,
        first_value_for_all,
        r"layers.2 \(Passing\) computes something else when run alone",
    ),
    "run_twice": (Passing, twice, r"layers.0 \(Passing\) runs 2 times on text"),
    "not_run": (Passing, but_the_last, r"layers.3 \(Passing\) does not run on text"),
    "memory_of_its_own": (
        Counting,
        lambda layers, x: by_hand(layers, x),
        r"layers.0 \(Counting\) computes something else when run alone",
    ),
}


def by_hand(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def chain(make: Callable[[], nn.Module], how: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Chain([make() for _ in range(4)], how).eval()


@pytest.mark.parametrize("odd", WORKS)
def test_what_blocks_leave_to_later_ones(odd: str, tmp_path: Path) -> None:
    model = chain(*WORKS[odd])
    wanted = [leaving(model, rows) for rows in TOKENS.split(4)]

    def on_block(block: Block) -> None:
        for batch in range(block.states.batches()):
            for _ in range(2):
                assert torch.equal(block.run(batch), wanted[batch][block.index])

    walk(model, TOKENS, on_block, batch_size=4)

    def prune(model: nn.Module, **options: Any) -> dict[str, Tensor]:
        llmkern.prune(model, "wanda", sparsity=0.5, calibration=TOKENS, batch_size=4, **options)
        return model.state_dict()

    pruned = prune(copy.deepcopy(model))
    with stopped_at(2):
        prune(copy.deepcopy(model), checkpoint=tmp_path)
    got = prune(copy.deepcopy(model), checkpoint=tmp_path, resume=True)
    assert all(torch.equal(got[name], tensor) for name, tensor in pruned.items())


@pytest.mark.parametrize("odd", REFUSED)
def test_blocks_that_do_not_follow_each_other_are_refused(odd: str) -> None:
    make, how, reason = REFUSED[odd]
    model = chain(make, how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"model: got Chain, whose block {reason}.*, expected"):
        llmkern.prune(model, "sparsegpt", sparsity=0.5, calibration=TOKENS)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_blocks_that_text_does_not_reach_are_refused() -> None:
    entries = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    config = MllamaTextConfig(**entries, cross_attention_layers=[1], rope_scaling=None)
    model = MllamaForCausalLM(config).eval()
    reason = r"layers.1 \(MllamaCrossAttentionDecoderLayer\) does not run on text.*rtn, nf4"
    with pytest.raises(ValueError, match=reason):
        llmkern.quantize(model, "gptq", group_size=32, calibration=TOKENS)
    llmkern.quantize(model, "rtn", group_size=32)

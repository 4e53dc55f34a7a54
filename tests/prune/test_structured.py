"""Neurons and heads out of whole models: the right ones, with the right config, and better adjusted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmkern
from llmkern.assets import bundled_model_dir, calibration_text, evaluation_text
from llmkern.calibrate import load_tokens
from llmkern.masks import recorded_layers
from llmkern.models import find_blocks

Tiny = Callable[..., nn.Module]
Logits = Callable[[nn.Module, Tensor], Tensor]


def width(model: nn.Module) -> list[int]:
    return [block.mlp.down_proj.in_features for block in find_blocks(model).modules]


@pytest.mark.parametrize("importance", ["obs", "activation", "magnitude"])
@pytest.mark.parametrize("compensate", [True, False])
def test_neurons_that_do_nothing_go_first(
    tiny: Tiny, tokens: Tensor, logits: Logits, importance: str, compensate: bool
) -> None:
    """16 of 64 neurons are dead in every block: without them nothing changes."""
    model = tiny("llama")
    for index, block in enumerate(find_blocks(model).modules):
        dead = torch.arange(index, 64, 4)
        block.mlp.gate_proj.weight.data[dead] = 0
        block.mlp.up_proj.weight.data[dead] = 0
    before = logits(model, tokens)
    data = {} if importance == "magnitude" and not compensate else {"calibration": tokens}
    report = llmkern.prune(
        model, "glu", ratio=0.25, importance=importance, compensate=compensate, round_to=16, **data
    )
    assert width(model) == [48] * 3
    assert model.config.intermediate_size == 48
    assert [(w.kind, w.before, w.after) for w in report.widths] == [("glu", 64, 48)] * 3
    assert report.parameters_after == report.parameters_before - 3 * 16 * 3 * 32
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("importance", ["obs", "activation", "magnitude"])
def test_heads_that_do_nothing_go_first(
    tiny: Tiny, tokens: Tensor, logits: Logits, importance: str
) -> None:
    model = tiny("qwen3", head_dim=16)
    for block in find_blocks(model).modules:
        for projection in (block.self_attn.v_proj, block.self_attn.k_proj):
            projection.weight.data[:16] = 0
        block.self_attn.q_proj.weight.data[:32] = 0
    before = logits(model, tokens)
    llmkern.prune(model, "heads", ratio=0.5, importance=importance, calibration=tokens)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    assert model.config.head_dim == 16
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        ("gpt2", "mlp"),
        ("opt", "mlp"),
        ("gpt_neox", "mlp"),
        ("phi3", "glu"),
        ("phi3", "heads"),
        ("gemma", "glu"),
        ("qwen2", "heads"),
        ("llama", "mlp"),
    ],
)
def test_pruned_model_loads_in_plain_transformers(
    tiny: Tiny, tokens: Tensor, logits: Logits, tmp_path: Path, model_type: str, method: str
) -> None:
    model = tiny(model_type)
    report = llmkern.prune(
        model,
        method,
        ratio=0.5,
        calibration=tokens,
        **({} if method == "heads" else {"round_to": 8}),
    )
    assert report.parameters_after < report.parameters_before
    llmkern.save(model, tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_bias_takes_up_the_mean_of_what_is_gone(tiny: Tiny, tokens: Tensor, logits: Logits) -> None:
    """Neurons whose value never changes are worth nothing to a layer with a bias."""
    model = tiny("gpt2")
    for block in find_blocks(model).modules:
        block.mlp.c_fc.weight.data[:, 64:] = 0  # half of the neurons put out a constant
    before = logits(model, tokens)
    other = copy.deepcopy(model)
    llmkern.prune(model, "mlp", ratio=0.5, damp=1e-5, calibration=tokens)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-2, atol=1e-2)
    llmkern.prune(other, "mlp", ratio=0.5, calibration=tokens, compensate=False)
    worse = (logits(other, tokens) - before).abs().mean()
    assert worse > 10 * (logits(model, tokens) - before).abs().mean()


def test_zeros_of_an_earlier_pruning_stay(tiny: Tiny, tokens: Tensor) -> None:
    model = tiny("llama")
    llmkern.prune(model, "magnitude", pattern="2:4")
    zeros = [(block.mlp.down_proj.weight == 0).sum(1) for block in find_blocks(model).modules]
    llmkern.prune(model, "glu", ratio=0.25, round_to=16, calibration=tokens)
    for block, before in zip(find_blocks(model).modules, zeros, strict=True):
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            assert float((linear.weight == 0).double().mean()) > 0.35
        now = (block.mlp.down_proj.weight == 0).sum(1)
        assert bool((now <= before).all())
        assert float((block.mlp.down_proj.weight == 0).double().mean()) > 0.35
        assert bool((block.mlp.down_proj.weight[0] != 0).any())
    recorded = recorded_layers(model)
    assert recorded["model.layers.1.mlp.gate_proj"] == "2:4"
    # Columns are missing from its groups of four.
    assert recorded["model.layers.1.mlp.down_proj"] == pytest.approx(0.5, abs=0.1)


def test_target_in_parameters_is_met_with_the_widest_that_fits(tiny: Tiny, tokens: Tensor) -> None:
    model = tiny("llama")
    present = sum(p.numel() for p in model.parameters())
    per_neuron = 3 * 3 * 32
    llmkern.prune(
        model, "glu", target_params=present - 15 * per_neuron, round_to=8, calibration=tokens
    )
    assert width(model) == [48] * 3
    with pytest.raises(ValueError, match=r"target_params: got 5, expected at least \d+"):
        llmkern.prune(model, "glu", target_params=5, round_to=8, calibration=tokens)


def test_uneven_widths_load_with_llmkern_only(
    tiny: Tiny, tokens: Tensor, logits: Logits, tmp_path: Path
) -> None:
    model = tiny("phi3", num_hidden_layers=5)
    for index, gain in enumerate((1, 1, 0.01, 1, 1)):
        find_blocks(model).modules[index].mlp.down_proj.weight.data *= gain
    report = llmkern.prune(
        model,
        "glu",
        ratio=0.2,
        round_to=8,
        allow_uneven=True,
        importance="magnitude",
        calibration=tokens,
    )
    assert "only llmkern.load" in report.notes[0]
    widths = width(model)
    assert widths[0] == widths[-1] == 64  # whole by default
    assert sum(widths) == 5 * 64 - 64
    expected = logits(model, tokens)
    llmkern.save(model, tmp_path / "out")
    again = llmkern.load(tmp_path / "out")
    assert type(again) is type(model)
    assert width(again) == widths
    assert torch.equal(logits(again, tokens), expected)
    with pytest.raises(RuntimeError, match=r"ismatch|size"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # A second pruning knows the widths: of depth, where the entries are numbered anew.
    llmkern.prune(again, "depth", blocks=1, calibration=tokens)
    llmkern.save(again, tmp_path / "shallow")
    third = llmkern.load(tmp_path / "shallow")
    assert torch.equal(logits(third, tokens), logits(again, tokens))


def test_uneven_heads_of_a_fused_projection(
    tiny: Tiny, tokens: Tensor, logits: Logits, tmp_path: Path
) -> None:
    model = tiny("phi3", num_key_value_heads=4)
    llmkern.prune(model, "heads", ratio=0.25, allow_uneven=True, keep_first=0, calibration=tokens)
    shapes = {tuple(b.self_attn.o_proj.weight.shape) for b in find_blocks(model).modules}
    assert len(shapes) > 1
    llmkern.save(model, tmp_path / "out")
    again = llmkern.load(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize("importance", ["obs", "activation"])
def test_uneven_ranking_takes_from_the_block_that_matters_least(
    tiny: Tiny, tokens: Tensor, importance: str
) -> None:
    """A block most of whose neurons copy others can lose them all, and a ranking sees that."""
    model = tiny("llama", num_hidden_layers=4)
    mlp = find_blocks(model).modules[2].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data[16:] *= 0.01
    llmkern.prune(
        model,
        "glu",
        ratio=0.2,
        round_to=8,
        allow_uneven=True,
        importance=importance,
        calibration=tokens,
    )
    widths = width(model)
    assert widths[2] < widths[1]
    assert widths[2] <= 24


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("glu", {"ratio": 1.0}, r"ratio: got 1.0, expected a fraction in \[0, 1\)"),
    ("glu", {"ratio": -0.1}, r"ratio: got -0.1"),
    ("glu", {}, "ratio, target_params: got none of them, expected exactly one"),
    ("glu", {"ratio": 0.1, "target_params": 5}, "got ratio and target_params"),
    (
        "glu",
        {"ratio": 0.01},
        r"ratio: got 0.01, which rounds to nothing: .*down_proj has 64 neurons",
    ),
    ("glu", {"ratio": 0.5, "importance": "best"}, "importance: got 'best', expected one of obs"),
    ("glu", {"ratio": 0.5, "damp": 1.0}, "damp: got 1.0"),
    ("glu", {"ratio": 0.5, "keep_first": 2}, "keep_first: got 2 without allow_uneven"),
    ("glu", {"ratio": 0.5, "criterion": "cosine"}, "criterion: not an option of method 'glu'"),
    ("glu", {"ratio": 0.5, "rules": {"*": 0.5}}, "rules: got .*expected none"),
    ("glu", {"ratio": 0.5, "sparsity": 0.5}, "sparsity: got 0.5, expected ratio"),
    ("glu", {"ratio": 0.5, "recovery": "hope"}, "recovery: got 'hope'"),
    ("glu", {"ratio": 0.5, "allow_uneven": True, "keep_first": 2}, "leave none of the 3 blocks"),
    (
        "heads",
        {"ratio": 0.1},
        "ratio: got 0.1, which rounds to nothing: .*can lose 0.5 of them",
    ),
    (
        "glu",
        {"ratio": 0.5, "importance": "magnitude", "compensate": False},
        "calibration: got data, expected none: importance 'magnitude'",
    ),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD)
def test_what_cannot_be_done_is_refused_before_anything_changes(
    tiny: Tiny, tokens: Tensor, method: str, options: dict[str, Any], message: str
) -> None:
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        llmkern.prune(model, method, calibration=tokens, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("model_type", "method", "message"),
    [
        ("opt", "glu", r"model.decoder.layers.0: got an MLP of two matrices \(fc1, fc2\)"),
        (
            "mixtral",
            "glu",
            r"model.layers.0: got a MixtralDecoderLayer without gate.*MoE experts",
        ),
        (
            "gpt2",
            "heads",
            r"transformer.h.0.attn.c_proj: got 2 of 4 key/value heads to stay, expected",
        ),
    ],
)
def test_model_without_the_structure_is_refused(
    tiny: Tiny, tokens: Tensor, model_type: str, method: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llmkern.prune(tiny(model_type), method, ratio=0.5, calibration=tokens)


def test_number_of_heads_that_the_config_refuses_is_not_chosen(tiny: Tiny, tokens: Tensor) -> None:
    """Llama wants the hidden size to be a multiple of the number of heads: of 4, 3 is none of 32."""
    model = tiny("llama", num_key_value_heads=4)
    with pytest.raises(
        ValueError, match=r"rounds to nothing.* 4 key/value heads and can lose 0.5, 0.75 of"
    ):
        llmkern.prune(model, "heads", ratio=0.25, calibration=tokens)
    llmkern.prune(model, "heads", ratio=0.5, calibration=tokens)
    assert model.config.num_attention_heads == 2


def test_nan_is_named(tiny: Tiny, tokens: Tensor) -> None:
    model = tiny("llama")
    find_blocks(model).modules[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: its weight holds NaN"):
        llmkern.prune(model, "glu", ratio=0.5, round_to=8, calibration=tokens)
    model = tiny("llama")
    find_blocks(model).modules[0].input_layernorm.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.o_proj: its inputs hold NaN"):
        llmkern.prune(model, "glu", ratio=0.5, round_to=8, calibration=tokens)
    model = tiny("llama")
    model.get_input_embeddings().weight.data[50] = torch.inf  # not among the tokens of the search
    tokens[0, 0] = 50
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.down_proj: its calibration"):
        llmkern.prune(model, "glu", ratio=0.5, round_to=8, calibration=tokens)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["glu", "heads"])
def test_compensation_helps_the_bundled_model(method: str) -> None:
    directory = bundled_model_dir()
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    held_out = load_tokens(evaluation_text(), reference, tokenizer, seq_len=256)[:8]
    kl = {}
    for compensate in (True, False):
        model = copy.deepcopy(reference)
        llmkern.prune(
            model,
            method,
            ratio=0.2 if method == "glu" else 0.5,
            compensate=compensate,
            importance="activation",
            calibration=calibration_text(),
            tokenizer=tokenizer,
            samples=16,
            seq_len=256,
        )
        kl[compensate] = llmkern.evaluate(model, held_out, reference=reference, speed=False).kl
    assert kl[True] < 0.8 * kl[False]

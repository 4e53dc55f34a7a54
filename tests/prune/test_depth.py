"""Whole blocks go: those that do the least, the ends kept, with a config that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmkern
from llmkern.calibrate import skipped
from llmkern.masks import recorded_layers
from llmkern.models import find_blocks

Tiny = Callable[..., nn.Module]
Logits = Callable[[nn.Module, Tensor], Tensor]

LAST = (
    "self_attn.o_proj",
    "mlp.down_proj",
    "attn.c_proj",
    "mlp.c_proj",
    "self_attn.out_proj",
    "fc2",
)


def silence(block: nn.Module, gain: float = 0.0) -> None:
    """Turn down what the block adds to its input."""
    for name, parameter in block.named_parameters():
        if name.rpartition(".")[0] in LAST:
            parameter.data *= gain


@pytest.mark.parametrize("criterion", ["cosine", "perplexity"])
@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_blocks_that_do_nothing_go(
    tiny: Tiny, tokens: Tensor, logits: Logits, model_type: str, criterion: str, iterative: bool
) -> None:
    model = tiny(model_type, num_hidden_layers=5)
    modules = list(find_blocks(model).modules)
    for index in (1, 3):
        silence(modules[index])
    for index in (0, 2, 4):  # an untrained block may be worse than none: the others matter
        silence(modules[index], 3.0)
    if criterion == "perplexity":
        with torch.no_grad():
            tokens = model.generate(tokens[:, :4], max_new_tokens=20, do_sample=True, top_k=5)
            tokens = tokens[:, :24]
    before = logits(model, tokens)
    report = llmkern.prune(
        model, "depth", blocks=2, criterion=criterion, iterative=iterative, calibration=tokens
    )
    assert report.removed_blocks == [1, 3]
    assert list(find_blocks(model).modules) == [modules[0], modules[2], modules[4]]
    assert model.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(model, tokens), before)


def test_block_influence_is_one_minus_the_mean_cosine(tiny: Tiny, tokens: Tensor) -> None:
    from llmkern.drive import DataOptions
    from llmkern.prune import DepthOptions, PruneReport
    from llmkern.prune._method import PruneJob
    from llmkern.prune.depth import _influence

    model = tiny("llama")
    job = PruneJob(
        model,
        DepthOptions(blocks=1),
        DataOptions(batch_size=4),
        None,
        {},
        PruneReport("depth", {}, {}),
    )
    job.calibration = tokens
    found = _influence(job, [])
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    for index in range(2):  # the last of the states has passed the final norm
        cosine = nn.functional.cosine_similarity(states[index], states[index + 1], dim=-1)
        assert found[index] == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_skipped_block_hands_on_its_input(
    tiny: Tiny, tokens: Tensor, logits: Logits, model_type: str
) -> None:
    model = tiny(model_type)
    plain = logits(model, tokens)
    block = find_blocks(model).modules[1]
    with skipped(block):
        without = logits(model, tokens)
    assert torch.equal(logits(model, tokens), plain)
    silence(block)
    torch.testing.assert_close(logits(model, tokens), without)


def test_ends_are_kept_unless_said_otherwise(tiny: Tiny, tokens: Tensor, tmp_path: Path) -> None:
    model = tiny("qwen2", num_hidden_layers=4)
    silence(find_blocks(model).modules[0])
    report = llmkern.prune(model, "depth", ratio=0.5, calibration=tokens)
    assert report.removed_blocks == [1, 2]
    assert model.config.layer_types == ["full_attention"] * 2
    model = tiny("qwen2", num_hidden_layers=4)
    silence(find_blocks(model).modules[0])
    report = llmkern.prune(model, "depth", blocks=1, keep_first=0, calibration=tokens)
    assert report.removed_blocks == [0]
    llmkern.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokens[:1, :5]
    tokens_of = [m.generate(prompt, max_new_tokens=5, do_sample=False) for m in (model, again)]
    assert torch.equal(*tokens_of)


def test_record_of_an_earlier_pruning_follows_the_blocks(tiny: Tiny, tokens: Tensor) -> None:
    model = tiny("llama", num_hidden_layers=4)
    llmkern.prune(model, "magnitude", sparsity=0.5, rules={"*.3.*": 0.25, "*.1.*": None})
    silence(find_blocks(model).modules[1])
    llmkern.prune(model, "depth", blocks=1, calibration=tokens)
    recorded = recorded_layers(model)
    assert recorded["model.layers.2.mlp.up_proj"] == 0.25
    assert recorded["model.layers.1.mlp.up_proj"] == 0.5
    assert not any(name.startswith("model.layers.3.") for name in recorded)


def test_target_in_parameters(tiny: Tiny, tokens: Tensor) -> None:
    model = tiny("llama", num_hidden_layers=5)
    present = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in find_blocks(model).modules[1].parameters())
    report = llmkern.prune(model, "depth", target_params=present - block - 1, calibration=tokens)
    assert len(report.removed_blocks) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ratio, target_params, blocks: got none of them"),
        ({"ratio": 0.5, "blocks": 1}, "got ratio and blocks"),
        (
            {"blocks": 2},
            r"blocks: got 2, expected at most 1 blocks with the 1 first and 1 last of 3",
        ),
        ({"blocks": 0}, "blocks: got 0"),
        ({"ratio": 0.1}, r"ratio: got 0.1, which is less than half of one of 3 blocks"),
        ({"ratio": 0.9}, r"ratio: got 0.9, expected at most 1 blocks"),
        ({"target_params": 5}, r"target_params: got 5, expected at least \d+ with the 1 first"),
        ({"blocks": 1, "criterion": "taste"}, "criterion: got 'taste'"),
        ({"blocks": 1, "keep_last": -1}, "keep_last: got -1"),
        ({"blocks": 1, "importance": "obs"}, "importance: not an option of method 'depth'"),
        ({"blocks": 1, "rules": {"*": 0.5}}, "rules: got .*expected none"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tiny: Tiny, tokens: Tensor, options: dict[str, Any], message: str
) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        llmkern.prune(model, "depth", calibration=tokens, **options)
    assert len(find_blocks(model)) == model.config.num_hidden_layers == 3

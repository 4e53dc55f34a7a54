"""Parameters, quality and continuations of a model, and the sensitivity of its blocks."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import llmkern
from llmkern import assets
from llmkern.distill import make_student
from llmkern.models import find_blocks
from llmkern.pipeline import StageRecord
from llmkern.pipeline.measure import count_parameters, measure, sensitivity

VOCAB = 96


tiny = partial(tiny_models.tiny, num_hidden_layers=3, initializer_range=0.2)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (5, 16))


@pytest.mark.parametrize("tied", [False, True])
def test_packed_layers_count_as_weights(tokens: Tensor, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    dense = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == dense
    llmkern.quantize(model, "rtn", group_size=32)
    assert count_parameters(model) == dense
    model(input_ids=tokens)  # repacks
    assert count_parameters(model) == dense
    assert sum(p.numel() for p in model.parameters()) < dense


def test_fields_are_those_of_a_record(tokens: Tensor) -> None:
    original = tiny()
    model = copy.deepcopy(original)
    llmkern.quantize(model, "rtn", group_size=32)
    fields = measure(model, tokens, original, speed=False)
    assert fields.keys() <= {field.name for field in dataclasses.fields(StageRecord)}
    assert fields["generations"] == []
    expected = llmkern.evaluate(model, tokens, reference=original, speed=False).to_dict()
    assert fields["evaluation"] == expected
    assert fields["evaluation"]["kl"] > 0
    assert measure(model, tokens, speed=False)["evaluation"]["kl"] is None


def test_prompts_are_continued_greedily(tokens: Tensor) -> None:
    path = assets.bundled_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = llmkern.load(path, dtype=torch.float32)
    prompt = "def read_lines(path):\n"
    windows = torch.randint(3, 2000, (1, 8))
    (text,) = measure(model, windows, tokenizer=tokenizer, prompts=[prompt], speed=False)[
        "generations"
    ]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = []
    while len(wanted) < 64:
        with torch.no_grad():
            token = int(model(input_ids=ids).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        wanted.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert not text.startswith(prompt)


def test_prompts_need_a_tokenizer(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: got None, expected a tokenizer"):
        measure(tiny(), tokens, prompts=["x"], speed=False)


def swapped(before: nn.Module, after: nn.Module, index: int) -> nn.Module:
    model = copy.deepcopy(before)
    find_blocks(model).modules[index] = copy.deepcopy(find_blocks(after).modules[index])
    return model


@pytest.mark.parametrize("stage", ["packed", "narrower"])
def test_each_block_is_swapped_alone(tokens: Tensor, stage: str) -> None:
    before = tiny()
    after = copy.deepcopy(before)
    if stage == "packed":
        llmkern.quantize(after, "rtn", bits=3, group_size=32)
    else:
        llmkern.prune(after, "glu", ratio=0.5, calibration=tokens)
    modules = list(find_blocks(before).modules)
    state = {name: value.clone() for name, value in before.state_dict().items()}
    costs = sensitivity(before, after, tokens, batch_size=2)
    assert list(costs) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    for index, cost in enumerate(costs.values()):
        model = swapped(before, after, index)
        alone = llmkern.evaluate(model, tokens, reference=before, speed=False).kl
        assert cost == pytest.approx(alone, rel=1e-5)
        assert cost > 0
    assert all(a is b for a, b in zip(modules, find_blocks(before).modules, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())


def test_an_unchanged_block_costs_nothing(tokens: Tensor) -> None:
    before = tiny()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    first, second, third = sensitivity(before, after, tokens).values()
    assert (first, third) == (0.0, 0.0)
    assert second > 0


def test_blocks_that_do_not_correspond_give_nothing(tokens: Tensor) -> None:
    before = tiny()
    assert sensitivity(before, make_student(before, 2), tokens) == {}
    assert sensitivity(before, tiny(hidden_size=32), tokens) == {}


def test_modules_are_put_back_after_an_error(tokens: Tensor) -> None:
    before = tiny().train()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    modules = list(before.model.layers)
    costs = sensitivity(before, after, tokens)
    assert costs["model.layers.0"] == 0
    assert math.isnan(costs["model.layers.1"])
    after.model.layers[1].mlp.down_proj = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="shapes"):
        sensitivity(before, after, tokens)
    assert all(a is b for a, b in zip(modules, before.model.layers, strict=True))
    assert before.training
    assert after.training

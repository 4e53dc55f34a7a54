"""What each block's change costs alone."""

from __future__ import annotations

import copy
import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn

import llmkern
from llmkern.distill import make_student
from llmkern.models import find_blocks
from llmkern.pipeline.sensitivity import sensitivity

tiny = partial(tiny_models.tiny, num_hidden_layers=3, initializer_range=0.2)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 96, (5, 16))


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


@pytest.mark.parametrize("resumes", [True, False])
def test_blocks_before_the_swapped_one_run_once(
    tokens: Tensor, resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resumes:
        monkeypatch.setattr("llmkern.pipeline.sensitivity._resumes", lambda *args: False)
    before = tiny(num_hidden_layers=6)
    after = copy.deepcopy(before)
    runs = Counter[str]()
    for which, model in (("before", before), ("after", after)):
        for layer in model.model.layers:

            def count(_: Any, args: Any, which: str = which) -> None:
                runs[which] += args[0].shape[1] == tokens.shape[1]  # not those of a probe

            layer.mlp.register_forward_pre_hook(count)
    sensitivity(before, after, tokens, batch_size=5)
    # The model itself, the blocks behind each swapped one, and each once more to go on from.
    assert runs == {"before": 6 + 15 + 6 if resumes else 6 + 30, "after": 6}


TEXT = [name for name, a in ARCHITECTURES.items() if a.takes == "text"]


@pytest.mark.parametrize("name", TEXT)
def test_going_on_from_a_block_costs_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ARCHITECTURES[name].model()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for block in find_blocks(after).modules:
            for parameter in block.parameters():
                parameter.mul_(0.9)
    windows = torch.randint(3, 60, (3, 12))

    def costs() -> Any:
        try:
            return sensitivity(before, after, windows, batch_size=2)
        except ValueError as error:
            return str(error)

    got = costs()
    monkeypatch.setattr("llmkern.pipeline.sensitivity._resumes", lambda *args: False)
    want = costs()
    assert got == want if isinstance(want, str) else got == pytest.approx(want, rel=1e-3, abs=1e-9)

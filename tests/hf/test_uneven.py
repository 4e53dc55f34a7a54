"""Models with a width of its own in each block: packed and reloaded, and damaged entries refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import LlamaForCausalLM

import llmkern

WINDOWS = torch.arange(4 * 16).remainder(64).view(4, 16)


@pytest.fixture
def model() -> LlamaForCausalLM:
    model = tiny_models.tiny(vocab_size=64, num_hidden_layers=3)
    llmkern.prune(
        model, "glu", ratio=0.25, round_to=32, allow_uneven=True, keep_last=0, calibration=WINDOWS
    )
    return model


def widths(model: Any) -> list[int]:
    return [layer.mlp.down_proj.in_features for layer in model.model.layers]


def test_packed_layers_of_uneven_width_come_back(model: LlamaForCausalLM, tmp_path: Path) -> None:
    assert len(set(widths(model))) > 1
    llmkern.quantize(model, "rtn", bits=4, group_size=32)
    with torch.no_grad():
        expected = model(input_ids=WINDOWS).logits
    llmkern.save(model, tmp_path / "out")
    again = llmkern.load(tmp_path / "out")
    assert widths(again) == widths(model)
    assert isinstance(again.model.layers[1].mlp.down_proj, llmkern.IntLinear)
    with torch.no_grad():
        assert torch.equal(again(input_ids=WINDOWS).logits, expected)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], r"llmkern: got \[\], expected the config entries of each block under layers"),
        ({"layers": {"1": 5}}, "llmkern: got .*expected the config entries of each block"),
        (
            {"layers": {"7": {"intermediate_size": 32}}},
            "got block '7', expected one of the 3 blocks",
        ),
        ({"layers": {"1": {"hidden_size": 63}}}, "LlamaConfig refuses {'hidden_size': 63}"),
        (
            {"layers": {"1": {"intermediate_size": 96}, "2": {}}},
            "of another shape than the model's",
        ),
    ],
    ids=["no_object", "no_entries", "no_such_block", "refused_by_the_class", "wrong_width"],
)
def test_damaged_entry_is_one_error(
    model: LlamaForCausalLM, tmp_path: Path, entry: Any, message: str
) -> None:
    llmkern.save(model, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"llmkern": entry}))
    with pytest.raises(ValueError, match=message):
        llmkern.load(tmp_path / "out")

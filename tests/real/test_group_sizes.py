"""Group sizes that are left to the package: what fits each layer is taken, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny

import llmkern
from llmkern import QuantFormat
from llmkern.pipeline import Prune, Quantize, default_recipe
from llmkern.pipeline.preflight import check

TOKENS = torch.arange(8 * 32).view(8, 32) % 96
# hidden size, neurons -> groups of attention (K = hidden) and of down_proj (K = neurons)
SHAPES = {
    "as_smollm2": (192, 512, 64, 128),
    "both_by_32": (160, 96, 32, 32),
    "a_whole_row": (128, 100, 128, 100),
}


def model(hidden: int, neurons: int) -> Any:
    return tiny(hidden_size=hidden, intermediate_size=neurons, num_attention_heads=4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_layer_gets_what_fits_it(method: str, shape: str, tmp_path: Path) -> None:
    hidden, neurons, *groups = SHAPES[shape]
    made = model(hidden, neurons)
    data = {"calibration": TOKENS} if method == "gptq" else {}
    report = llmkern.quantize(made, method, **data)
    lines = {line.name: line.group_size for line in report.layers}
    assert lines["model.layers.0.self_attn.q_proj"] == groups[0]
    assert lines["model.layers.1.mlp.down_proj"] == groups[1]
    said = " ".join(report.notes)
    for K, size in ((hidden, groups[0]), (neurons, groups[1])):
        assert (f"128 does not divide K = {K}" in said) == (size != 128)
    with torch.no_grad():
        wanted = made(TOKENS[:1]).logits
        llmkern.save(made, tmp_path / "out")
        assert torch.equal(llmkern.load(tmp_path / "out")(TOKENS[:1]).logits, wanted)


def test_a_size_that_was_asked_for_is_not_changed() -> None:
    with pytest.raises(ValueError, match="group_size: got 128, which does not divide K = 192"):
        llmkern.quantize(model(192, 512), "rtn", group_size=128)
    with pytest.raises(ValueError, match="group_size: got 128, which does not divide K = 192"):
        llmkern.quantize(model(192, 512), "rtn", rules={"*.q_proj": QuantFormat(4, 128)})
    with pytest.raises(ValueError, match="group_size: got 128, which does not divide K = 192"):
        llmkern.quantize(model(192, 512), "rtn", rules={"*": QuantFormat(4, 128)})


def test_preflight_says_it_and_the_default_recipe_passes() -> None:
    odd = model(192, 512)
    found = check(odd, [Quantize("gptq")], calibration=TOKENS)
    assert not found.errors
    assert any("groups of 64, because 128 does not divide K = 192" in str(n) for n in found.notes)
    # A quarter of 768 neurons leaves 576, which only groups of 64 divide.
    wide = model(192, 768)
    stages = [Prune("glu", ratio=0.25), *default_recipe()[1:2]]
    assert not check(wide, stages, calibration=TOKENS).errors

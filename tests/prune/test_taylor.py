"""Taylor importance equals its formula by autograd, and picks what the loss does not need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llmkern
from llmkern.calibrate.gradients import next_token_loss
from llmkern.models import find_blocks
from llmkern.prune._unit_plan import find_layers
from llmkern.prune.taylor import PARTS, TAYLORS, taylor_scores

Tiny = Callable[..., nn.Module]
Logits = Callable[[nn.Module, Tensor], Tensor]


def gradients(model: nn.Module, window: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    next_token_loss(model, window[None]).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", TAYLORS)
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_scores_equal_the_formula(tiny: Tiny, tokens: Tensor, model_type: str, kind: str) -> None:
    model = tiny(model_type)
    layers = find_layers(model, PARTS["both"], 8)
    scores = taylor_scores(model, layers, tokens, kind)
    each = [gradients(model, window) for window in tokens]
    mean = {name: sum(g[name] for g in each) / len(each) for name in each[0]}
    fisher = {name: sum(g[name].square() for g in each) / len(each) for name in each[0]}
    prefix = find_blocks(model).name
    for layer in layers:
        block = find_blocks(model).modules[layer.block]
        for unit in (0, len(layer.units) - 1):
            want = 0.0
            parts = [*layer.units.producers.items(), (layer.units.consumer, layer.units.columns)]
            for name, indices in parts:
                conv = type(block.get_submodule(name)).__name__ == "Conv1D"
                for key in ("weight", "bias"):
                    full = f"{prefix}.{layer.block}.{name}.{key}"
                    if full not in mean or (key == "bias" and name == layer.units.consumer):
                        continue
                    w, g, f = model.get_parameter(full).detach(), mean[full], fisher[full]
                    value = {
                        "param_first": w * g,
                        "param_second": w * w * f,
                        "param_mix": w * g - 0.5 * w * w * f,
                        "vectorize": w * g,
                    }[kind]
                    if key == "weight" and conv != (name == layer.units.consumer):
                        value = value.t()
                    own = value[indices[unit]]
                    want += float(own.sum().abs() if kind == "vectorize" else own.abs().sum())
            assert float(scores[layer.name][unit]) == pytest.approx(want, rel=1e-3), layer.name


def test_gradients_leave_no_trace(tiny: Tiny, tokens: Tensor) -> None:
    model = tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    settings = [p.requires_grad for p in model.parameters()]
    taylor_scores(model, find_layers(model, PARTS["both"], 8), tokens[:1])
    assert [p.requires_grad for p in model.parameters()] == settings
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("parts", "width", "heads"), [("both", 32, 2), ("mlp", 32, 4), ("heads", 64, 2)]
)
def test_parts_that_do_nothing_go(
    tiny: Tiny, tokens: Tensor, logits: Logits, parts: str, width: int, heads: int
) -> None:
    model = tiny("llama")
    for block in find_blocks(model).modules:
        block.mlp.down_proj.weight.data[:, ::2] = 0
        block.mlp.gate_proj.weight.data[::2] = 0
        block.mlp.up_proj.weight.data[::2] = 0
        block.self_attn.o_proj.weight.data[:, :16] = 0
        block.self_attn.v_proj.weight.data[:8] = 0
    before = logits(model, tokens)
    llmkern.prune(model, "taylor", ratio=0.5, parts=parts, round_to=8, calibration=tokens)
    assert model.config.intermediate_size == width
    assert model.config.num_attention_heads == heads
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-3, atol=1e-3)


def test_importance_of_its_own_is_no_option(tiny: Tiny, tokens: Tensor) -> None:
    for options, message in (
        ({"importance": "obs"}, "importance: got 'obs', expected one of taylor"),
        ({"taylor": "third"}, "taylor: got 'third', expected one of param_first"),
        ({"parts": "all"}, "parts: got 'all', expected one of both"),
        ({"gradient_samples": 0}, "gradient_samples: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            llmkern.prune(tiny("llama"), "taylor", ratio=0.5, calibration=tokens, **options)

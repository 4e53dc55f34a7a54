"""Activations that leave a dtype's range, and finite ones whose squares do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor

import llmkern
from llmkern.calibrate.statistics import ActivationNormStatistic, HessianStatistic
from llmkern.models import compute
from llmkern.prune.magnitude import magnitude
from llmkern.prune.wanda import WandaOptions, wanda

TOKENS = torch.arange(4 * 16).view(4, 16) % 96


def overflowing() -> Any:
    """A float16 model whose first blocks leave numbers that overflow inside them."""
    model = tiny(num_hidden_layers=4).half()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.model.layers[1].mlp.get_submodule(name).weight.mul_(3e3)
            model.model.layers[0].mlp.get_submodule(name).weight.mul_(3e3)
    return model


# In the model's own dtype: where float16 is slow, drivers compute in float32.
OWN = {"calibration": TOKENS, "compute_dtype": "float16"}
CALLS = {
    "gptq": lambda m, **o: llmkern.quantize(m, "gptq", group_size=32, **o),
    "sparsegpt": lambda m, **o: llmkern.prune(m, "sparsegpt", sparsity=0.5, **o),
    "wanda": lambda m, **o: llmkern.prune(m, "wanda", sparsity=0.5, **o),
    "owl": lambda m, **o: llmkern.prune(m, "wanda", sparsity=0.5, allocation="owl", **o),
    "mlp": lambda m, **o: llmkern.prune(m, "mlp", ratio=0.25, **o),
    "depth": lambda m, **o: llmkern.prune(m, "depth", blocks=1, **o),
    "distill": lambda m, **o: llmkern.distill(tiny(), m, data=TOKENS, steps=1, batch_size=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_float16_that_overflows_is_told_of_bfloat16(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A teacher is read in float32 where float16 is slow, and does not overflow there.
    monkeypatch.setattr(compute, "_is_native", lambda dtype: True)
    with pytest.raises((ValueError, FloatingPointError)) as caught:
        CALLS[name](overflowing(), **OWN)
    assert "float16 ends at 65504: dtype bfloat16 has float32's range" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gptq", "wanda", "mlp"])
def test_the_same_in_a_wider_range_works(name: str) -> None:
    CALLS[name](overflowing().bfloat16(), **OWN | {"compute_dtype": "bfloat16"})
    if name != "mlp":  # which looks at the model as it is, to find what belongs together
        CALLS[name](overflowing(), **OWN | {"compute_dtype": "float32"})


def large(size: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return size * torch.randn(20, 8, generator=generator)


@pytest.mark.parametrize("size", [1e17, 1e20, 1e37])
def test_norms_of_finite_activations_whose_squares_overflow(size: float) -> None:
    statistic = ActivationNormStatistic(8, tokens=20)
    statistic.update(large(size))
    want = large(size).double().square().mean(0)
    torch.testing.assert_close(statistic.mean_square().double(), want, rtol=1e-6, atol=0.0)
    weight = torch.randn(4, 8)
    got = wanda(weight, 0.5, statistic, WandaOptions())
    small = ActivationNormStatistic(8, tokens=20)
    small.update(large(1.0))
    assert torch.equal(got.mask, wanda(weight, 0.5, small, WandaOptions()).mask)
    assert not torch.equal(got.mask, magnitude(weight, 0.5, None, WandaOptions()).mask)


def test_a_hessian_that_overflows_is_called_so() -> None:
    statistic = HessianStatistic(8, tokens=20)
    statistic.update(large(1e20))
    with pytest.raises(ValueError, match=r"activations reach .*e\+20, expected at most about 1e18"):
        statistic.finish()
    statistic = HessianStatistic(8, tokens=20)
    statistic.update(large(1e17))
    assert bool(statistic.finish().isfinite().all())


def test_depth_by_states_whose_squares_overflow() -> None:
    model = tiny(num_hidden_layers=3)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e22)
        for layer in model.model.layers:
            for parameter in (*layer.mlp.parameters(), *layer.self_attn.parameters()):
                parameter.zero_()
    report = llmkern.prune(model, "depth", blocks=1, calibration=TOKENS)
    assert len(model.model.layers) == 2
    assert report is not None

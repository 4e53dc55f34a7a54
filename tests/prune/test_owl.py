"""OWL's allocation: blocks with more outliers keep more, the total is what was asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from llmkern.models import block_linears, find_blocks
from llmkern.prune import prune
from llmkern.prune.owl import _Outliers, _spread

VOCAB, LAYERS = 96, 4


def tiny() -> nn.Module:
    """A model whose blocks have ever more weights of ten times the usual size."""
    model = tiny_models.tiny(intermediate_size=96, num_hidden_layers=LAYERS)
    with torch.no_grad():
        for i, (_, block) in enumerate(find_blocks(model).items()):
            for linear in block_linears(block).values():
                linear.weight[torch.rand_like(linear.weight) < 0.005 * i] *= 10
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (8, 16))


def sparsities(model: nn.Module) -> dict[str, float]:
    return {
        f"{prefix}.{name}": float((linear.weight == 0).double().mean())
        for prefix, block in find_blocks(model).items()
        for name, linear in block_linears(block).items()
    }


def outliers(model: nn.Module, tokens: Tensor, threshold: float) -> list[float]:
    """Outlier fraction of each block, from the scores of a plain forward, all at once."""
    norms: dict[nn.Module, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda m, a: norms.__setitem__(m, a[0].double().flatten(0, 1).norm(dim=0))
        )
        for _, block in find_blocks(model).items()
        for linear in block_linears(block).values()
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    found = []
    for _, block in find_blocks(model).items():
        scores = torch.cat(
            [(m.weight.double().abs() * norms[m]).flatten() for m in block_linears(block).values()]
        )
        found.append(float((scores > threshold * scores.mean()).double().mean()))
    return found


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_blocks_with_more_outliers_keep_more(method: str, tokens: Tensor) -> None:
    model = tiny()
    wanted = outliers(model, tokens, 5)
    report = prune(model, method, sparsity=0.6, allocation="owl", calibration=tokens)
    assert list(report.outliers.values()) == pytest.approx(wanted, abs=1e-4)
    found = sparsities(model)
    blocks = [
        [share for name, share in found.items() if f"layers.{i}." in name] for i in range(LAYERS)
    ]
    assert all(max(block) - min(block) < 0.02 for block in blocks)
    means = [sum(block) / len(block) for block in blocks]
    assert means == sorted(means, reverse=True)
    assert max(abs(mean - 0.6) for mean in means) == pytest.approx(0.08, abs=0.01)
    assert report.sparsity == pytest.approx(0.6, abs=0.003)
    assert report.tokens == tokens.numel()


def test_options_change_the_allocation(tokens: Tensor) -> None:
    model = tiny()
    settings: list[dict[str, Any]] = [{}, {"owl_threshold": 8.0}, {"owl_lambda": 0.2}]
    reports = [
        prune(copy.deepcopy(model), sparsity=0.6, allocation="owl", calibration=tokens, **options)
        for options in settings
    ]
    assert list(reports[1].outliers.values()) == pytest.approx(outliers(model, tokens, 8), abs=1e-4)
    spreads = [
        max(x.sparsity for x in r.layers) - min(x.sparsity for x in r.layers) for r in reports
    ]
    assert spreads[2] > 2 * spreads[0]
    assert reports[2].sparsity == pytest.approx(0.6, abs=0.003)


def test_mean_is_exact_for_blocks_of_unequal_size() -> None:
    blocks = {"a": _Outliers(100, 10), "b": _Outliers(1000, 20), "c": _Outliers(300, 0)}
    found = _spread(blocks, 0.5, 0.1)
    total = sum(found[name] * block.weights for name, block in blocks.items())
    assert total == pytest.approx(0.5 * 1400, rel=1e-12)
    assert max(abs(s - 0.5) for s in found.values()) == pytest.approx(0.1)
    assert found["c"] > found["b"] > found["a"]
    assert _spread({"a": _Outliers(9, 3)}, 0.5, 0.1) == {"a": 0.5}


def test_layers_with_their_own_rule_are_left_out(tokens: Tensor) -> None:
    model = tiny()
    rules = {"*.mlp.*": "2:4", "model.layers.1.*": None}
    report = prune(model, sparsity=0.6, allocation="owl", rules=rules, calibration=tokens)
    found = sparsities(model)
    assert found["model.layers.0.mlp.up_proj"] == 0.5
    assert found["model.layers.1.self_attn.q_proj"] == 0
    assert sorted(report.outliers) == [f"model.layers.{i}" for i in (0, 2, 3)]
    shared = [layer for layer in report.layers if "self_attn" in layer.name]
    sizes = [layer.shape[0] * layer.shape[1] for layer in shared]
    mean = sum(s * x.sparsity for s, x in zip(sizes, shared, strict=True)) / sum(sizes)
    assert mean == pytest.approx(0.6, abs=0.003)


TOKENS = torch.ones(2, 8, dtype=torch.int64)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "allocation": ({"allocation": "best"}, "allocation: got 'best', expected 'uniform' or 'owl'"),
    "pattern": (
        {"sparsity": None, "pattern": "2:4"},
        "allocation: got 'owl' with 2:4, expected a sparsity",
    ),
    "beyond_one": (
        {"sparsity": 0.95},
        r"owl_lambda: got 0.08 with sparsity 0.95, expected sparsity",
    ),
    "below_zero": (
        {"owl_lambda": 0.6},
        r"owl_lambda: got 0.6 with sparsity 0.5, expected sparsity",
    ),
    "threshold": (
        {"owl_threshold": 0.0},
        r"owl_threshold: got 0.0, expected a number in \(0, inf\)",
    ),
    "uniform": (
        {"allocation": "uniform", "owl_lambda": 0.1},
        "owl_lambda: got 0.1, expected allocation 'owl'",
    ),
    "nothing_to_share": (
        {"rules": {"model.*": 0.5}},
        "allocation: got 'owl' with a rule for every layer",
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_bad_requests_leave_the_model_untouched(case: str) -> None:
    options, message = REFUSALS[case]
    model = tiny()
    with pytest.raises(ValueError, match=message) as caught:
        prune(model, **{"sparsity": 0.5, "calibration": TOKENS, "allocation": "owl", **options})
    assert "\n" not in str(caught.value)
    assert not any(sparsities(model).values())


def test_nan_in_the_activations_names_the_layer(tokens: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("model.layers.1.post_attention_layernorm.weight")[2] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.(gate|up)_proj: its calibration"):
        prune(model, sparsity=0.5, allocation="owl", calibration=tokens)
    assert not any(sparsities(model).values())

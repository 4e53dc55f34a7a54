"""Whole models pruned: zeros where they should be, what the report says, what is refused."""

from __future__ import annotations

import copy
import warnings
from functools import cache, partial
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llmkern
from llmkern.assets import bundled_model_dir, calibration_text, evaluation_text
from llmkern.calibrate import HessianStatistic, load_tokens, load_windows
from llmkern.models import block_linears, find_blocks
from llmkern.prune import METHODS, PruneReport, prune

VOCAB, LAYERS = 96, 2
SINGLE = [method.name for method in METHODS if "pattern" in method.amounts]
CALIBRATED = [name for name in SINGLE if name != "magnitude"]


tiny = partial(tiny_models.tiny, intermediate_size=96)


def gpt2() -> nn.Module:
    """Conv1D layers with biases and inputs of a mean far from zero."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (8, 16))


def data(method: str, tokens: Tensor) -> dict[str, Any]:
    """Calibration for the methods that need it."""
    return {} if method == "magnitude" else {"calibration": tokens}


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{prefix}.{name}": linear
        for prefix, block in find_blocks(model).items()
        for name, linear in block_linears(block).items()
    }


def zeros(model: nn.Module) -> dict[str, float]:
    return {
        name: float((linear.weight == 0).double().mean()) for name, linear in linears(model).items()
    }


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_each_layer_has_the_zeros_that_were_asked_for(
    method: str, sparsity: float, tokens: Tensor
) -> None:
    model = tiny()
    before = copy.deepcopy(model)
    report = prune(model, method, sparsity=sparsity, **data(method, tokens))
    assert len(report.layers) == 7 * LAYERS
    for name, share in zeros(model).items():
        assert share == pytest.approx(sparsity, abs=0.6 / 64), name
    assert report.sparsity == pytest.approx(sparsity, abs=0.01)
    for name, parameter in before.named_parameters():
        if "proj" not in name:
            assert torch.equal(parameter, model.get_parameter(name)), name
    assert bool(torch.isfinite(model(input_ids=tokens).logits).all())


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2", "3:8"])
def test_each_group_keeps_n_of_m(method: str, pattern: str, tokens: Tensor) -> None:
    model = tiny()
    report = prune(model, method, pattern=pattern, **data(method, tokens))
    n, m = map(int, pattern.split(":"))
    for name, linear in linears(model).items():
        kept = linear.weight.unflatten(1, (-1, m)).count_nonzero(2)
        assert bool((kept == n).all()), name
    assert {layer.pattern for layer in report.layers} == {pattern}


@pytest.mark.parametrize("method", SINGLE)
def test_report_is_complete(method: str, tokens: Tensor) -> None:
    model = tiny()
    parameters = sum(p.numel() for p in model.parameters())
    report = prune(model, method, sparsity=0.5, **data(method, tokens))
    assert isinstance(report, PruneReport)
    assert sorted(layer.name for layer in report.layers) == sorted(linears(model))
    for layer in report.layers:
        assert layer.shape == tuple(model.get_submodule(layer.name).weight.shape)
        assert layer.sparsity == pytest.approx(0.5, abs=0.01)
        assert 0 < layer.relative_loss < 0.5
        assert layer.loss > 0
        assert layer.factored
        assert not layer.bias_compensated
        assert layer.seconds > 0
    assert (report.method, report.amount) == (method, {"sparsity": 0.5})
    used = (tokens.numel(), 16) if method in CALIBRATED else (0, 0)
    assert (report.tokens, report.window) == used
    assert report.parameters_before == report.parameters_after == parameters
    assert list(report.kept) == ["lm_head"]
    assert report.to_dict()["layers"][0]["name"] == report.layers[0].name
    assert report.to_dict()["options"]["scope"] is None


@pytest.mark.parametrize("method", SINGLE)
def test_rules_choose_the_amount_by_name(method: str, tokens: Tensor) -> None:
    model = tiny()
    rules = {"*.mlp.*": "2:4", "*.down_proj": 0.75, "model.layers.1.self_attn.o_proj": None}
    report = prune(model, method, sparsity=0.25, rules=rules, **data(method, tokens))
    share = zeros(model)
    for i in range(LAYERS):
        assert share[f"model.layers.{i}.mlp.up_proj"] == 0.5
        assert share[f"model.layers.{i}.mlp.down_proj"] == pytest.approx(0.75, abs=0.01)
        assert share[f"model.layers.{i}.self_attn.q_proj"] == pytest.approx(0.25, abs=0.01)
    assert share["model.layers.1.self_attn.o_proj"] == 0
    assert report.kept["model.layers.1.self_attn.o_proj"] == "left dense by the rule"
    assert {layer.pattern for layer in report.layers} == {"2:4", None}


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_keep_their_dtype(
    method: str, dtype: torch.dtype, tokens: Tensor
) -> None:
    model = tiny().to(dtype)
    parameters = {name: p.data_ptr() for name, p in model.named_parameters()}
    prune(model, method, pattern="2:4", **data(method, tokens))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert parameters == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(share >= 0.5 for share in zeros(model).values())


def mean_error(model: nn.Module, original: nn.Module, tokens: Tensor) -> float:
    """How far the mean output of the first block's layers is off, given the original's inputs."""
    seen: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda m, a, n=name: seen.__setitem__(n, a[0].detach()))
        for name, linear in linears(original).items()
    ]
    with torch.no_grad():
        original(input_ids=tokens)
        total = 0.0
        for name, x in seen.items():
            if ".h.0." in name:
                gap = model.get_submodule(name)(x) - original.get_submodule(name)(x)
                total += float(gap.mean((0, 1)).square().sum())
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_biases_take_up_the_mean_of_what_is_removed(method: str, tokens: Tensor) -> None:
    original = gpt2()
    on, off = copy.deepcopy(original), copy.deepcopy(original)
    report = prune(on, method, sparsity=0.5, calibration=tokens)
    assert all(layer.bias_compensated for layer in report.layers)
    assert report.tokens == tokens.numel()
    report = prune(off, method, sparsity=0.5, bias_compensation=False, **data(method, tokens))
    assert not any(layer.bias_compensated for layer in report.layers)
    weights = [
        {n: p for n, p in m.named_parameters() if n.endswith("c_attn.weight")} for m in (on, off)
    ]
    assert torch.equal(
        weights[0]["transformer.h.0.attn.c_attn.weight"],
        weights[1]["transformer.h.0.attn.c_attn.weight"],
    )
    assert mean_error(on, original, tokens) < 1e-2 * mean_error(off, original, tokens)


def test_layers_come_in_the_order_of_execution_and_see_what_was_pruned(tokens: Tensor) -> None:
    model = tiny()
    masks = []
    for true_sequential in (False, True):
        copied = copy.deepcopy(model)
        prune(copied, "wanda", sparsity=0.7, calibration=tokens, true_sequential=true_sequential)
        masks.append({name: linear.weight != 0 for name, linear in linears(copied).items()})
    same = [name for name in masks[0] if torch.equal(masks[0][name], masks[1][name])]
    assert "model.layers.0.self_attn.q_proj" in same
    assert "model.layers.0.mlp.down_proj" not in same


class Expert(nn.Module):
    """A mixture of experts as separate linears, the second of which no token reaches."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.used, self.idle = old, copy.deepcopy(old)

    def forward(self, x: Tensor) -> Tensor:
        idle = self.idle(x[:0])
        y: Tensor = self.used(x)
        return y + idle.sum()


@pytest.mark.parametrize("method", CALIBRATED)
def test_expert_without_tokens_is_pruned_with_a_warning(method: str, tokens: Tensor) -> None:
    model = tiny()
    model.model.layers[0].mlp = Expert(model.model.layers[0].mlp)
    with pytest.warns(
        RuntimeWarning, match="pruned by a simpler method, because no token"
    ) as caught:
        report = prune(model, method, sparsity=0.5, calibration=tokens)
    assert str(caught[-1].message).startswith("model.layers.0.mlp.idle.")
    assert [layer.name for layer in report.layers if not layer.factored] == [
        f"model.layers.0.mlp.idle.{p}_proj" for p in ("gate", "up", "down")
    ]
    assert zeros(model)["model.layers.0.mlp.idle.up_proj"] == pytest.approx(0.5, abs=0.01)


TOKENS = torch.ones(2, 8, dtype=torch.int64)
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "method": (
        {"method": "snip"},
        "method: got 'snip', expected one of sparsegpt, wanda, magnitude",
    ),
    "option": ({"dampening": 1}, "dampening: not an option of method 'wanda', expected"),
    "foreign_option": ({"damp": 0.1}, "damp: not an option of method 'wanda', expected"),
    "damp": (
        {"method": "sparsegpt", "damp": 2.0},
        r"damp: got 2.0, expected a fraction in \[0, 1\)",
    ),
    "sparsity_one": ({"sparsity": 1.0}, r"sparsity: got 1.0, expected a fraction in \[0, 1\)"),
    "sparsity_negative": (
        {"sparsity": -0.5},
        r"sparsity: got -0.5, expected a fraction in \[0, 1\)",
    ),
    "no_amount": ({"sparsity": None}, "sparsity, pattern: got none of them, expected one"),
    "two_amounts": ({"pattern": "2:4"}, "sparsity, pattern: got several of them, expected one"),
    "ratio": ({"sparsity": None, "ratio": 0.5}, "ratio: got 0.5, expected sparsity or pattern for"),
    "pattern": (
        {"sparsity": None, "pattern": "4:2"},
        "pattern: got '4:2', expected n kept of m with 1 <= n < m <= 8",
    ),
    "pattern_does_not_divide": (
        {"sparsity": None, "pattern": "2:5"},
        r"pattern: got 2:5, which does not divide K = 64 of model.layers.0.self_attn.q_proj and 13 more "
        r"layers; expected m to be a divisor, or rules=\{'model.layers.0.self_attn.q_proj': None\}",
    ),
    "rule_value": (
        {"rules": {"*": 1.5}},
        r"rules\['\*'\]: got 1.5, expected a fraction in \[0, 1\)",
    ),
    "rule_pattern": ({"rules": {"*": "2:44"}}, r"rules\['\*'\]: got '2:44', expected n kept of m"),
    "rule_matches_nothing": (
        {"rules": {"*.fc1": None}},
        r"rules: got '\*.fc1', which matches no linear in model.layers; they are named like 'model",
    ),
    "scope": ({"scope": "column"}, "scope: got 'column', expected 'layer' or 'row'"),
    "scope_of_a_pattern": (
        {"sparsity": None, "pattern": "2:4", "scope": "row"},
        "scope: got 'row' with a pattern, expected None",
    ),
    "bias": ({"bias_compensation": True}, "bias_compensation: got True, expected None or False"),
    "magnitude_with_data": (
        {"method": "magnitude"},
        "calibration: got data, expected none: method 'magnitude' looks at the weights only",
    ),
    "magnitude_with_samples": (
        {"method": "magnitude", "calibration": None, "samples": 3},
        "samples: got 3, expected no data options",
    ),
    "token": ({"calibration": TOKENS * VOCAB}, f"calibration: got token {VOCAB}, expected tokens"),
    "tokenizer": ({"calibration": "some text"}, "tokenizer: got None, expected"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_bad_requests_leave_the_model_untouched(case: str) -> None:
    options, message = REFUSALS[case]
    model = tiny()
    with pytest.raises(ValueError, match=message) as caught:
        prune(model, **{"method": "wanda", "sparsity": 0.5, "calibration": TOKENS, **options})
    assert "\n" not in str(caught.value)
    assert not any(zeros(model).values())


@pytest.mark.parametrize("method", SINGLE)
def test_nan_in_a_weight_is_named_before_any_work(method: str, tokens: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = torch.nan
    message = r"model.layers.1.mlp.up_proj: its weight holds NaN or Inf"
    with pytest.raises(ValueError, match=message):
        prune(model, method, sparsity=0.5, **data(method, tokens))
    assert not any(zeros(model).values())


@pytest.mark.parametrize("method", CALIBRATED)
def test_nan_in_the_activations_is_named_and_the_model_stays_whole(
    method: str, tokens: Tensor
) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("model.layers.1.post_attention_layernorm.weight")[2] = torch.inf
    with (
        pytest.warns(RuntimeWarning, match=r"prune: stopped after 11 of 14 layers; model.layers.0"),
        pytest.raises(
            ValueError, match=r"model.layers.1.mlp.(gate|up)_proj: its calibration activations hold"
        ),
    ):
        prune(model, method, sparsity=0.5, calibration=tokens)
    assert [name for name, share in zeros(model).items() if not share] == [
        f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")
    ]


SPOILED: dict[str, tuple[Any, str]] = {
    "nan": (lambda H: H.index_fill(1, torch.tensor([3]), torch.nan), "NaN or Inf, expected finite"),
    "smaller": (lambda H: H[:32, :32].contiguous(), r"H: got \[32, 32\], expected \[64, 64\]"),
}


@pytest.mark.parametrize("case", list(SPOILED))
def test_a_bad_hessian_names_its_layer(
    case: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, message = SPOILED[case]
    finish = HessianStatistic.finish
    monkeypatch.setattr(HessianStatistic, "finish", lambda self: spoil(finish(self)))
    model = tiny()
    with pytest.raises(
        ValueError, match=rf"model.layers.0.self_attn.q_proj: .*{message}"
    ) as caught:
        prune(model, "sparsegpt", sparsity=0.5, calibration=tokens)
    assert "\n" not in str(caught.value)
    assert not any(zeros(model).values())


def test_options_reach_sparsegpt(tokens: Tensor) -> None:
    model = tiny()
    changes: list[dict[str, Any]] = [
        {},
        {"damp": 0.5},
        {"act_order": True},
        {"scope": "row"},
        {"true_sequential": False},
    ]
    results = []
    for change in changes:
        copied = copy.deepcopy(model)
        report = prune(copied, "sparsegpt", sparsity=0.5, calibration=tokens, **change)
        results.append(copied.get_parameter("model.layers.0.mlp.down_proj.weight").detach())
        assert {layer.damp for layer in report.layers} == {change.get("damp", 0.01)}
    for other in results[1:]:
        assert not torch.equal(results[0], other)
    ordered = copy.deepcopy(model)
    prune(ordered, "sparsegpt", pattern="2:4", act_order=True, calibration=tokens)
    for linear in linears(ordered).values():
        assert bool((linear.weight.unflatten(1, (-1, 4)).count_nonzero(2) == 2).all())


# --- the bundled, trained model -------------------------------------------------------------------


@cache
def bundled() -> tuple[nn.Module, Tensor, Tensor]:
    """The model in float32, calibration windows, held-out windows."""
    model = AutoModelForCausalLM.from_pretrained(bundled_model_dir(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_dir())
    calibration = load_windows(calibration_text(), model, tokenizer, seq_len=256, samples=16)
    held_out = load_tokens(evaluation_text(), model, tokenizer, seq_len=256)[:6]
    return model, calibration, held_out


@cache
def kl(method: str, amount: float | str, **options: Any) -> float:
    """KL to the original of the bundled model, pruned."""
    reference, calibration, held_out = bundled()
    model = copy.deepcopy(reference)
    asked = {"pattern" if isinstance(amount, str) else "sparsity": amount}
    prune(model, method, **asked, **data(method, calibration), **options)
    result = llmkern.evaluate(model, held_out, reference=reference, speed=False)
    assert result.kl is not None
    return result.kl


@pytest.mark.slow
@pytest.mark.parametrize("amount", [0.5, "2:4"], ids=["50", "2:4"])
def test_sparsegpt_beats_wanda_beats_magnitude(amount: float | str) -> None:
    assert kl("sparsegpt", amount) < 0.8 * kl("wanda", amount)
    assert kl("wanda", amount) < kl("magnitude", amount)


@pytest.mark.slow
def test_a_pattern_costs_more_than_the_same_sparsity() -> None:
    assert kl("sparsegpt", 0.5) < kl("sparsegpt", "4:8") < kl("sparsegpt", "2:4")


def test_nothing_is_warned_about_when_all_is_well(tokens: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in SINGLE:
            prune(tiny(), method, sparsity=0.5, **data(method, tokens))

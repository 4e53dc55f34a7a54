"""Whole models: which method is better, what the report says, which rules hold, what is refused."""

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
from llmkern import IntLinear, QuantFormat
from llmkern.assets import bundled_model_dir, calibration_text, evaluation_text
from llmkern.calibrate import load_tokens, load_windows
from llmkern.quantize import QuantizeReport, quantize

VOCAB, LAYERS = 96, 2
PROJECTIONS = ("self_attn.{}_proj", "qkvo"), ("mlp.{}_proj", ("gate", "up", "down"))
LINEARS = [form.format(part) for form, parts in PROJECTIONS for part in parts]


tiny = partial(tiny_models.tiny, intermediate_size=96)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (8, 16))


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
def kl(method: str, **options: Any) -> float:
    """KL to the original of the bundled model, quantized."""
    reference, calibration, held_out = bundled()
    model = copy.deepcopy(reference)
    quantize(model, method, calibration=calibration, **options)
    result = llmkern.evaluate(model, held_out, reference=reference, speed=False)
    assert result.kl is not None
    return result.kl


def first_block(method: str = "gptq", **options: Any) -> float:
    """Mean relative loss of the layers of the bundled model's first block, at 3 bits."""
    model, calibration, _ = bundled()
    rules = {"*": None, "model.layers.0.*": QuantFormat(3, 128)}
    report = quantize(
        copy.deepcopy(model), method, calibration=calibration[:8], rules=rules, **options
    )
    assert len(report.layers) == 7
    return sum(layer.relative_loss for layer in report.layers) / 7


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_beats_rtn(bits: int) -> None:
    assert kl("gptq", bits=bits) < 0.6 * kl("rtn", bits=bits)


def test_fewer_bits_cost_more() -> None:
    assert kl("rtn", bits=4) < 0.5 * kl("rtn", bits=3) < 0.25 * kl("rtn", bits=2)


def test_groups_beat_one_scale_per_row() -> None:
    assert kl("rtn", bits=3, group_size=128) < kl("rtn", bits=3, group_size=None)


def test_act_order_beats_the_natural_order() -> None:
    natural = first_block(act_order=False)
    assert first_block(act_order=True) < 0.95 * natural


def test_options_reach_the_method() -> None:
    plain = first_block()
    assert first_block(group_scales="dynamic") != plain
    assert first_block(damp=0.5) > plain
    assert first_block("rtn", clip_search=True) < first_block("rtn", clip_search=False)


# --- small random models --------------------------------------------------------------------------


def test_report_is_complete(tokens: Tensor) -> None:
    model = tiny()
    report = quantize(model, bits=3, group_size=32, symmetric=False, calibration=tokens)
    names = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS]
    assert sorted(layer.name for layer in report.layers) == sorted(names)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, IntLinear)
        assert (module.bits, module.group_size, module.symmetric) == (3, 32, False)
        assert layer.shape == (module.out_features, module.in_features)
        assert (layer.bits, layer.group_size, layer.symmetric) == (3, 32, False)
        assert 0 < layer.relative_loss < 0.2
        assert layer.loss > 0
        assert layer.damp == 0.01
        assert layer.factored
        assert layer.seconds > 0
    assert model.config.quantization_config["ignore"] == ["lm_head"]
    assert report.method == "gptq"
    assert (report.tokens, report.window) == (tokens.numel(), 16)
    assert report.seconds >= sum(layer.seconds for layer in report.layers)
    assert list(report.dense) == ["lm_head"]
    assert report.to_dict()["options"]["damp"] == 0.01
    assert report.to_dict()["layers"][0]["name"] in names


def test_layers_come_in_the_order_of_execution(tokens: Tensor) -> None:
    report = quantize(tiny(), group_size=32, calibration=tokens)
    first = [layer.name.split(".", 3)[3] for layer in report.layers[: len(LINEARS)]]
    order = [{first[0], first[1], first[2]}, {first[3]}, {first[4], first[5]}, {first[6]}]
    assert order == [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ]


def test_same_seed_gives_the_same_bits(tokens: Tensor) -> None:
    model = tiny()
    states = []
    for _ in range(2):
        copied = copy.deepcopy(model)
        quantize(copied, group_size=32, calibration=tokens.flatten(), seq_len=16, samples=4, seed=3)
        states.append(copied.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_true_sequential_changes_what_later_layers_see(tokens: Tensor) -> None:
    model = tiny()
    codes = []
    for true_sequential in (True, False):
        copied = copy.deepcopy(model)
        quantize(copied, bits=2, group_size=32, calibration=tokens, true_sequential=true_sequential)
        state = copied.state_dict()
        codes.append([state[f"model.layers.0.{n}.weight_packed"] for n in LINEARS])
    same = [torch.equal(a, b) for a, b in zip(*codes, strict=True)]
    assert same[:3] == [True] * 3, "q, k and v come first: nothing before them is quantized"
    assert not same[LINEARS.index("mlp.down_proj")]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_rules_choose_the_format_by_name(method: str, tokens: Tensor) -> None:
    model = tiny()
    rules = {
        "*.mlp.*": QuantFormat(3, 32),
        "*.down_proj": QuantFormat(4, None, symmetric=False),
        "model.layers.1.self_attn.o_proj": None,
    }
    report = quantize(model, method, group_size=32, calibration=tokens, rules=rules)
    for i in range(LAYERS):
        block = model.get_submodule(f"model.layers.{i}")
        assert (block.mlp.up_proj.bits, block.mlp.up_proj.group_size) == (3, 32)
        assert (block.mlp.down_proj.bits, block.mlp.down_proj.group_size) == (4, 96)
        assert not block.mlp.down_proj.symmetric
        assert (block.self_attn.q_proj.bits, block.self_attn.q_proj.group_size) == (4, 32)
    dense = model.get_submodule("model.layers.1.self_attn.o_proj")
    assert type(dense) is nn.Linear
    assert report.dense["model.layers.1.self_attn.o_proj"] == "left dense by the rule"


def test_conv1d_with_bias_is_quantized(tokens: Tensor) -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    reference = copy.deepcopy(model)
    report = quantize(model, group_size=32, calibration=tokens)
    assert len(report.layers) == 8
    result = llmkern.evaluate(model, tokens, reference=reference, speed=False)
    assert result.kl < 1e-3
    assert model.get_submodule("transformer.h.0.attn.c_attn").bias is not None


def test_experts_stay_dense_and_are_named_in_one_warning(tokens: Tensor) -> None:
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2)
    with pytest.warns(UserWarning, match="stay dense") as caught:
        report = quantize(model, group_size=32, calibration=tokens)
    (message,) = [str(w.message) for w in caught if "stay dense" in str(w.message)]
    for i in range(LAYERS):
        assert f"model.layers.{i}.mlp.experts: " in message
        assert f"model.layers.{i}.mlp.experts" in report.dense
    assert len(report.layers) == 4 * LAYERS


class Expert(nn.Module):
    """A mixture of experts as separate linears, the second of which no token reaches."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.used, self.idle = old, copy.deepcopy(old)

    def forward(self, x: Tensor) -> Tensor:
        idle = self.idle(x[:0])
        y: Tensor = self.used(x)
        return y + idle.sum()


def test_expert_without_tokens_is_rounded_with_a_warning(tokens: Tensor) -> None:
    model = tiny()
    model.model.layers[0].mlp = Expert(model.model.layers[0].mlp)
    with pytest.warns(RuntimeWarning, match="rounded to nearest") as caught:
        report = quantize(model, group_size=32, calibration=tokens)
    assert str(caught[-1].message).startswith("model.layers.0.mlp.idle.down_proj: ")
    flags = {layer.name: layer.factored for layer in report.layers}
    assert [name for name, factored in flags.items() if not factored] == [
        f"model.layers.0.mlp.idle.{p}_proj" for p in ("gate", "up", "down")
    ]
    idle = model.get_submodule("model.layers.0.mlp.idle.down_proj")
    assert bool(idle.dequantize().any())


def test_half_precision_models_keep_their_dtype(tokens: Tensor) -> None:
    model = tiny().to(torch.bfloat16)
    quantize(model, group_size=32, calibration=tokens)
    scales = {t.dtype for n, t in model.state_dict().items() if n.endswith("weight_scale")}
    assert scales == {torch.bfloat16}
    assert model(input_ids=tokens).logits.dtype == torch.bfloat16


def untouched(model: nn.Module) -> bool:
    return not any(isinstance(module, IntLinear) for module in model.modules())


def _with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = torch.nan
    return model


TOKENS = torch.ones(2, 8, dtype=torch.int64)
REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "method": ({"method": "awq"}, ValueError, "method: got 'awq', expected one of gptq, rtn"),
    "option": ({"dampening": 1}, ValueError, "dampening: not an option of method 'gptq', expected"),
    "foreign_option": (
        {"method": "rtn", "damp": 0.1},
        ValueError,
        "damp: not an option of method 'rtn'",
    ),
    "damp": ({"damp": 2.0}, ValueError, r"damp: got 2.0, expected a fraction in \[0, 1\)"),
    "eight_bits": (
        {"bits": 8},
        NotImplementedError,
        r"bits: got 8 bits, expected one of \(2, 3, 4\)",
    ),
    "eight_bits_by_rule": (
        {"rules": {"*.up_proj": QuantFormat(8)}},
        NotImplementedError,
        r"rules\['\*.up_proj'\]: got 8 bits",
    ),
    "five_bits": ({"bits": 5}, ValueError, "bits: got 5, expected one of"),
    "group_size": (
        {"group_size": 64},
        ValueError,
        r"group_size: got 64, which does not divide K = 96 of model.layers.0.mlp.down_proj and 1 more "
        r"layers; expected a divisor such as 32, or rules=\{'model.layers.0.mlp.down_proj': None\}",
    ),
    "rule_matches_nothing": (
        {"rules": {"*.fc1": None}},
        ValueError,
        r"rules: got '\*.fc1', which matches no linear in model.layers; they are named like 'model",
    ),
    "rule_of_another_kind": (
        {"rules": {"*": 4}},
        ValueError,
        r"rules: got 4 for '\*', expected a QuantFormat or None",
    ),
    "token": (
        {"calibration": TOKENS * VOCAB},
        ValueError,
        f"calibration: got token {VOCAB}, expected tokens",
    ),
    "window": (
        {"seq_len": 65},
        ValueError,
        "seq_len: got 65, expected at most the model's context",
    ),
    "samples": ({"samples": 0}, ValueError, "samples: got 0, expected at least 1"),
    "tokenizer": ({"calibration": "some text"}, ValueError, "tokenizer: got None, expected"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_bad_requests_leave_the_model_untouched(case: str) -> None:
    options, error, message = REFUSALS[case]
    model = tiny()
    with pytest.raises(error, match=message) as caught:
        quantize(model, **{"group_size": 32, "calibration": TOKENS, **options})
    assert "\n" not in str(caught.value)
    assert untouched(model)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_nan_in_a_weight_is_named_before_any_work(method: str, tokens: Tensor) -> None:
    model = _with_nan(tiny())
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj: its weight holds NaN or Inf"
    ):
        quantize(model, method, group_size=32, calibration=tokens)
    assert untouched(model)


def test_nan_in_the_activations_is_named_and_the_model_stays_whole(tokens: Tensor) -> None:
    model = tiny()
    with torch.no_grad():
        model.get_parameter("model.layers.1.post_attention_layernorm.weight")[2] = torch.inf
    with (
        pytest.warns(RuntimeWarning, match=r"stopped after 11 of 14 layers; model.layers.0"),
        pytest.raises(
            ValueError, match=r"model.layers.1.mlp.(gate|up)_proj: its calibration activations hold"
        ),
    ):
        quantize(model, group_size=32, calibration=tokens)
    assert isinstance(model.get_submodule("model.layers.1.self_attn.o_proj"), IntLinear)
    assert type(model.get_submodule("model.layers.1.mlp.up_proj")) is nn.Linear
    assert model(input_ids=tokens).logits.shape == (*tokens.shape, VOCAB)
    assert "model.layers.1.mlp.up_proj" in model.config.quantization_config["ignore"]


def test_a_second_time_there_is_nothing_left(tokens: Tensor) -> None:
    model = tiny()
    quantize(model, "rtn", group_size=32)
    with pytest.raises(
        ValueError, match=r"got no layer to quantize, expected some: .* already packed"
    ):
        quantize(model, "rtn", group_size=32)


def test_progress_names_layer_and_loss(
    tokens: Tensor, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    quantize(tiny(), group_size=32, calibration=tokens, progress=True)
    shown = capsys.readouterr().err
    assert "model.layers.1.mlp.down_proj" in shown
    assert "loss=" in shown
    assert "14/14" in shown
    quantize(tiny(), group_size=32, calibration=tokens)
    assert not capsys.readouterr().err


def test_nothing_is_warned_about_when_all_is_well(tokens: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(quantize(tiny(), group_size=32, calibration=tokens), QuantizeReport)


def test_tables_keep_zeros_and_report_the_error() -> None:
    model = tiny()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(torch.rand_like(weight) < 0.5)
    wanted = weight.detach().clone()
    report = quantize(model, "nf4", group_size=32)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, llmkern.Lut4Linear)
    got = layer.dequantize()
    assert not got[wanted == 0].any()
    line = next(line for line in report.layers if line.name.endswith("0.mlp.up_proj"))
    assert line.loss == pytest.approx(float((got - wanted).double().square().sum()), rel=1e-4)
    assert line.zeros == pytest.approx(float((got == 0).double().mean()))

"""Linears that are not exactly `nn.Linear`: the same function is one, another is left and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, TOKENS
from tiny_models import tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import l1_unstructured

import llmkern
from llmkern import QuantFormat
from llmkern.drive import Findings
from llmkern.models.linears import is_linear, other_function


class Separate(nn.Linear):
    """As Falcon's: the bias is added afterwards, with a rounding of its own."""

    def forward(self, input: Tensor) -> Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Renamed(nn.Linear):
    """Nothing of its own."""


class Traced(nn.Linear):
    """Calls the one of nn.Linear, and reads sizes."""

    def forward(self, input: Tensor) -> Tensor:
        assert input.shape[-1] == self.in_features
        return super().forward(input)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-50, 50))


class Upcast(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float() + 0.0


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.dropout(input, 0.5, self.training))


class Routing(nn.Linear):
    def forward(self, input: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(input)
        return logits.softmax(-1), logits


class Learned(nn.Linear):
    """Its scale is 1 at first, so that numbers do not tell."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class ScaledLater(nn.Linear):
    """The same function as long as it has its first setting."""

    scale = 1.0

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


def normed(*args: Any, **kwargs: Any) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(*args, **kwargs))


def masked(*args: Any, **kwargs: Any) -> nn.Module:
    return l1_unstructured(nn.Linear(*args, **kwargs), "weight", 0.5)


SAME = (nn.Linear, Renamed, Separate, Traced, ScaledLater)
OTHER = {
    Scaled: "of class Scaled, which computes something else",
    Clamped: "of class Clamped, which computes something else",
    Upcast: "of class Upcast, which computes something else",
    Dropping: "of class Dropping, which computes something else",
    Routing: "of class Routing, which computes something else",
    Learned: "of class Learned, which holds scale beside its weight",
    normed: "beside its weight",
    masked: "of class Linear, which holds weight_orig beside its weight",
}


def kind_name(kind: Any) -> str:
    return str(kind.__name__)


def with_class(kind: Any, dtype: torch.dtype) -> Any:
    """A Llama, whose first block's MLP is of another class of linear."""
    model = tiny(hidden_size=64, intermediate_size=128).to(dtype)
    mlp = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        old = getattr(mlp, name)
        new = kind(old.in_features, old.out_features, bias=True).to(dtype)
        setattr(mlp, name, new)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SAME, ids=kind_name)
def test_the_same_function_is_a_linear(kind: Any, dtype: torch.dtype) -> None:
    for bias in (False, True):
        assert other_function(kind(64, 32, bias=bias).to(dtype)) is None
        assert other_function(kind(64, 32, bias=bias, device="meta", dtype=dtype)) is None
    model = with_class(kind, dtype)
    report = llmkern.quantize(model, "rtn")
    assert "model.layers.0.mlp.down_proj" in [line.name for line in report.layers]


@pytest.mark.parametrize("kind", OTHER, ids=kind_name)
def test_another_function_is_left_and_named(kind: Any) -> None:
    model = with_class(kind, torch.bfloat16)
    linear, name = model.model.layers[0].mlp.down_proj, "model.layers.0.mlp.down_proj"
    before = torch.get_rng_state()
    assert OTHER[kind] in str(other_function(linear))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.warns(UserWarning, match="stay dense"):
        report = llmkern.quantize(model, "rtn")
    assert OTHER[kind] in report.dense[name]
    assert name not in [line.name for line in report.layers]
    assert model.get_submodule(name) is linear


def test_the_settings_of_a_layer_count() -> None:
    later = ScaledLater(64, 32)
    later.scale = 3.0
    assert "of class ScaledLater" in str(other_function(later))


@pytest.mark.parametrize("kind", OTHER, ids=kind_name)
def test_a_dry_run_warns_of_another_function(kind: Any) -> None:
    model = with_class(kind, torch.bfloat16)
    name, found = "model.layers.0.mlp.up_proj", Findings()
    found.left_alone(model, {name: str(other_function(model.get_submodule(name)))})
    assert len(found.warnings) == 1
    assert not found.notes


def test_every_class_of_transformers_that_is_a_linear_is_known() -> None:
    falcon = transformers.models.falcon.modeling_falcon.FalconLinear
    assert other_function(falcon(64, 32)) is None
    config = transformers.Llama4TextConfig(hidden_size=64, num_local_experts=4)
    router = transformers.models.llama4.modeling_llama4.Llama4Router(config)
    assert is_linear(router)
    assert "something else" in str(other_function(router))
    grouped = transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear
    assert "something else" in str(other_function(grouped(64, 32, 2)))


@pytest.mark.parametrize("row", ["Falcon 7B", "Falcon 40B", "Falcon RW"])
def test_falcon_is_quantized_and_pruned(row: str) -> None:
    for act in (
        lambda model: llmkern.quantize(model, "gptq", calibration=TOKENS).layers,
        lambda model: llmkern.prune(model, "wanda", sparsity=0.5, calibration=TOKENS).layers,
        lambda model: llmkern.patch(model, QuantFormat(4, 32)).replaced,
    ):
        assert len(act(ARCHITECTURES[row].model(torch.bfloat16))) == 16


def others(model: nn.Module) -> nn.Module:
    """Every linear of the blocks of a class that is none."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            new = Scaled(module.in_features, module.out_features, bias=module.bias is not None)
            model.set_submodule(name, new)
    return model


def unread() -> Any:
    """Data that fails when it is asked for."""
    raise AssertionError("calibration was read")
    yield


@pytest.mark.parametrize(
    "verb",
    [
        lambda m: llmkern.quantize(m, "gptq", calibration=unread()),
        lambda m: llmkern.quantize(m, "rtn"),
        lambda m: llmkern.quantize(m, "nf4"),
        lambda m: llmkern.prune(m, "wanda", sparsity=0.5, calibration=unread()),
        lambda m: llmkern.prune(m, "sparsegpt", pattern="2:4", calibration=unread()),
        lambda m: llmkern.prune(m, "magnitude", sparsity=0.5),
        lambda m: llmkern.patch(m),
    ],
    ids=["gptq", "rtn", "nf4", "wanda", "sparsegpt", "magnitude", "patch"],
)
def test_nothing_to_do_is_refused_before_data_is_read(verb: Any) -> None:
    text = r"got no layer to (quantize|prune), expected some: .*of class Scaled.*lm_head"
    with pytest.raises(ValueError, match=text):
        verb(others(tiny(hidden_size=64, intermediate_size=128)))


def test_rules_that_leave_everything_are_refused() -> None:
    model = tiny(hidden_size=64, intermediate_size=128)
    with pytest.raises(ValueError, match=r"got no layer to quantize, .*left dense by the rule"):
        llmkern.quantize(model, "gptq", rules={"*": None}, calibration=unread())
    with pytest.raises(ValueError, match=r"got no layer to prune, .*left dense by the rule"):
        llmkern.prune(model, "wanda", sparsity=0.5, rules={"*": None}, calibration=unread())
    with pytest.raises(ValueError, match="rule: got no layer to quantize"):
        llmkern.patch(model, {"*": None})


def test_weights_that_are_read_without_a_call_are_left() -> None:
    model = nn.Sequential(nn.MultiheadAttention(32, 2), nn.Linear(32, 32))
    report = llmkern.patch(model, QuantFormat(4, 32))
    assert list(report.replaced) == ["1"]
    assert report.left["0.out_proj"] == "nn.MultiheadAttention reads its weight"

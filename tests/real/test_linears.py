"""Linears that are not exactly nn.Linear, experts, routers; and that nothing done is no success."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router

import llmkern
from llmkern.models.experts import find_expert_matrices
from llmkern.models.heads import find_routers
from llmkern.models.linears import other_function
from llmkern.nn import is_packed

TOKENS = torch.arange(64).view(4, 16) % 90


class Scaled(nn.Linear):
    """Another function."""

    def forward(self, x):
        return 2 * super().forward(x)


class ScaledLater(nn.Linear):
    """The same function as long as it has its first scale."""

    scale = 1.0

    def forward(self, x):
        return self.scale * super().forward(x)


class Spelled(nn.Linear):
    """The same function, put in other words."""

    def forward(self, input):
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Marked(nn.Linear):
    """A subclass that only has a name."""


class Broken(nn.Linear):
    """Wants more than its input."""

    def forward(self, x, y):
        return super().forward(x) + y


SAME = [nn.Linear, Spelled, Marked, FalconLinear, ScaledLater]
OTHER = [Scaled, Broken]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SAME)
def test_the_same_function_is_a_linear(kind, dtype):
    assert other_function(kind(64, 32).to(dtype)) is None
    assert other_function(kind(64, 32, bias=False).to(dtype)) is None
    with torch.device("meta"):
        assert other_function(kind(64, 32)) is None


@pytest.mark.parametrize("kind", OTHER)
def test_another_function_is_named(kind):
    assert kind.__name__ in str(other_function(kind(64, 32)))
    later = ScaledLater(64, 32)
    later.scale = 3.0
    assert "ScaledLater" in str(other_function(later))


def with_linears(kind):
    model = tiny("llama", seed=0)
    for block in model.model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                other = kind(linear.in_features, linear.out_features, bias=False)
                other.load_state_dict(linear.state_dict())
                block.set_submodule(name, other)
    return model


@pytest.mark.parametrize("kind", [Spelled, FalconLinear])
def test_they_are_quantized_and_pruned(kind):
    model = with_linears(kind)
    report = llmkern.quantize(model, "gptq", group_size=32, calibration=TOKENS)
    assert len(report.layers) == 14
    assert sum(map(is_packed, model.modules())) == 14
    assert len(llmkern.prune(with_linears(kind), "magnitude", sparsity=0.5).layers) == 14


VERBS = {
    "rtn": lambda model: llmkern.quantize(model, "rtn", group_size=32),
    "gptq": lambda model: llmkern.quantize(
        model, "gptq", group_size=32, calibration="no such file"
    ),
    "nf4": lambda model: llmkern.quantize(model, "nf4"),
    "magnitude": lambda model: llmkern.prune(model, "magnitude", sparsity=0.5),
    "wanda": lambda model: llmkern.prune(model, "wanda", sparsity=0.5, calibration="no such file"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_to_do_is_refused_before_the_data_is_read(verb):
    model = with_linears(Scaled)
    with pytest.raises(ValueError, match=r"got no layer to .* and 13 more: of class Scaled,") as e:
        VERBS[verb](model)
    assert "\n" not in str(e.value)


def test_rules_that_leave_everything_are_refused():
    with pytest.raises(ValueError, match="got no layer to quantize"):
        llmkern.quantize(tiny("llama"), "rtn", group_size=32, rules={"*": None})


class Moe(nn.Module):
    """An odd router, and experts in parameters."""

    def __init__(self, experts):
        super().__init__()
        self.chooser = nn.Linear(64, 24, bias=False)
        self.small = nn.Linear(64, 4)
        self.experts = experts


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(24 * 8, 64))  # one below the other
        self.bias = nn.Parameter(torch.zeros(64))


@pytest.mark.parametrize(
    ("experts", "found"),
    [
        (Stacked(), "2-D parameters (w1 [192, 64])"),
        (nn.ParameterList([torch.zeros(8, 64) for _ in range(24)]), "2-D parameters (0 [8, 64]"),
        (nn.ParameterDict({"up": torch.zeros(24, 8, 64)}), "3-D parameters (up [24, 8, 64])"),
    ],
    ids=["stacked", "list", "three"],
)
def test_experts_and_routers_of_any_name_are_found(experts, found):
    model = nn.Module()
    model.config = type("Config", (), {"num_experts": 24})()
    model.mlp = Moe(experts)
    assert found in find_expert_matrices(model)["mlp.experts"]
    assert find_routers(model) == {"mlp.chooser": "a router", "mlp.small": "only 4 x 64"}


def test_a_router_that_is_a_linear_with_two_results_is_left():
    config = type(
        "Config", (), {"hidden_size": 64, "num_local_experts": 32, "num_experts_per_tok": 2}
    )
    assert other_function(Llama4Router(config())) is not None


def test_embeddings_of_positions_are_no_experts():
    module = nn.Module()
    module.position_embeddings = nn.Parameter(torch.zeros(1, 17, 64))
    assert not find_expert_matrices(module)

"""Experts in any shape are found and named; what routes is left, under any name."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, TOKENS
from torch import Tensor, nn

import llmkern
from llmkern import QuantFormat
from llmkern.models.experts import find_expert_matrices
from llmkern.models.heads import find_routers

ROWS = {
    "Mixtral": ("mlp.experts", "3-D parameters", 4),
    "Qwen2-MoE": ("mlp.experts", "3-D parameters", 4),
    "DeepSeek-V3": ("mlp.experts", "3-D parameters", 3),
    "gpt-oss": ("mlp.experts", "3-D parameters", 4),
    "Llama 4 (text)": ("feed_forward.experts", "3-D parameters", 2),
    "Jamba": ("feed_forward.experts", "3-D parameters", 2),
    "DBRX": ("ffn.experts.mlp", "2-D parameters", 4),
}
ROUTERS = {
    "DBRX": "ffn.router.layer",
    "Llama 4 (text)": "feed_forward.router",
    "Gemma 3n (text)": "altup.correction_coefs",
}


@pytest.mark.parametrize("row", ROWS)
def test_experts_are_found_named_and_left(row: str) -> None:
    end, how, count = ROWS[row]
    model = ARCHITECTURES[row].model(torch.bfloat16)
    experts = {name: why for name, why in find_expert_matrices(model).items() if "expert" in name}
    assert len(experts) == count
    assert all(name.endswith(end) and how in why for name, why in experts.items())
    for verb in (
        lambda: llmkern.prune(model, "wanda", sparsity=0.5, calibration=TOKENS).kept,
        lambda: llmkern.quantize(model, "gptq", calibration=TOKENS).dense,
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            left = verb()
        assert experts.items() <= left.items()
        assert next(iter(experts)) in "".join(str(warning.message) for warning in said)


@pytest.mark.parametrize("row", ROUTERS)
def test_routers_are_left(row: str) -> None:
    model = ARCHITECTURES[row].model(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = llmkern.quantize(model, "rtn")
    found = {name: why for name, why in report.dense.items() if name.endswith(ROUTERS[row])}
    assert found
    for name in found:
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])


@pytest.mark.parametrize("row", ["ViT", "Gemma 3", "PaliGemma", "Llava", "Mllama", "GPT-2"])
def test_single_matrices_are_no_experts(row: str) -> None:
    assert find_expert_matrices(ARCHITECTURES[row].model(torch.bfloat16)) == {}


WIDTH, COUNT = 32, 20


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 64, bias=False)
        self.down = nn.Linear(64, WIDTH, bias=False)


class Listed(nn.Module):
    """Experts in lists of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.ParameterList([torch.randn(64, WIDTH) for _ in range(COUNT)])


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(COUNT, 64, WIDTH))


class FlatExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(COUNT * 64, WIDTH))


SHAPES: dict[str, tuple[Any, str]] = {
    "modules": (lambda: nn.ModuleList(Expert() for _ in range(COUNT)), ""),
    "dict": (lambda: nn.ModuleDict({f"e{i}": Expert() for i in range(COUNT)}), ""),
    "list": (Listed, "w1"),
    "stack": (Stacked, ""),
    "flat": (FlatExperts, ""),
}


class Chooser(nn.Module):
    """A linear behind another name, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.picks = nn.Linear(WIDTH, COUNT, bias=False)


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module, *, alone: bool) -> None:
        super().__init__()
        self.chooses: nn.Module = Chooser() if alone else nn.Linear(WIDTH, COUNT, bias=False)
        self.branches = experts


class Block(nn.Module):
    def __init__(self, kind: str, *, alone: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, COUNT, bias=False)  # as wide as there are experts
        self.mlp = Mixture(SHAPES[kind][0](), alone=alone)


class Model(nn.Module):
    """With a config, as far as one is read."""

    def __init__(self, kind: str, *, alone: bool = False) -> None:
        super().__init__()
        entries = {"text_config": {"num_experts": COUNT, "num_experts_per_tok": 2}, 0: "label"}
        self.config = SimpleNamespace(to_dict=lambda: entries)
        self.layers = nn.ModuleList(Block(kind, alone=alone) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("alone", [False, True], ids=["beside", "wrapped"])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_router_is_known_by_its_place(kind: str, alone: bool) -> None:
    model, rest = Model(kind, alone=alone), SHAPES[kind][1]
    routers = {f"layers.{i}.mlp.chooses{'.picks' if alone else ''}" for i in range(2)}
    assert find_routers(model) == dict.fromkeys(routers, "a router")
    names = [f"layers.{i}.mlp.branches{f'.{rest}' if rest else ''}" for i in range(2)]
    if kind in ("modules", "dict"):
        names = []  # plain linears
    assert list(find_expert_matrices(model)) == names
    model.config = SimpleNamespace()  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = llmkern.patch(model, QuantFormat(4, 32))
    linears = [name for name in report.replaced if "branches" in name]
    assert len(linears) == (2 * 2 * COUNT if not names else 0)
    assert set(names) <= report.left.keys()


def test_gates_of_neurons_are_no_routers() -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 64) for name in ("gate", "up")})
    assert find_routers(nn.ModuleDict({"mlp": model})) == {}
    model["up"] = nn.Linear(32, 128)
    assert find_routers(nn.ModuleDict({"mlp": model})) == {"mlp.gate": "a router"}


def test_a_pattern_that_names_a_router_gets_it() -> None:
    model = Model("stack")
    report = llmkern.patch(model, {"layers.0.mlp.chooses": QuantFormat(4, 32)})
    assert list(report.replaced) == ["layers.0.mlp.chooses"]


def test_the_share_that_stays_dense_is_said() -> None:
    total = 96 * 64 * 2 + 9 * 64
    report = llmkern.patch(ARCHITECTURES["Llama"].model(), QuantFormat(4, 32))
    assert report.share.startswith(f"{total:,} of 0.2 M parameters (")
    assert "embeddings 6,144, head 6,144, norms" in report.share
    model = ARCHITECTURES["Mixtral"].model()
    with pytest.warns(UserWarning, match=r"stay dense:(.|\n)*stay as they were: experts 0.4 M"):
        llmkern.patch(model, QuantFormat(4, 32))


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

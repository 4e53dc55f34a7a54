"""A block run once for all groups of its linears: the bits of running it anew for each."""

import copy
import dataclasses

import pytest
import torch

import llmkern
from llmkern.calibrate import stepwise, walk
from llmkern.quantize import METHODS
from tests.helpers.tiny_models import tiny

GPTQ = {"method": "gptq", "bits": 3, "group_size": 32}
VERBS = {
    "gptq": lambda model, tokens: llmkern.quantize(model, calibration=tokens, **GPTQ),
    "sparsegpt": lambda model, tokens: llmkern.prune(
        model, "sparsegpt", sparsity=0.5, calibration=tokens, true_sequential=True
    ),
    "wanda": lambda model, tokens: llmkern.prune(
        model, "wanda", pattern="2:4", calibration=tokens, true_sequential=True
    ),
}


@pytest.fixture
def tokens():
    return torch.randint(3, 96, (6, 16), generator=torch.Generator().manual_seed(1))


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox"])
def test_the_bits_are_those_of_running_it_anew(model_type, verb, dtype, tokens, monkeypatch):
    model = tiny(model_type, seed=0, std=0.1, dtype=dtype)
    other = copy.deepcopy(model)
    runs = []
    finish = stepwise.Stepwise.finish
    monkeypatch.setattr(stepwise.Stepwise, "finish", lambda self: (runs.append(self), finish(self)))
    VERBS[verb](model, tokens)
    assert len(runs) == 1  # of two blocks; nobody needs what leaves the last
    monkeypatch.setattr(stepwise, "fits", lambda *args: False)
    VERBS[verb](other, tokens)
    assert len(runs) == 1
    first, second = states(model), states(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_linear_is_called_once_per_batch_and_block(tokens):
    model = tiny("llama", seed=0)
    calls = []
    for block in model.model.layers:
        block.self_attn.register_forward_pre_hook(lambda *args: calls.append(1))
    llmkern.quantize(model, "gptq", group_size=32, calibration=tokens, batch_size=2)
    # Three batches and a look at the first for each block; before that, a few tokens through the model
    # and through the blocks alone.
    assert len(calls) == 2 * (3 + 1) + 2 * 2


def test_little_memory_runs_it_anew(tokens, monkeypatch):
    monkeypatch.setattr(stepwise, "room", lambda device: 1000)
    monkeypatch.setattr(stepwise.Stepwise, "__enter__", pytest.fail)
    assert llmkern.quantize(tiny("llama"), "gptq", group_size=32, calibration=tokens).layers


class Turns(torch.nn.Module):
    """Calls its linears in another order from its third call on: a batch goes another way."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        first, second = (self.a, self.b) if self.calls <= 4 else (self.b, self.a)
        return second(torch.tanh(first(x)))


def test_a_batch_that_goes_another_way_is_no_error(tokens):
    model = tiny("llama", seed=0)
    for block in model.model.layers:
        block.mlp = Turns(64)
    report = llmkern.quantize(model, "gptq", group_size=32, calibration=tokens, batch_size=1)
    assert {line.name.rpartition(".")[2] for line in report.layers} >= {"a", "b"}
    assert len(report.layers) == 2 * 6


def test_an_error_in_the_middle_leaves_no_forward_waiting(tokens, monkeypatch):
    model = tiny("llama", seed=0)
    method = next(m for m in METHODS if m.name == "gptq")
    change = method.work.function

    def broken(layer, options):
        if layer.name.endswith("up_proj"):
            raise ValueError("broken")
        return change(layer, options)

    work = dataclasses.replace(method.work, function=broken)
    monkeypatch.setitem(vars(method), "work", work)
    with (
        pytest.warns(RuntimeWarning, match="stopped"),
        pytest.raises(ValueError, match="up_proj: broken"),
    ):
        llmkern.quantize(model, "gptq", group_size=32, calibration=tokens)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.isfinite(model(tokens).logits).all()


def test_settings_of_the_caller_hold_inside(tokens):
    model = tiny("llama", seed=0)
    seen = set()
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(
            lambda *args: seen.add((torch.is_grad_enabled(), llmkern._backends.forced_backend()))
        )
    with llmkern.use_backend("reference"):
        llmkern.quantize(model, "gptq", group_size=32, calibration=tokens)
    assert seen == {(False, "reference")}


def test_inputs_come_in_the_order_of_the_batches(tokens):
    model = tiny("llama", seed=0)

    def on_block(block):
        groups = block.groups()
        with stepwise.Stepwise(block, groups) as steps:
            for index in range(len(groups)):
                spec = list(steps.inputs())
                assert [x.shape[0] for x in spec] == [4, 2]
                if index == 0:
                    assert torch.equal(
                        spec[1], block.module.input_layernorm(block.states.entering(1))
                    )

    walk(model, tokens, on_block, batch_size=4)

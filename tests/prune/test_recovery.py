"""Training after pruning lowers the loss, keeps zeros, and leaves a plain model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import llmkern
from llmkern.models import find_blocks
from llmkern.prune import WidthOptions
from llmkern.prune.recovery import recover

Tiny = Callable[..., nn.Module]


def patterned() -> Tensor:
    """Text that can be learnt: each token follows from the one before."""
    start = torch.arange(3, 35)[:, None]
    return (start + 7 * torch.arange(16)) % 90 + 3


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_loss_falls_and_zeros_stay(tiny: Tiny, model_type: str, mode: str) -> None:
    model, windows = tiny(model_type), patterned()
    if model_type == "llama":
        llmkern.prune(model, "magnitude", sparsity=0.5)
    zeros = {name: p == 0 for name, p in model.named_parameters()}
    names = [name for name, _ in model.named_parameters()]
    classes = [type(m) for m in model.modules()]
    embedding = model.get_input_embeddings().weight.clone()
    options = WidthOptions(recovery=mode, recovery_steps=40, recovery_lr=5e-3)
    losses = recover(model, windows, options, batch_size=8)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert [name for name, _ in model.named_parameters()] == names
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    for name, parameter in model.named_parameters():
        if zeros[name].double().mean() > 0.3:
            assert torch.equal(parameter == 0, zeros[name]), name


@pytest.mark.slow
def test_same_seed_same_weights(tiny: Tiny) -> None:
    windows, options = patterned(), WidthOptions(recovery="lora", recovery_steps=3)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny("llama")
        recover(model, windows, options, seed=3)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_sixteen_bits_come_back(tiny: Tiny) -> None:
    model = tiny("llama")
    for parameter in model.parameters():  # as from_pretrained does it: buffers stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    before = find_blocks(model).modules[0].mlp.down_proj.weight.clone()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    options = WidthOptions(recovery="full", recovery_steps=5, recovery_lr=1e-3)
    recover(model, patterned(), options)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not torch.equal(find_blocks(model).modules[0].mlp.down_proj.weight, before)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["glu", "heads", "depth", "taylor"])
def test_every_method_can_recover(tiny: Tiny, method: str) -> None:
    report = llmkern.prune(
        tiny("llama", num_hidden_layers=4),
        method,
        ratio=0.5,
        calibration=patterned(),
        recovery="lora",
        recovery_steps=4,
    )
    assert len(report.recovery_loss) == 4


def test_loss_that_diverges_is_an_error(tiny: Tiny) -> None:
    model = tiny("llama")
    options = WidthOptions(recovery="full", recovery_steps=3, recovery_lr=1e30)
    with pytest.raises(ValueError, match=r"recovery_lr: got 1e\+30: loss: got (nan|inf) in step"):
        recover(model, patterned(), options)


def test_peft_missing_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"without the package peft.*llmkern\[recovery\]"):
        recover(tiny("llama"), patterned(), WidthOptions(recovery="lora"))

"""Logits that are not hidden @ headᵀ: capped, scaled, biased heads, or such that training makes so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTJConfig

from llmkern.distill import distill
from llmkern.distill._distiller import Distiller
from llmkern.distill._heads import Reader
from llmkern.distill._soft_loss import SoftOptions
from llmkern.reference.kd_loss import kd_loss as specification

TOKENS = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(0))


def gpt_j() -> Any:
    config = GPTJConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)
    return AutoModelForCausalLM.from_config(config).eval()


def after(function: Any, **parameters: Tensor) -> Any:
    """A Llama that makes something of its logits."""
    model = tiny("llama")
    for name, value in parameters.items():
        model.register_parameter(name, nn.Parameter(value))
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = function(model, out.logits)
        return out

    model.forward = forward
    return model


def biased() -> Any:
    model = tiny("llama")
    model.lm_head = nn.Linear(64, 96)
    return model


def hooked() -> Any:
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def scaled_before() -> Any:
    """As MiniCPM and T5 do, before the head."""
    model = tiny("llama")
    model.model.register_forward_hook(
        lambda module, args, out: out.__class__(last_hidden_state=out.last_hidden_state / 4)
    )
    return model


# model, whether logits need not be made of all tokens at once
HEADS = {
    "llama": (lambda: tiny("llama"), True),
    "qwen2": (lambda: tiny("qwen2"), True),
    "gpt2": (lambda: tiny("gpt2"), True),
    "scaled_before_the_head": (scaled_before, True),
    "gemma2": (lambda: tiny("gemma2", final_logit_softcapping=30.0, head_dim=16), False),
    "gemma2_far_from_its_cap": (
        lambda: tiny("gemma2", std=1e-3, final_logit_softcapping=30.0, head_dim=16),
        False,
    ),
    "cohere": (lambda: tiny("cohere", logit_scale=0.0625), False),
    "granite": (lambda: tiny("granite", logits_scaling=8.0), False),
    "granite_of_scale_1": (lambda: tiny("granite", logits_scaling=1.0), False),
    "gpt_j": (gpt_j, False),
    "bias": (biased, False),
    "hook": (hooked, False),
    "capped_where_large": (
        lambda: after(lambda m, x: x if x.abs().max() < 50 else 50 * torch.tanh(x / 50)),
        False,
    ),
    "learned_scale_of_1": (lambda: after(lambda m, x: x * m.scale, scale=torch.ones(())), False),
    "in_place": (lambda: after(lambda m, x: x.mul_(1.0)), False),
    "masked": (lambda: after(lambda m, x: x.index_fill(-1, torch.tensor([5]), -1e9)), False),
}


@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    make, plain = HEADS[name]
    student, teacher = make(), make()
    module = Distiller(student, teacher, SoftOptions(0.5, 1.5))
    for _ in range(2):
        got = module({"input_ids": TOKENS}, 4.0 * 11)
        with torch.no_grad():
            theirs = teacher(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
        mine = student(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
        options = {"alpha": 0.5, "temperature": 1.5, "divergence": "forward_kl"}
        want = specification(mine, theirs, TOKENS[:, 1:].flatten(), **options)
        torch.testing.assert_close((got["loss"], got["ce"], got["kd"]), want)
        weights = [p for p in student.parameters() if p.requires_grad]
        a, b = (torch.autograd.grad(x, weights, allow_unused=True) for x in (got["loss"], want[0]))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
        with torch.no_grad():  # as after a step
            for weight, gradient in zip(weights, b, strict=True):
                weight -= 0.5 * (0 if gradient is None else gradient)
    fused = Reader()(student, {"input_ids": TOKENS}).hidden is not None
    assert fused == plain


def test_a_head_that_changes_between_steps_is_seen() -> None:
    student = tiny("llama")
    read = Reader()
    assert read(student, {"input_ids": TOKENS}).hidden is not None
    own = student.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    student.forward = forward
    got = read(student, {"input_ids": TOKENS})
    assert torch.equal(got.all_logits(), student(input_ids=TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_teachers_in_16_bits_and_autocast(dtype: torch.dtype) -> None:
    student, teacher = tiny("llama"), tiny("llama").to(dtype)
    report = distill(student, teacher, data=TOKENS, steps=2, batch_size=2, mixed_precision="bf16")
    assert len(report.training.steps) == 2


@pytest.mark.parametrize("method", ["soft", "hidden", "gkd", "minillm"])
def test_a_step_is_the_same_however_it_is_divided(method: str) -> None:
    options: dict[str, Any] = {"steps": 2, "lr": 1e-3, "data": TOKENS, "weight_decay": 0.0}
    if method in ("gkd", "minillm"):
        options |= {"prompt_len": 4, "max_new_tokens": 6}
    found = []
    for size, accumulate in ((4, 1), (1, 4)):
        student = tiny("llama", seed=1, num_hidden_layers=1)
        teacher = tiny("llama", seed=0)
        with torch.no_grad():  # rows of very different size
            teacher.get_input_embeddings().weight[:32] *= 30
        report = distill(
            student, teacher, method, batch_size=size, accumulate=accumulate, **options
        )
        found.append(([s.metrics for s in report.training.steps], student.state_dict()))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name], rtol=1e-3, atol=2e-4)

"""MiniLLM: the estimator's expectation is the gradient, by counting all texts of a tiny language."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from tiny_models import llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from llmkern.distill import MiniLlmOptions, distill
from llmkern.distill._generate import Mixture, SamplingOptions, sample, seeded_uniforms
from llmkern.distill.minillm import MiniLlm, policy_loss

V, N, END = 4, 3, 1
PROMPT = [0, 2]


def model(seed: int) -> GPT2LMHeadModel:
    """In float64 throughout: a Llama's norms and rotations compute in float32."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, initializer_range=0.8)).double()


def texts() -> list[tuple[int, ...]]:
    """All texts of at most N tokens, each ending where END is drawn."""
    found = set()
    for text in itertools.product(range(V), repeat=N):
        end = text.index(END) + 1 if END in text else N
        found.add(text[:end])
    return sorted(found)


def log_probs(net: torch.nn.Module, text: tuple[int, ...]) -> Tensor:
    """[len(text), V]: log-probabilities of each token of a text after the prompt."""
    ids = torch.tensor([[*PROMPT, *text]])
    logits = net(input_ids=ids).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1)


def chosen(table: Tensor, text: tuple[int, ...]) -> Tensor:
    return table.gather(1, torch.tensor(text)[:, None])[:, 0]


def gradients(loss: Tensor, net: torch.nn.Module) -> list[Tensor]:
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize(
    ("mix", "importance"), [(0.0, "token"), (0.0, "sequence"), (0.3, "sequence"), (0.8, "sequence")]
)
def test_expected_estimate_is_the_gradient_of_the_sequence_level_reverse_kl(mix, importance):
    student, teacher = model(1), model(2).eval()
    exact, total = torch.zeros((), dtype=torch.float64), 0.0
    for text in texts():
        q = chosen(log_probs(student, text), text).sum()
        p = chosen(log_probs(teacher, text), text).sum().detach()
        exact = exact + q.exp() * (q - p)
        total += float(q.detach().exp())
    assert total == pytest.approx(1.0)
    want = gradients(exact, student)

    options = MiniLlmOptions(
        teacher_mix=mix, importance=importance, max_weight=None, length_norm=False, lm_weight=0.0
    )
    module = MiniLlm(student, teacher, options)
    expected = torch.zeros((), dtype=torch.float64)
    for text in texts():
        with torch.no_grad():
            both = log_probs(student, text), log_probs(teacher, text)
            drawn = (
                (1 - mix) * chosen(both[0], text).exp() + mix * chosen(both[1], text).exp()
            ).log()
        row = torch.tensor([[*PROMPT, *text]])
        batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        batch["labels"] = row.clone()
        batch["labels"][:, : len(PROMPT)] = -100
        batch["log_probs"] = torch.zeros(row.shape, dtype=torch.float64)
        batch["log_probs"][0, len(PROMPT) :] = drawn
        expected = expected + drawn.sum().exp() * module(batch, 1.0)["loss"]
    got = gradients(expected, student)
    largest = max(float(g.abs().max()) for g in want)
    assert largest > 1e-3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def rows() -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    keep = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
    n = int(keep.sum())
    generator = torch.Generator().manual_seed(0)
    log_q, log_p, kl, drawn = (
        -torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    return (log_q.requires_grad_(), log_p, kl.requires_grad_(), drawn), keep


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("limit", [None, 1.2])
def test_weights_and_rewards_are_those_of_the_formula(importance, length_norm, limit):
    terms, keep = rows()
    options = MiniLlmOptions(
        importance=importance, length_norm=length_norm, max_weight=limit, prompt_len=1
    )
    got = policy_loss(terms, keep, options)
    want, start = torch.zeros((), dtype=torch.float64), 0
    for count in keep.sum(1).tolist():
        log_q, log_p, kl, drawn = (values[start : start + count] for values in terms)
        start += count

        def weight(t, log_q=log_q, drawn=drawn):
            first = t if importance == "token" else 0
            ratio = 1.0
            for s in range(first, t + 1):
                ratio *= float((log_q[s].detach() - drawn[s]).exp())
            return ratio if limit is None else min(ratio, limit)

        for t in range(count):
            earned = 0.0
            for later in range(t + 1, count):
                reward = float(log_p[later] - log_q[later].detach())
                earned += reward * (weight(t) if importance == "token" else weight(later))
            if length_norm and t + 1 < count:
                earned /= count - t - 1
            before = weight(t) if importance == "token" else (weight(t - 1) if t else 1.0)
            want = want + before * kl[t] - earned * log_q[t]
    torch.testing.assert_close(got, want)
    a = torch.autograd.grad(got, (terms[0], terms[2]))
    b = torch.autograd.grad(want, (terms[0], terms[2]))
    torch.testing.assert_close(a, b)


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    def run() -> tuple[Tensor, list[Tensor]]:
        student, teacher = model(1), model(2).eval()
        module = MiniLlm(student, teacher, MiniLlmOptions(), accumulate=2)
        numbers = seeded_uniforms(5 * 6, "x").view(5, 6)
        drawn = sample(
            student, [PROMPT] * 5, numbers, SamplingOptions(6), [END], Mixture(teacher, 0.5)
        )
        batch = drawn._asdict() | {"windows": torch.tensor([[0, 2, 3, 2], [2, 2, 0, 3]])}
        losses = module(batch, 9.0)
        ce = torch.nn.functional.cross_entropy(
            student(batch["windows"]).logits[:, :-1].flatten(0, 1),
            batch["windows"][:, 1:].flatten(),
        )
        torch.testing.assert_close(losses["ce"], ce.detach() / 2)
        return losses["loss"].detach(), gradients(losses["loss"], student)

    loss, grads = run()
    monkeypatch.setattr(sys.modules["llmkern.distill.minillm"], "_CHUNK", 3 * V)
    again, others = run()
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(others, grads)


def test_samples_know_the_probability_that_they_were_drawn_with():
    student, teacher = model(1), model(2)
    numbers = seeded_uniforms(4 * N, "y").view(4, N)
    got = sample(student, [PROMPT] * 4, numbers, SamplingOptions(N), [END], Mixture(teacher, 0.4))
    for row in range(4):
        text = tuple(got.labels[row][got.labels[row] != -100].tolist())
        q, p = (chosen(log_probs(net, text), text).detach().exp() for net in (student, teacher))
        want = (0.6 * q + 0.4 * p).log().float()
        torch.testing.assert_close(
            got.log_probs[row, 2 : 2 + len(text)], want, rtol=1e-4, atol=1e-5
        )


def tokens() -> Tensor:
    return torch.randint(2, 16, (10, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [1, 2])
def test_reverse_kl_falls(refresh):
    options = {"prompt_len": 3, "max_new_tokens": 6, "lm_weight": 0.0, "refresh": refresh}
    training = {"steps": 40, "batch_size": 8, "lr": 0.003}
    teacher, student = (llama(seed, initializer_range=0.1) for seed in (0, 3))
    report = distill(student, teacher, "minillm", data=tokens(), **options, **training)
    kd = [step.metrics["kd"] for step in report.training.steps]
    assert sum(kd[-5:]) < 0.7 * sum(kd[:5])
    assert "ce" not in report.training.steps[0].metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_p": 0.9}, "top_p: got 0.9, expected 1: importance weights need every token"),
        ({"sample_temperature": 0.0}, "sample_temperature: got 0.0, expected more than 0"),
        ({"teacher_mix": 1.0}, r"teacher_mix: got 1.0, expected a share in \[0, 1\)"),
        ({"importance": "none"}, "importance: got 'none', expected one of token, sequence"),
        ({"max_weight": 0.0}, "max_weight: got 0.0, expected a positive number or None"),
        ({"lm_weight": -1.0}, "lm_weight: got -1.0, expected at least 0"),
        ({"refresh": 0}, "refresh: got 0, expected at least 1"),
        ({"on_policy": 0.5}, "on_policy: not an option of method 'minillm'"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:24],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        distill(llama(seed=3), llama(), "minillm", data=tokens(), prompt_len=3, **arguments)

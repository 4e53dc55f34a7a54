"""Sampling: the right distribution, a cache that changes nothing, rows that do not disturb each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama
from transformers import GPT2Config, GPT2LMHeadModel

from llmkern.distill._generate import (
    Mixture,
    SamplingOptions,
    check_room,
    draw,
    sample,
    seeded_uniforms,
    stop_tokens,
)

PROMPTS = [[0, 5, 6], [0, 7], [0, 8, 9, 4, 5]]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=16, n_positions=48, initializer_range=0.5
    )
    return GPT2LMHeadModel(config)


def numbers(rows: int, count: int) -> torch.Tensor:
    return torch.stack([seeded_uniforms(count, "test", i) for i in range(rows)])


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_each_token_is_drawn_from_the_models_own_distribution(make):
    model = make().train()
    uniforms = numbers(3, 9)
    got = sample(model, PROMPTS, uniforms, SamplingOptions(9, sample_temperature=0.7))
    assert model.training
    model.eval()
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for t in range(9):
            logits = model(torch.tensor([ids])).logits[0, -1].double()
            p = (logits / 0.7).softmax(-1)
            token = int((p.cumsum(-1) <= uniforms[i, t]).sum())
            place = len(ids)
            ids.append(token)
            assert got.input_ids[i, place] == got.labels[i, place] == token
            assert got.log_probs[i, place] == pytest.approx(
                float(p[token].detach().log()), abs=1e-4
            )
        assert got.attention_mask[i].sum() == len(ids)
        assert (got.labels[i, : len(prompt)] == -100).all()
        assert (got.labels[i, len(ids) :] == -100).all()


def test_greedy_is_what_generate_does_and_rows_end():
    model = llama()
    ends = stop_tokens(model)
    assert ends == [1]
    # Whatever token it gives third in the first row ends rows now.
    free = sample(model, PROMPTS, numbers(3, 8), SamplingOptions(8, sample_temperature=0))
    ends = [int(free.input_ids[0, 5])]
    got = sample(model, PROMPTS, numbers(3, 8), SamplingOptions(8, sample_temperature=0), ends)
    for i, prompt in enumerate(PROMPTS):
        want = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )[0]
        kept = got.input_ids[i][got.attention_mask[i].bool()]
        assert torch.equal(kept, want)
        assert torch.equal(got.labels[i][got.labels[i] != -100], want[len(prompt) :])


def test_a_row_depends_neither_on_neighbours_nor_on_padding():
    model = llama()
    all_rows = sample(model, PROMPTS, numbers(3, 6), SamplingOptions(6))
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], numbers(3, 6)[i : i + 1], SamplingOptions(6))
        kept = all_rows.input_ids[i][all_rows.attention_mask[i].bool()]
        assert torch.equal(kept, alone.input_ids[0])


def test_the_cache_is_used():
    model = llama()
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    sample(model, PROMPTS, numbers(3, 4), SamplingOptions(4))
    assert lengths == [5, 1, 1, 1]


def test_draws_have_the_probabilities_of_the_options():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(40_000, 4)
    other = torch.tensor([[3.0, 0.0, 0.0, 0.0]]).expand(40_000, 4)
    uniforms = seeded_uniforms(40_000, "draws")
    p = (logits[0].double() / 0.5).softmax(-1)
    q = (other[0].double() / 0.5).softmax(-1)
    for share in (0.0, 0.3):
        want = (1 - share) * p + share * q
        options = SamplingOptions(1, sample_temperature=0.5)
        token, log_prob = draw([logits, other][: 2 if share else 1], uniforms, options, share)
        got = token.bincount(minlength=4) / len(token)
        torch.testing.assert_close(got.double(), want, atol=0.01, rtol=0)
        torch.testing.assert_close(log_prob.double(), want[token].log(), atol=1e-6, rtol=0)


def test_top_p_keeps_the_smallest_set_of_that_probability():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(5000, 4)
    uniforms = seeded_uniforms(5000, "top_p")
    for top_p, kept in ((0.4, [0]), (0.6, [0, 1]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        token, log_prob = draw([logits], uniforms, SamplingOptions(1, top_p=top_p))
        assert token.unique().tolist() == kept
        want = torch.tensor([0.5, 0.3, 0.15, 0.05])[kept]
        got = log_prob.exp()[token == 0]
        torch.testing.assert_close(got, (want[0] / want.sum()).expand_as(got))


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=9),
    st.sampled_from([0.0, 0.3, 0.999999]),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.1, 1.0, 3.0]),
)
@settings(deadline=None, max_examples=200)
def test_every_draw_is_possible_and_knows_its_probability(values, share, u, top_p, temperature):
    logits = torch.tensor([values])
    other = logits.flip(1)
    options = SamplingOptions(1, sample_temperature=temperature, top_p=top_p)
    token, log_prob = draw([logits, other], torch.tensor([u]), options, share)
    assert 0 <= int(token) < len(values)
    assert -1e4 < float(log_prob) <= 1e-6
    if temperature == 0 and share == 0:
        assert int(token) == values.index(max(values))


def test_mixture_reads_both_models():
    a, b = llama(), llama(seed=1, vocab_size=20)
    uniforms = numbers(3, 6)
    alone = sample(b, PROMPTS, uniforms, SamplingOptions(6))
    whole = sample(a, PROMPTS, uniforms, SamplingOptions(6), mixture=Mixture(a, 0.5))
    same = sample(a, PROMPTS, uniforms, SamplingOptions(6))
    assert torch.equal(whole.input_ids, same.input_ids)
    mixed = sample(a, PROMPTS, uniforms, SamplingOptions(6), mixture=Mixture(b, 0.999999))
    assert mixed.input_ids.max() < 16
    assert not torch.equal(mixed.input_ids, same.input_ids)
    assert alone.input_ids.shape == mixed.input_ids.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected at least 1"),
        ({"sample_temperature": -1.0}, "sample_temperature: got -1.0, expected at least 0"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected a probability in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:20],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**change)


def test_prompts_without_room_are_refused():
    with pytest.raises(
        ValueError,
        match="prompts: got 41 tokens in prompt number 1, expected at most 40: the model's",
    ):
        check_room([3, 41], 8, [llama()], "prompts")
    with pytest.raises(ValueError, match=r"prompts: got a prompt of no tokens \(number 0\)"):
        check_room([0], 8, [llama()], "prompts")

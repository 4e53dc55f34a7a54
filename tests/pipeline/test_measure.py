"""Parameters, quality and continuations of a model."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import AutoTokenizer

import llmkern
from llmkern import assets
from llmkern.pipeline import StageRecord
from llmkern.pipeline.measure import count_parameters, measure

VOCAB = 96


tiny = partial(tiny_models.tiny, num_hidden_layers=3, initializer_range=0.2)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (5, 16))


@pytest.mark.parametrize("tied", [False, True])
def test_packed_layers_count_as_weights(tokens: Tensor, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    dense = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == dense
    llmkern.quantize(model, "rtn", group_size=32)
    assert count_parameters(model) == dense
    model(input_ids=tokens)  # repacks
    assert count_parameters(model) == dense
    assert sum(p.numel() for p in model.parameters()) < dense


def test_fields_are_those_of_a_record(tokens: Tensor) -> None:
    original = tiny()
    model = copy.deepcopy(original)
    llmkern.quantize(model, "rtn", group_size=32)
    fields = measure(model, tokens, original, speed=False)
    assert fields.keys() <= {field.name for field in dataclasses.fields(StageRecord)}
    assert fields["generations"] == []
    expected = llmkern.evaluate(model, tokens, reference=original, speed=False).to_dict()
    assert fields["evaluation"] == expected
    assert fields["evaluation"]["kl"] > 0
    assert measure(model, tokens, speed=False)["evaluation"]["kl"] is None


def test_prompts_are_continued_greedily(tokens: Tensor) -> None:
    path = assets.bundled_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = llmkern.load(path, dtype=torch.float32)
    prompt = "def read_lines(path):\n"
    windows = torch.randint(3, 2000, (1, 8))
    (text,) = measure(model, windows, tokenizer=tokenizer, prompts=[prompt], speed=False)[
        "generations"
    ]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    wanted = []
    while len(wanted) < 64:
        with torch.no_grad():
            token = int(model(input_ids=ids).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        wanted.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert not text.startswith(prompt)


def test_prompts_need_a_tokenizer(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: got None, expected a tokenizer"):
        measure(tiny(), tokens, prompts=["x"], speed=False)

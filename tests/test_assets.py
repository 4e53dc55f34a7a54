"""The bundled model loads, fits its size budget and is as good as its record says."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmkern.assets import bundled_model_dir, calibration_text, evaluation_text
from llmkern.assets.corpus import documents, is_held_out, training_text


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model_dir())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(bundled_model_dir(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record():
    return json.loads((bundled_model_dir() / "training.json").read_text())


def test_everything_fits_in_eight_megabytes():
    assert sum(path.stat().st_size for path in bundled_model_dir().iterdir()) <= 8_000_000


def test_architecture_leaves_room_for_pruning(model, record):
    config = model.config
    assert config.model_type == "llama"
    assert config.hidden_size % 256 == 0
    assert config.intermediate_size % 256 == 0
    assert config.num_hidden_layers >= 4
    assert config.num_key_value_heads >= 2
    assert config.tie_word_embeddings
    assert model.num_parameters() == record["parameters"]


def test_tokenizer_matches_the_model(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, token) == getattr(model.config, token)


@pytest.mark.parametrize("path", [calibration_text(), evaluation_text()], ids=lambda p: p.stem)
def test_tokenizer_round_trips_the_texts(tokenizer, path):
    text = path.read_text(encoding="utf-8")
    ids = tokenizer(text, verbose=False).input_ids
    assert tokenizer.decode(ids) == text
    # Far below this, the vocabulary would not have been trained on this kind of text.
    assert len(text) / len(ids) > 2.5


def test_texts_do_not_overlap():
    lines = {line for line in calibration_text().read_text().splitlines() if len(line) > 60}
    held_out = [line for line in evaluation_text().read_text().splitlines() if len(line) > 60]
    assert sum(line in lines for line in held_out) < 0.02 * len(held_out)


@pytest.mark.slow
def test_held_out_perplexity_is_as_recorded(tokenizer, model, record):
    ids = tokenizer(evaluation_text().read_text(), return_tensors="pt", verbose=False).input_ids[0]
    context = model.config.max_position_embeddings
    windows = ids[: len(ids) // context * context].view(-1, context)[::4]
    with torch.no_grad():
        loss = torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in windows]).mean()
    # A quarter of the windows is not the whole text, hence the margin.
    assert math.exp(loss) < 1.15 * record["held_out_perplexity"]


def test_generates_python_deterministically(tokenizer, model):
    def continuations() -> str:
        texts = []
        for start in ("class Parser:\n    def __init__(self", "def read_", "import os\n"):
            prompt = tokenizer(start, return_tensors="pt")
            new = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0]
            texts.append(tokenizer.decode(new[prompt.input_ids.shape[1] :]))
        return "\n".join(texts)

    generated = continuations()
    assert generated == continuations()
    # Which of them greedy search meets depends on the weights; text that has none is not Python.
    assert sum(w in generated for w in ("def ", "return ", "import ", "self", "):\n    ")) >= 3


@pytest.mark.slow
def test_what_is_measured_on_is_not_in_the_training_text() -> None:
    held_out = [text for name, text in documents() if is_held_out(name)]
    learned = training_text()
    assert len(held_out) > 5
    assert len(learned) > 10 * sum(map(len, held_out))
    assert not [text for text in held_out if text in learned]


def test_the_split_goes_by_the_name_alone() -> None:
    # These names decided which excerpts were shipped; another split would leak them into training.
    shipped = evaluation_text().read_text()
    found = [name for name, text in documents() if len(text) > 400 and text[:400] in shipped]
    assert len(found) > 5
    assert all(is_held_out(name) for name in found)

"""One tokenizer, tables of embeddings of different size: what is beyond its tokens counts for nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny, words
from torch import nn

from llmkern.distill import distill
from llmkern.evaluate import evaluate
from llmkern.pipeline import Distill
from llmkern.pipeline.preflight import check

TOKENIZER = words()
V = 1 + max(TOKENIZER.get_vocab().values())
TOKENS = torch.randint(0, V, (6, 12), generator=torch.Generator().manual_seed(0))
PROMPTS = ("one two", "red sun sea")


def model(seed: int, size: int = V, **changes: Any) -> Any:
    return tiny(seed=seed, vocab_size=size, **changes)


def padded(plain: Any, size: int, garbage: float = 3.0) -> Any:
    """The same with more rows in its tables, which would win every softmax."""
    wide = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(9)
    for table in (wide.get_input_embeddings(), wide.get_output_embeddings()):
        more = torch.randn(size - V, table.weight.shape[1], generator=generator) * garbage
        table.weight = nn.Parameter(torch.cat([table.weight.data, more]))
    wide.config.vocab_size = wide.lm_head.out_features = wide.vocab_size = size
    wide.model.embed_tokens.num_embeddings = size
    return wide


TABLES = {
    "teacher": (V, V + 11),
    "student": (V + 7, V),
    "both": (V + 7, V + 11),
    "both_the_other_way": (V + 11, V + 7),
}
METHODS: dict[str, dict[str, Any]] = {
    "soft": {"data": TOKENS, "divergence": "forward_kl"},
    "soft reverse": {"data": TOKENS, "divergence": "reverse_kl"},
    "soft jsd": {"data": TOKENS, "divergence": "jsd"},
    "hidden": {"data": TOKENS},
    "gkd": {"data": TOKENS, "on_policy": 1.0, "prompt_len": 4, "max_new_tokens": 5},
    "minillm": {"data": TOKENS, "prompt_len": 4, "max_new_tokens": 5, "teacher_mix": 0.5},
    "sequence": {"prompts": PROMPTS, "max_new_tokens": 5},
    "in_context": {
        "prompts": PROMPTS,
        "max_new_tokens": 5,
        "alpha": 0.7,
        "template": "moon {prompt}",
    },
}


def losses(method: str, student: Any, teacher: Any) -> list[dict[str, float]]:
    options = METHODS[method] | {"steps": 2, "batch_size": 2, "lr": 1e-3, "weight_decay": 0.0}
    report = distill(student, teacher, method.split()[0], tokenizer=TOKENIZER, **options)
    return [step.metrics for step in report.training.steps]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The losses of each method with tables of the tokenizer's size, and the student's head."""
    found = {}
    for method in METHODS:
        student = model(1, num_hidden_layers=1)
        found[method] = losses(method, student, model(0)), student.lm_head.weight.detach().clone()
    return found


@pytest.mark.parametrize(
    ("tables", "method"),
    # Of answers as text alone, a student's own padding is a part of what it learns not to say.
    [(t, m) for t in TABLES for m in METHODS if m != "sequence" or t == "teacher"],
)
def test_distillation_is_that_of_tables_without_padding(
    tables: str, method: str, plain: dict[str, Any]
) -> None:
    mine, theirs = TABLES[tables]
    student, teacher = model(1, num_hidden_layers=1), model(0)
    student = padded(student, mine) if mine > V else student
    teacher = padded(teacher, theirs) if theirs > V else teacher
    got, (want, head) = losses(method, student, teacher), plain[method]
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(student.lm_head.weight[:V], head, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tables", TABLES)
def test_the_evaluation_against_a_reference(tables: str) -> None:
    mine, theirs = TABLES[tables]
    want = evaluate(model(1), TOKENS, TOKENIZER, reference=model(0), speed=False)
    got = evaluate(
        padded(model(1), mine) if mine > V else model(1),
        TOKENS,
        TOKENIZER,
        reference=padded(model(0), theirs) if theirs > V else model(0),
        reference_tokenizer=copy.deepcopy(TOKENIZER),
        speed=False,
    )
    assert got.kl == pytest.approx(want.kl, rel=1e-4)
    assert got.top1_agreement == want.top1_agreement


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no_tokenizer": ({}, "student: got a vocabulary of .* \\(if the larger is only padded"),
    "token_of_the_padding": (
        {"tokenizer": TOKENIZER, "data": TOKENS + V},
        f"data: got token .*, expected tokens below {V}, those of the tokenizer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    changes, message = REFUSED[name]
    student = padded(model(1), 2 * V)
    with pytest.raises(ValueError, match=message):
        distill(student, model(0), **{"data": TOKENS, "steps": 1, **changes})


def test_a_table_that_does_not_hold_the_tokenizer_is_no_padded_one() -> None:
    small = model(1, V - 2)
    with pytest.raises(ValueError, match=f"or both at least the {V} tokens"):
        distill(small, model(0), data=TOKENS.clamp(max=3), tokenizer=TOKENIZER, steps=1)
    with pytest.raises(ValueError, match="reference: got a vocabulary of"):
        evaluate(model(0), TOKENS.clamp(max=3), TOKENIZER, reference=small, speed=False)
    with pytest.raises(ValueError, match="reference: got a vocabulary of"):
        evaluate(model(0), TOKENS, reference=padded(model(0), V + 1), speed=False)


def test_other_tokenizers_are_refused_by_name() -> None:
    table = dict(TOKENIZER.get_vocab())
    first, second = list(table)[-2:]

    class Swapped:
        def get_vocab(self) -> dict[str, int]:
            return table | {first: table[second], second: table[first]}

    with pytest.raises(ValueError, match="tokenizer: got another vocabulary than the teacher's"):
        distill(model(1), model(0), data=TOKENS, tokenizer=TOKENIZER, teacher_tokenizer=Swapped())
    with pytest.raises(ValueError, match="reference_tokenizer: got another vocabulary than"):
        evaluate(
            model(1),
            TOKENS,
            TOKENIZER,
            reference=model(0),
            reference_tokenizer=Swapped(),
            speed=False,
        )


def test_a_padded_student_passes_the_preflight_of_a_pipeline(tmp_path: Path) -> None:
    padded(model(1), V + 7).save_pretrained(tmp_path / "student")
    stage = Distill("soft", student=str(tmp_path / "student"), steps=1)
    assert check(model(0), [stage], calibration=TOKENS).errors
    TOKENIZER.save_pretrained(tmp_path / "student")
    found = check(model(0), [stage], calibration=TOKENS)
    assert not found.errors, found.errors

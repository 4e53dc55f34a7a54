"""In context: what the teacher reads, what the student learns of it without."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tiny_models import WORDS, llama, words

from llmkern.distill import InContextOptions, _answers, distill
from llmkern.distill._plan import DistillJob
from llmkern.distill.in_context import _Context, plan_in_context
from llmkern.reference.kd_loss import kd_loss as plain
from llmkern.train import TrainOptions

# The tokenizer of whole words needs spaces between them.
FORM = "{prompt} {answer}\n\n"
EXAMPLES = [("one", "red"), ("two", "green"), ("three", "blue"), ("sun", "moon")]


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in EXAMPLES) + "\n")
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    texts = [("five", "sea star"), ("four two", "moon"), ("sun", "red five blue")]
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in texts) + "\n")
    return path


def job(**changes) -> DistillJob:
    fields = {
        "student": llama(seed=3),
        "teacher": llama().eval(),
        "tokenizer": words(),
        "teacher_tokenizer": None,
        "data": None,
        "seq_len": None,
        "samples": 0,
        "training": TrainOptions(),
        "progress": False,
    }
    return DistillJob(**fields | changes)


def test_context_is_examples_then_the_prompt_in_its_template(examples):
    form = {"demonstration": "Q: {prompt} A: {answer}\n", "template": "Q: {prompt} A: think"}
    options = InContextOptions(prompts=("x",), demonstrations=examples, shots=2, **form)
    seen = set()
    for seed in range(20):
        context = _Context(options, seed)
        assert context.separator == "\n"
        text = context.around("sun {answer}")
        assert text == _Context(options, seed).around("sun {answer}")
        *shown, asked = text.split("\n")
        assert asked == "Q: sun {answer} A: think"
        assert len(shown) == len(set(shown)) == 2
        seen.update(shown)
        assert "Q: sun A: moon" not in context.around("sun")
    assert seen == {f"Q: {p} A: {a}" for p, a in EXAMPLES}
    bare = InContextOptions(prompts=("x",), template="{prompt} one")
    assert _Context(bare, 0).around("sun") == "sun one"
    assert _Context(bare, 0).separator is None


def test_teacher_answers_in_context_and_the_student_reads_the_bare_prompt(
    examples, tmp_path, monkeypatch
):
    asked = []
    real = _answers.sample

    def spy(teacher, prompts, *others):
        asked.extend(words().decode(prompt) for prompt in prompts)
        return real(teacher, prompts, *others)

    monkeypatch.setattr(_answers, "sample", spy)
    options = {
        "prompts": ("five", "sea sun"),
        "demonstrations": examples,
        "shots": 3,
        "demonstration": FORM,
        "template": "{prompt} star",
        "max_new_tokens": 4,
        "answers": tmp_path / "answers.jsonl",
    }
    tokenizer = words()
    report = distill(
        llama(seed=3), llama(), "in_context", tokenizer=tokenizer, steps=2, batch_size=2, **options
    )
    assert [text.split()[6:] for text in asked] == [["five", "star"], ["sea", "sun", "star"]]
    assert all(" ".join(text.split()[:2]) in {f"{p} {a}" for p, a in EXAMPLES} for text in asked)
    entries = [json.loads(line) for line in options["answers"].read_text().splitlines()]
    assert entries[0]["stop"] == "\n\n"
    assert [entry["prompt"] for entry in entries[1:]] == ["five", "sea sun"]
    assert report.window <= 2 + 4 + 1
    # Another context is another question.
    changed = options | {"template": "{prompt} moon"}
    with pytest.raises(ValueError, match="was made with prompts = "):
        distill(llama(seed=3), llama(), "in_context", tokenizer=tokenizer, steps=2, **changed)


@pytest.mark.parametrize("pattern", [None, r"^\w+ (.*)"], ids=["all", "answer_only"])
def test_logits_of_the_teacher_in_context_meet_the_students_without(examples, pairs, pattern):
    task = job()
    form = {"demonstrations": examples, "shots": 2, "template": "{prompt} star "}
    form |= {"demonstration": FORM}
    loss = {"alpha": 0.4, "temperature": 1.5, "divergence": "jsd", "beta": 0.3}
    options = InContextOptions(answers=pairs, answer_pattern=pattern, **form, **loss)
    plan = plan_in_context(task, options)
    got = plan.module(plan.prepare(plan.data, None), 5.0)
    mine, theirs, labels = [], [], []
    context = _Context(options, 0)
    for line in pairs.read_text().splitlines():
        entry = json.loads(line)
        reasons, _, answer = ("", "", entry["answer"])
        if pattern is not None:
            reasons, _, answer = entry["answer"].partition(" ")
            if not answer:
                continue
        after = [*words()(answer)["input_ids"], 1]
        for text, net, found in (
            (entry["prompt"], task.student, mine),
            (context.around(entry["prompt"]) + reasons, task.teacher, theirs),
        ):
            ids = torch.tensor([[*words()(text)["input_ids"], *after]])
            found.append(net(ids).logits[0, -len(after) - 1 : -1])
        labels.append(torch.tensor(after))
    kind = {"alpha": 0.4, "temperature": 1.5, "divergence": "jsd", "beta": 0.3}
    wanted = torch.cat(labels)
    want, ce, kd = plain(torch.cat(mine), torch.cat(theirs).detach(), wanted, **kind)
    share = len(wanted) / 5.0
    torch.testing.assert_close(got["loss"], want * share)
    torch.testing.assert_close(got["ce"], ce.detach() * share)
    torch.testing.assert_close(got["kd"], kd.detach() * share)


def test_student_takes_over_what_the_context_does(examples, tmp_path):
    """Without the context the teacher is far from itself with it; the student comes near."""
    teacher, student = llama(initializer_range=0.2), llama(seed=3, initializer_range=0.2)
    prompts = tuple(" ".join(pair) for pair in itertools.pairwise(WORDS))
    options = {"prompts": prompts, "demonstrations": examples, "shots": 2, "alpha": 1.0}
    options |= {"demonstration": FORM}
    training = {"steps": 60, "batch_size": 8, "lr": 0.01, "max_new_tokens": 4}
    report = distill(
        student,
        teacher,
        "in_context",
        tokenizer=words(),
        answers_per_prompt=2,
        **options,
        **training,
    )
    kd = [step.metrics["kd"] for step in report.training.steps]
    assert sum(kd[-5:]) < 0.3 * sum(kd[:5])


def test_answers_are_cut_alike_for_both(examples, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "red", "answer": "sun " * 60}) + "\n")
    options = InContextOptions(
        answers=path, demonstrations=examples, shots=4, alpha=1.0, demonstration=FORM
    )
    plan = plan_in_context(job(), options)
    mine, theirs = (plan.data[name] for name in ("labels", "teacher_labels"))
    assert theirs.shape[1] == 48
    assert torch.equal(mine[mine != -100], theirs[theirs != -100])
    assert len(plan.notes) == 1
    short = plan_in_context(job(seq_len=10), options).data
    assert short["labels"].shape[1] == 10
    assert torch.equal(*(short[n][short[n] != -100] for n in ("labels", "teacher_labels")))
    path.write_text(json.dumps({"prompt": "red " * 45, "answer": "sun"}) + "\n")
    with pytest.raises(ValueError, match="prompts in their context: got 53 tokens"):
        plan_in_context(job(), options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"demonstrations": None}, "demonstrations, template: got neither, expected one of them"),
        ({"template": "think"}, "template: got 'think', expected a text with one {prompt}"),
        (
            {"demonstration": "{prompt}"},
            "demonstration: got '{prompt}', expected a text with one {ans",
        ),
        ({"shots": 0}, "shots: got 0, expected at least 1"),
        ({"shots": 5}, "shots: got 5, expected at most 4, the demonstrations that are not"),
        ({"prompts": ("sun",), "shots": 4}, "shots: got 4, expected at most 3"),
        (
            {"demonstrations": "no.jsonl"},
            "demonstrations: got 'no.jsonl', expected an existing file",
        ),
        ({"prompts": None, "answers": "x"}, "prompts: got None with alpha = 0, expected prompts"),
        ({"alpha": 2.0}, "alpha: got 2.0, expected a weight"),
        (
            {"prompts": ("red " * 42,)},
            "prompts: got 48 tokens in prompt number 0, expected at most 44",
        ),
        (
            {"alpha": 0.5, "teacher_tokenizer": words(*WORDS[::-1])},
            "tokenizer: got another vocabulary than the teacher's",
        ),
        ({"on_policy": 0.5}, "on_policy: not an option of method 'in_context'"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:30],
)
def test_bad_input_is_named_and_nothing_is_trained(arguments, message, examples):
    student = llama(seed=3)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    given = {"prompts": ("red",), "demonstrations": examples, "shots": 3, "tokenizer": words()}
    given |= {"demonstration": FORM} | arguments
    if given["prompts"] is not None:
        given |= {"max_new_tokens": 4}
    with pytest.raises(ValueError, match=message):
        distill(student, llama(), "in_context", steps=1, **given)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_conversations_cannot_be_put_into_a_context(examples, tmp_path):
    path = tmp_path / "turns.jsonl"
    turns = [{"role": r, "content": "red"} for r in ("system", "user", "assistant")]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(ValueError, match="demonstrations: got a conversation of 2 turns"):
        distill(
            llama(), llama(), "in_context", tokenizer=words(), prompts=("red",), demonstrations=path
        )

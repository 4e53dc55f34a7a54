"""Sequence level: a teacher's answers on disk, rows of which only the answers are predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import WORDS, llama, words
from two_processes import run_in_two_processes

from llmkern.distill import _answers, distill
from llmkern.distill._rows import pad_rows, pair_tokens, prompt_tokens, trim
from llmkern.distill._texts import Pair

PROMPTS = ("red", "green blue", "one two three", "sun", "moon sea", "five four", "star red")
TRAINING = {"steps": 3, "batch_size": 2, "lr": 0.01}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def ask(path, **changes):
    options = {"prompts": PROMPTS, "max_new_tokens": 6, "answer_batch": 3, "answers_per_prompt": 2}
    return distill(
        llama(seed=3, hidden_size=16),
        llama(seed=changes.pop("teacher", 0)),
        "sequence",
        tokenizer=words(),
        answers=path,
        **TRAINING | options | changes,
    )


def losses(report) -> list[float]:
    return [step.metrics["loss"] for step in report.training.steps]


@pytest.mark.slow
def test_answers_are_kept_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    whole = tmp_path / "whole.jsonl"
    report = ask(whole)
    lines = whole.read_text().splitlines()
    assert len(lines) == 1 + 14
    assert json.loads(lines[0])["teacher"].startswith("LlamaForCausalLM ")
    assert report.windows <= 14

    killed = tmp_path / "killed.jsonl"
    calls = []
    real = _answers.sample

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(_answers, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        ask(killed)
    assert killed.read_text().splitlines() == lines[:7]
    # The process may die in the middle of a line, too.
    killed.write_text("\n".join(lines[:6]) + "\n" + lines[6][:20])
    calls[:] = [1] * 10
    again = ask(killed)
    assert len(calls) == 10 + 4
    assert killed.read_text() == whole.read_text()
    assert losses(again) == losses(report)
    # Complete: the teacher is not asked again, nor needed.
    assert losses(ask(killed)) == losses(report)
    assert len(calls) == 14
    alone = distill(
        llama(seed=3, hidden_size=16),
        None,
        "sequence",
        tokenizer=words(),
        answers=killed,
        **TRAINING,
    )
    assert losses(alone) == losses(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": 5}, "was made with teacher = 'LlamaForCausalLM .* this run has"),
        ({"prompts": PROMPTS[1:]}, "was made with answers = 14, this run has 12"),
        ({"prompts": PROMPTS[::-1]}, "was made with prompts = "),
        ({"sample_temperature": 0.5}, "was made with sample_temperature = 1.0, this run has 0.5"),
        ({"top_p": 0.5}, "was made with top_p = 1.0, this run has 0.5"),
        ({"seed": 1}, "was made with seed = 0, this run has 1"),
        ({"stop": "sun"}, "was made with stop = None, this run has 'sun'"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_answers_of_another_run_are_refused(change, message, tmp_path):
    path = tmp_path / "answers.jsonl"
    ask(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        ask(path, **change)
    assert path.read_bytes() == before


def test_files_of_others_are_not_written_to(tmp_path):
    path = tmp_path / "api.jsonl"
    path.write_text('{"prompt": "red", "answer": "blue"}\n')
    with pytest.raises(ValueError, match=r"api.jsonl, which llmkern did not write, with prompts"):
        ask(path)
    half = tmp_path / "half.jsonl"
    ask(half)
    half.write_text("\n".join(half.read_text().splitlines()[:4]) + "\n")
    with pytest.raises(ValueError, match=r"answers: got 3 of 14 answers in .*half.jsonl"):
        distill(llama(), None, "sequence", tokenizer=words(), answers=half, **TRAINING)


def test_a_student_with_another_tokenizer_learns_the_answers(tmp_path):
    path = tmp_path / "api.jsonl"
    pairs = [("red", "sun moon"), ("green", "star"), ("blue", "sea sea sea")]
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": a}) for p, a in pairs) + "\n")
    tokenizer = words(*WORDS[::-1])
    student = llama(seed=3)
    report = distill(
        student,
        None,
        "sequence",
        tokenizer=tokenizer,
        answers=path,
        steps=60,
        batch_size=3,
        lr=0.01,
    )
    assert losses(report)[-1] < 0.05
    for prompt, answer in pairs:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = student.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=2
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer
    assert report.windows == 3


def test_loss_is_that_of_the_answers_alone_whatever_the_padding(tmp_path):
    path = tmp_path / "api.jsonl"
    path.write_text(
        '{"prompt": "red", "answer": "sun moon star"}\n{"prompt": "one two three", "answer": "sea"}\n'
    )
    student = llama(seed=3)
    total, count = 0.0, 0
    for prompt, answer in (("red", "sun moon star </s>"), ("one two three", "sea </s>")):
        ids = torch.tensor([words()(f"{prompt} {answer}")["input_ids"]])
        start = len(prompt.split())
        logits = student.eval()(ids).logits[0, start - 1 : -1]
        ce = torch.nn.functional.cross_entropy(logits.detach(), ids[0, start:], reduction="sum")
        total += float(ce)
        count += ids.shape[1] - start
    options = {"tokenizer": words(), "answers": path, "steps": 1}
    got = distill(llama(seed=3), None, "sequence", batch_size=2, **options)
    assert losses(got)[0] == pytest.approx(total / count, rel=1e-5)
    parts = distill(llama(seed=3), None, "sequence", batch_size=1, accumulate=2, **options)
    assert losses(parts)[0] == pytest.approx(total / count, rel=1e-5)


SCRIPT = """
import json
from pathlib import Path
import test_sequence as t
print("LOSSES", json.dumps(t.losses(t.ask(Path({path!r}), batch_size=1))), flush=True)
"""


@pytest.mark.slow
def test_of_two_processes_the_main_one_asks_the_teacher(tmp_path):
    path = tmp_path / "answers.jsonl"
    folder = str(Path(__file__).parent)
    script = f"sys.path.insert(0, {folder!r})\n" + SCRIPT.format(path=str(path))
    outputs = run_in_two_processes(script, tmp_path)
    assert len(path.read_text().splitlines()) == 1 + 14
    one = ask(tmp_path / "again.jsonl", batch_size=2)
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()
    for out in outputs:
        line = next(line for line in out.splitlines() if line.startswith("LOSSES"))
        assert json.loads(line.removeprefix("LOSSES")) == pytest.approx(losses(one), rel=1e-4)


def test_chat_template_is_applied_where_there_is_one():
    tokenizer = words(*WORDS, "user", "assistant", template=TEMPLATE)
    assert (
        tokenizer.decode(prompt_tokens(tokenizer, "red", True)) == "<s> user red </s> <s> assistant"
    )
    assert tokenizer.decode(prompt_tokens(tokenizer, "red", False)) == "red"
    _, answer = pair_tokens(tokenizer, Pair("red", "blue"), True)
    assert tokenizer.decode(answer) == "blue </s>"
    _, answer = pair_tokens(tokenizer, Pair("red", "blue", finished=False), True)
    assert tokenizer.decode(answer) == "blue"
    turns = [{"role": "system", "content": "one"}, {"role": "user", "content": "red"}]
    before, _ = pair_tokens(tokenizer, Pair(turns, "blue"), True)
    assert tokenizer.decode(before).startswith("<s> system one".replace("system", "<unk>"))
    with pytest.raises(ValueError, match="got a conversation of 2 turns before an answer"):
        pair_tokens(words(), Pair(turns, "blue"), True)


def test_rows_are_padded_and_trimmed():
    rows = pad_rows([([5, 6], [7]), ([5], [6, 7, 8, 9])], pad=2)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 2, 2], [5, 6, 7, 8, 9]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert rows["labels"].tolist() == [[-100, -100, 7, -100, -100], [-100, 6, 7, 8, 9]]
    cut = trim({name: tensor[:1] for name, tensor in rows.items()})
    assert cut["input_ids"].tolist() == [[5, 6, 7]]
    assert cut["labels"].tolist() == [[-100, -100, 7]]


def test_patterns_take_the_answer_without_its_reasons(tmp_path):
    path = tmp_path / "api.jsonl"
    texts = ["one two #### sun", "no mark", "#### one #### moon sea"]
    path.write_text("\n".join(json.dumps({"prompt": "red", "answer": t}) for t in texts) + "\n")
    student = llama(seed=3, vocab_size=20)
    options = {"tokenizer": words(), "answers": path, "answer_pattern": r"####([^#]*)$", "steps": 1}
    report = distill(student, None, "sequence", **options)
    assert report.windows == 2
    assert report.window == 1 + 2 + 1
    assert report.notes == ["1 of 3 answers do not match answer_pattern"]
    with pytest.raises(ValueError, match="answers: got 3, of which 0 are empty and 3 do not match"):
        distill(student, None, "sequence", **options | {"answer_pattern": "@"})


def test_long_answers_are_cut_to_the_window(tmp_path):
    path = tmp_path / "api.jsonl"
    path.write_text(json.dumps({"prompt": "red", "answer": "sun " * 20}) + "\n")
    options = {"tokenizer": words(), "answers": path, "steps": 1}
    report = distill(llama(), None, "sequence", seq_len=8, **options)
    assert report.window == 8
    assert report.notes == ["1 of 1 answers were cut to rows of 8 tokens"]
    path.write_text(json.dumps({"prompt": "red " * 9, "answer": "sun"}) + "\n")
    with pytest.raises(
        ValueError, match="prompts: got 9 tokens in prompt number 0, expected 1 to 7"
    ):
        distill(llama(), None, "sequence", seq_len=8, **options)
    with pytest.raises(
        ValueError, match="seq_len: got 99, expected 2 to the model's context of 48"
    ):
        distill(llama(), None, "sequence", seq_len=99, **options)


def test_stop_ends_an_answer(tmp_path):
    path = tmp_path / "answers.jsonl"
    ask(path, answers_per_prompt=1)
    free = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    word = next(entry["answer"].split()[1] for entry in free if len(entry["answer"].split()) > 2)
    stopped = tmp_path / "stopped.jsonl"
    ask(stopped, answers_per_prompt=1, stop=word)
    short = [json.loads(line) for line in stopped.read_text().splitlines()[1:]]
    for a, b in zip(free, short, strict=True):
        assert b["answer"] == a["answer"].split(word)[0]
        assert b["finished"] or word not in a["answer"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompts, answers: got neither, expected one of them or both"),
        ({"prompts": PROMPTS, "teacher": None}, "teacher: got None with prompts"),
        ({"prompts": (), "teacher": 1}, "prompts: got no prompt in"),
        ({"answers": "x", "top_p": 0.5}, "top_p: got 0.5 without prompts, expected prompts"),
        ({"answers": "x"}, "answers: got 'x', expected an existing file"),
        ({"answers": "/", "prompts": PROMPTS}, "answers: got /, a directory, expected a file"),
        ({"prompts": PROMPTS, "data": "x y"}, "data: not an option of method 'sequence'"),
        ({"prompts": PROMPTS, "samples": 5}, "samples: not an option of method 'sequence'"),
        ({"prompts": PROMPTS, "tokenizer": None}, "tokenizer: got None, expected the student's"),
        (
            {"prompts": PROMPTS, "chat_template": True},
            "chat_template: got True, expected a tokenizer",
        ),
        (
            {"prompts": PROMPTS, "answer_pattern": "("},
            r"answer_pattern: got '\(', expected a regular",
        ),
        ({"prompts": PROMPTS, "answer_batch": 0}, "answer_batch: got 0, expected at least 1"),
        (
            {"prompts": ("red " * 40,)},
            "prompts: got 40 tokens in prompt number 0, expected at most 38",
        ),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:30],
)
def test_bad_input_is_named_and_nothing_is_trained(arguments, message):
    given = {"tokenizer": words(), "steps": 1, "teacher": 0} | arguments
    if "prompts" in given:
        given |= {"max_new_tokens": 10}
    teacher = given.pop("teacher")
    student = llama(seed=3)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        distill(student, None if teacher is None else llama(), "sequence", **given)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_a_tokenizer_beyond_the_students_vocabulary_is_refused(tmp_path):
    path = tmp_path / "api.jsonl"
    path.write_text('{"prompt": "red", "answer": "sea"}\n')
    with pytest.raises(
        ValueError, match="tokenizer: got token 15, expected tokens below the student's"
    ):
        distill(llama(vocab_size=10), None, "sequence", tokenizer=words(), answers=path)

"""GKD: the right rows, the right loss on them, training that helps and goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import WORDS, llama, words
from two_processes import run_in_two_processes

import llmkern
from llmkern.distill import GkdOptions, distill
from llmkern.distill._plan import DistillJob
from llmkern.distill.gkd import plan_gkd
from llmkern.reference.kd_loss import kd_loss as plain
from llmkern.train import Place, TrainOptions, _loop

SAMPLING = {"prompt_len": 3, "max_new_tokens": 6}
TRAINING = {"steps": 6, "batch_size": 2, "lr": 0.01}


def tokens(rows: int = 10, length: int = 12) -> torch.Tensor:
    return torch.randint(2, 16, (rows, length), generator=torch.Generator().manual_seed(0))


def job(**changes) -> DistillJob:
    fields = {
        "student": llama(seed=3),
        "teacher": llama().eval(),
        "tokenizer": None,
        "teacher_tokenizer": None,
        "data": tokens(),
        "seq_len": None,
        "samples": 100,
        "training": TrainOptions(),
        "progress": False,
    }
    return DistillJob(**fields | changes)


def train(method: str = "gkd", **changes):
    options = {"data": tokens(), **SAMPLING, **TRAINING} | changes
    student = llama(seed=3)
    return student, distill(student, llama(), method, **options)


def losses(report) -> list[float]:
    return [step.metrics["loss"] for step in report.training.steps]


def test_loss_is_kd_loss_on_the_tokens_that_the_student_drew():
    task = job()
    options = GkdOptions(on_policy=1.0, temperature=1.5, beta=0.3, **SAMPLING)
    plan = plan_gkd(task, options)
    batch = {"input_ids": plan.data["input_ids"][:4]}
    rows = plan.prepare(batch, Place(0, 0, 0))
    assert torch.equal(rows["input_ids"][:, :3], batch["input_ids"][:, :3])
    drawn = rows["labels"][:, 1:] != -100
    assert drawn[:, 2:].any(1).all()
    assert not drawn[:, :2].any()
    got = plan.module(rows, 7.0)
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    mine = task.student(**inputs).logits[:, :-1][drawn]
    with torch.no_grad():
        theirs = task.teacher(**inputs).logits[:, :-1][drawn]
    want, _, _ = plain(mine, theirs, None, alpha=1.0, temperature=1.5, divergence="jsd", beta=0.3)
    torch.testing.assert_close(got["loss"], want * (int(drawn.sum()) / 7.0))


def test_a_fraction_of_the_steps_is_on_policy():
    plan = plan_gkd(job(), GkdOptions(on_policy=0.3, **SAMPLING))
    batch = {"input_ids": plan.data["input_ids"][:1]}
    kinds = ["labels" in plan.prepare(batch, Place(step, 0, step)) for step in range(200)]
    assert 40 < sum(kinds) < 80
    for share, kind in ((0.0, False), (1.0, True)):
        plan = plan_gkd(job(), GkdOptions(on_policy=share, **SAMPLING))
        rows = [plan.prepare(batch, Place(step, 0, step)) for step in range(5)]
        assert all(("labels" in row) == kind for row in rows)


def test_other_positions_draw_other_rows_by_the_weights_of_the_moment():
    task = job()
    plan = plan_gkd(task, GkdOptions(on_policy=1.0, **SAMPLING))
    batch = {"input_ids": plan.data["input_ids"][:1].repeat(4, 1)}
    first = plan.prepare(batch, Place(0, 0, 0))["input_ids"]
    assert len(first.unique(dim=0)) > 1
    again = plan.prepare(batch, Place(0, 0, 0))["input_ids"]
    assert torch.equal(first, again)
    shifted = plan.prepare(batch, Place(0, 0, 2))["input_ids"]
    length = min(first.shape[1], shifted.shape[1])
    assert torch.equal(first[2:, :length], shifted[:2, :length])
    with torch.no_grad():
        for weight in task.student.parameters():
            weight.copy_(torch.randn_like(weight))
    assert not torch.equal(plan.prepare(batch, Place(0, 0, 0))["input_ids"], first)


@pytest.mark.parametrize("on_policy", [0.5, 1.0])
def test_student_comes_closer_to_its_teacher_on_its_own_samples(on_policy):
    options = {"on_policy": on_policy, "divergence": "reverse_kl", **SAMPLING}
    training = {"steps": 40, "batch_size": 8, "lr": 0.003}
    teacher, student = (llama(seed, initializer_range=0.1) for seed in (0, 3))
    report = distill(student, teacher, "gkd", data=tokens(), **options, **training)
    kd = [step.metrics["kd"] for step in report.training.steps]
    assert sum(kd[-5:]) < 0.5 * sum(kd[:5])


def test_accumulation_is_the_larger_batch():
    _, whole = train(batch_size=4)
    _, parts = train(accumulate=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gkd", "minillm"])
def test_mixed_precision_and_a_packed_teacher_come_close_to_float32(method):
    def run(precision: str):
        teacher = llama(intermediate_size=64)
        llmkern.patch(teacher, llmkern.QuantFormat(4, 32))
        options = {"data": tokens(), **SAMPLING, **TRAINING, "steps": 1}
        options |= {"top_p": 0.9, "on_policy": 1.0} if method == "gkd" else {}
        student = llama(seed=3, initializer_range=0.1)
        return distill(student, teacher, method, mixed_precision=precision, **options)

    # The same rows are drawn but where two tokens are as good as equally likely.
    assert losses(run("bf16")) == pytest.approx(losses(run("no")), rel=0.2)


class Killed(Exception):
    pass


def kill_in_step(monkeypatch, number: int) -> None:
    real = _loop._Run.step

    def step(self, step, batches, report):
        if step == number:
            raise Killed
        return real(self, step, batches, report)

    monkeypatch.setattr(_loop._Run, "step", step)


@pytest.mark.parametrize(
    ("method", "options", "saved"),
    [
        ("gkd", {"on_policy": 0.5, "checkpoint_every": 2}, 2),
        ("minillm", {"checkpoint_every": 1}, 3),
        # The samples of two steps are drawn at once: nothing is written between them.
        ("minillm", {"refresh": 2, "checkpoint_every": 1}, 2),
    ],
    ids=["gkd", "minillm", "minillm_refresh"],
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    method, options, saved, tmp_path, monkeypatch
):
    one, whole = train(method, **options | {"checkpoint_every": 0})
    options |= {"checkpoint": tmp_path, "resume": True}
    with monkeypatch.context() as patched:
        kill_in_step(patched, 3)
        with pytest.raises(Killed):
            train(method, **options)
    kept = json.loads((tmp_path / "newest" / "state.json").read_text())
    assert len(kept["steps"]) == saved
    two, report = train(method, **options)
    assert losses(report) == losses(whole)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    train(checkpoint=tmp_path)
    with pytest.raises(
        ValueError, match=r"top_p: the checkpoint was made with 1\.0, this run has 0\.9"
    ):
        train(checkpoint=tmp_path, resume=True, top_p=0.9)


SCRIPT = """
import json
import test_gkd as t
student, report = t.train("minillm", steps=4)
print("LOSSES", json.dumps(t.losses(report)), flush=True)
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    folder = json.dumps(__file__.rpartition("/")[0])
    script = f"sys.path.insert(0, {folder})\n" + SCRIPT
    _, one = train("minillm", steps=4, batch_size=4)
    for out in run_in_two_processes(script, tmp_path):
        line = next(line for line in out.splitlines() if line.startswith("LOSSES"))
        assert json.loads(line.removeprefix("LOSSES")) == pytest.approx(losses(one), rel=1e-3)


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_prompts_come_from_a_file(suffix, tmp_path):
    path = tmp_path / f"prompts.{suffix}"
    texts = ["red green", "sun", "moon star sea"]
    lines = texts if suffix == "txt" else [json.dumps({"prompt": text}) for text in texts]
    path.write_text("\n".join(lines) + "\n")
    task = job(data=None, tokenizer=words())
    plan = plan_gkd(task, GkdOptions(on_policy=1.0, prompts=path, max_new_tokens=4))
    assert len(plan.data["input_ids"]) == 3
    batch = {"input_ids": plan.data["input_ids"]}
    rows = plan.prepare(batch, Place(0, 0, 0))
    prompts = {
        words().decode(ids[: int((labels == -100).int().argmin())])
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)
    }
    assert prompts == set(texts)
    student = llama(seed=3)
    options = {"prompts": texts, "max_new_tokens": 4, **TRAINING}
    report = distill(student, llama(), "gkd", tokenizer=words(), data=tokens(), **options)
    assert report.windows == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_policy": 1.5}, r"on_policy: got 1.5, expected a fraction in \[0, 1\]"),
        ({"alpha": 0.5}, "alpha: not an option of method 'gkd'"),
        ({"divergence": "tv"}, "divergence: got 'tv', expected one of"),
        ({"prompt_len": 0}, "prompt_len: got 0, expected at least 1"),
        ({"prompt_len": 13}, "prompt_len: got 13, expected at most the window of 12"),
        ({"prompt_len": 40, "max_new_tokens": 9}, "prompt_len: got 40 tokens in prompt number 0"),
        ({"prompts": ("a",)}, "prompt_len: got 3 with prompts, expected one of them"),
        ({"prompts": ("a",), "prompt_len": None}, "tokenizer: got None, expected a tokenizer"),
        ({"prompts": (), "prompt_len": None, "tokenizer": words()}, "prompts: got no prompt in"),
        (
            {"prompts": ("red",), "prompt_len": None, "tokenizer": words(), "on_policy": 1.0},
            "data: got it with prompts, and no weight of the data",
        ),
        ({"chat_template": True}, "chat_template: got True without prompts"),
        (
            {"chat_template": True, "prompts": ("a",), "prompt_len": None, "tokenizer": words()},
            "chat_template: got True, expected a tokenizer that has",
        ),
        ({"teacher": None}, "teacher: got None, expected a model"),
        (
            {"tokenizer": words(), "teacher_tokenizer": words(*WORDS[::-1])},
            "tokenizer: got another vocabulary than the teacher's",
        ),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:30],
)
def test_bad_input_is_named_and_nothing_is_trained(arguments, message):
    student = llama(seed=3)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    given = {"data": tokens(), "teacher": llama(), **SAMPLING, "steps": 1} | arguments
    with pytest.raises(ValueError, match=message):
        distill(student, given.pop("teacher"), "gkd", **given)
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


def test_a_sharded_student_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotImplementedError, match="method: got one that samples from the student"):
        train()

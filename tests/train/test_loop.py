"""The training loop: same numbers after a resumption, on several processes, with any accumulation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from two_processes import run_in_two_processes

from llmkern.train import Lion, Place, TrainOptions, fit


class Model(nn.Module):
    """Next-token prediction by two matrices, with dropout so that random numbers matter."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Parameter(torch.randn(11, 6, generator=generator))
        self.head = nn.Parameter(torch.randn(11, 6, generator=generator))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.drop = nn.Dropout(drop)

    def forward(self, batch: dict[str, Tensor], num_items: float) -> dict[str, Tensor]:
        tokens = batch["input_ids"]
        labels = batch.get("labels", tokens)[:, 1:]
        logits = self.drop(self.embed[tokens[:, :-1]]) @ self.head.t()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": loss / num_items}


def data(rows: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, 11, (rows, 7), generator=generator)}


OPTIONS = TrainOptions(steps=8, lr=0.05, batch_size=2, warmup=0.25, weight_decay=0.1)


def losses(report) -> list[float]:
    return [entry.metrics["loss"] for entry in report.steps]


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_loss_falls_and_frozen_weights_stay(optimizer):
    model = Model()
    options = dataclasses.replace(OPTIONS, steps=60, optimizer=optimizer, lr=0.05)
    report = fit(model, data(2), options)
    assert sum(losses(report)[-5:]) < 0.7 * sum(losses(report)[:5])
    assert torch.equal(model.frozen, torch.ones(3))
    assert report.tokens == 60 * 2 * 7
    assert report.steps[0].lr < report.steps[15].lr == 0.05
    assert report.steps[-1].lr < 0.001


def test_same_seed_same_bits_and_another_seed_another_order():
    runs = [fit(Model(), data(), dataclasses.replace(OPTIONS, seed=s)) for s in (0, 0, 1)]
    assert losses(runs[0]) == losses(runs[1]) != losses(runs[2])


def test_accumulation_is_the_larger_batch():
    whole = fit(Model(), data(), dataclasses.replace(OPTIONS, batch_size=4))
    parts = fit(Model(), data(), dataclasses.replace(OPTIONS, accumulate=2))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_uneven_labels_weigh_by_prediction_over_accumulation():
    rows = data()
    rows["labels"] = rows["input_ids"].clone()
    rows["labels"][::2, 2:] = -100
    whole = fit(Model(), rows, dataclasses.replace(OPTIONS, batch_size=4))
    parts = fit(Model(), rows, dataclasses.replace(OPTIONS, accumulate=2))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("optimizer", "stop"), [("adamw", 3), ("lion", 5), ("adamw", 6)])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(optimizer, stop, tmp_path):
    options = dataclasses.replace(
        OPTIONS, optimizer=optimizer, checkpoint=tmp_path, checkpoint_every=2, resume=True
    )
    whole_model = Model(drop=0.5)
    whole = fit(whole_model, data(), dataclasses.replace(OPTIONS, optimizer=optimizer))
    steps = iter(range(stop))

    def kill() -> None:
        if next(steps) + 1 == stop:
            raise Killed

    with pytest.raises(Killed):
        fit(Model(drop=0.5), data(), options, after_step=kill)
    model = Model(drop=0.5)
    report = fit(model, data(), options)
    assert losses(report) == losses(whole)
    assert torch.equal(model.head, whole_model.head)
    # Done: a further run has nothing left to do.
    assert losses(fit(Model(drop=0.5), data(), options)) == losses(whole)


def test_kill_between_renames_leaves_the_state_before(tmp_path):
    options = dataclasses.replace(OPTIONS, checkpoint=tmp_path, resume=True)
    whole = fit(Model(), data(), options)
    (tmp_path / "newest").rename(tmp_path / "before")
    assert losses(fit(Model(), data(), options)) == losses(whole)


def test_kill_before_the_state_before_is_deleted_leaves_a_run_that_goes_on(tmp_path):
    options = dataclasses.replace(OPTIONS, checkpoint=tmp_path, checkpoint_every=1, resume=True)
    whole = fit(Model(), data(), dataclasses.replace(options, checkpoint=tmp_path / "other"))

    def kill() -> None:
        if (tmp_path / "newest").exists():
            raise Killed

    with pytest.raises(Killed):
        fit(Model(), data(), options, after_step=kill)
    shutil.copytree(tmp_path / "newest", tmp_path / "before")
    assert losses(fit(Model(), data(), options)) == losses(whole)
    assert not (tmp_path / "before").exists()


def test_resuming_with_other_settings_is_refused(tmp_path):
    options = dataclasses.replace(OPTIONS, checkpoint=tmp_path, resume=True)
    fit(Model(), data(), options)
    with pytest.raises(
        ValueError, match=r"lr: the checkpoint was made with 0\.05, this run has 0\.1"
    ):
        fit(Model(), data(), dataclasses.replace(options, lr=0.1))
    with pytest.raises(ValueError, match="rows: the checkpoint was made with 10, this run has 4"):
        fit(Model(), data(4), options)
    other = Model()
    other.embed = nn.Parameter(torch.zeros(12, 6))
    with pytest.raises(ValueError, match=r"embed: got \[11, 6\], expected \[12, 6\]"):
        fit(other, data(), options)


def test_nan_stops_and_keeps_the_last_checkpoint(tmp_path):
    options = dataclasses.replace(OPTIONS, checkpoint=tmp_path, checkpoint_every=1)
    model = Model()
    count = iter(range(100))

    def spoil() -> None:
        if next(count) == 3:
            model.head.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="loss: got nan in step 5"):
        fit(model, data(), options, after_step=spoil)
    state = json.loads((tmp_path / "newest" / "state.json").read_text())
    assert [entry["step"] for entry in state["steps"]] == [1, 2, 3, 4]


def test_fp16_and_bf16_run_the_forward_in_that_dtype():
    seen = []

    class Watched(Model):
        def forward(self, batch, num_items):
            seen.append((self.embed[batch["input_ids"]] @ self.head.t()).dtype)
            return super().forward(batch, num_items)

    fit(Watched(), data(), dataclasses.replace(OPTIONS, steps=1, mixed_precision="bf16"))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("stop", [2, 4])
def test_gradient_scaler_is_part_of_the_state(stop, tmp_path, monkeypatch):
    """On a CPU accelerate makes no scaler, so one is put in: it skips steps until its scale fits."""
    import accelerate

    class Scaled(accelerate.Accelerator):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)
            scalers.append(self.scaler)

    class Steep(Model):
        def forward(self, batch, num_items):
            return {"loss": 64 * super().forward(batch, num_items)["loss"]}

    scalers: list[torch.amp.GradScaler] = []
    monkeypatch.setattr(accelerate, "Accelerator", Scaled)
    options = dataclasses.replace(OPTIONS, clip=None)
    whole = fit(Steep(), data(), options)
    options = dataclasses.replace(options, checkpoint=tmp_path, checkpoint_every=1, resume=True)
    steps = iter(range(stop))

    def kill() -> None:
        if next(steps) + 1 == stop:
            raise Killed

    with pytest.raises(Killed):
        fit(Steep(), data(), options, after_step=kill)
    assert losses(fit(Steep(), data(), options)) == losses(whole)
    assert scalers[-1].state_dict() == scalers[0].state_dict()
    assert 2.0**110 < scalers[0].get_scale() < 2.0**126


def test_rows_can_be_replaced_by_their_place_in_the_run():
    def noise(batch, place):
        seen.append(place)
        shift = torch.arange(place.first, place.first + len(batch["input_ids"]))
        return {"input_ids": (batch["input_ids"] + shift[:, None]) % 11}

    seen: list[Place] = []
    whole = fit(Model(), data(), dataclasses.replace(OPTIONS, batch_size=4), prepare=noise)
    assert [place.first for place in seen] == [4 * i for i in range(8)]
    seen.clear()
    parts = fit(Model(), data(), dataclasses.replace(OPTIONS, accumulate=2), prepare=noise)
    assert [(place.step, place.micro, place.first) for place in seen[:3]] == [
        (0, 0, 0),
        (0, 1, 2),
        (1, 0, 4),
    ]
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(whole) != losses(fit(Model(), data(), dataclasses.replace(OPTIONS, batch_size=4)))


def test_settings_of_the_caller_must_be_those_of_the_checkpoint(tmp_path):
    options = dataclasses.replace(OPTIONS, checkpoint=tmp_path, resume=True)
    fit(Model(), data(), options, settings={"alpha": 0.5, "layers": ("1:2",)})
    fit(Model(), data(), options, settings={"alpha": 0.5, "layers": ("1:2",)})
    with pytest.raises(
        ValueError, match=r"alpha: the checkpoint was made with 0\.5, this run has 1"
    ):
        fit(Model(), data(), options, settings={"alpha": 1, "layers": ("1:2",)})


def test_lion_follows_its_formula():
    torch.manual_seed(0)
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    want, m = w.detach().clone(), torch.zeros_like(w)
    optimizer = Lion([w], lr=0.1, betas=(0.8, 0.95), weight_decay=0.3)
    for _ in range(5):
        g = torch.randn(4, 3, dtype=torch.float64)
        w.grad = g.clone()
        optimizer.step()
        want = want - 0.1 * ((0.8 * m + 0.2 * g).sign() + 0.3 * want)
        m = 0.95 * m + 0.05 * g
        torch.testing.assert_close(w.detach(), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"lr": 0.0}, "lr: got 0.0, expected a positive number"),
        ({"warmup": 1.0}, r"warmup: got 1.0, expected a fraction in \[0, 1\)"),
        ({"optimizer": "sgd"}, "optimizer: got 'sgd', expected one of"),
        ({"mixed_precision": "fp8"}, "mixed_precision: got 'fp8', expected one of"),
        ({"clip": 0.0}, "clip: got 0.0, expected a positive number or None"),
        ({"checkpoint_every": 5}, "checkpoint: got None with checkpoint_every or resume"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:20],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**change)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="got no window"):
        fit(Model(), data(0), OPTIONS)
    with pytest.raises(ValueError, match="got no parameter that requires gradients"):
        fit(Model().requires_grad_(False), data(), OPTIONS)


SCRIPT = """
sys.path.insert(0, {here!r})
import dataclasses, json
import test_loop as t
report = t.fit(t.Model(), t.data(), dataclasses.replace(t.OPTIONS, batch_size=2))
print("LOSSES", json.dumps(t.losses(report)), flush=True)
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    outputs = run_in_two_processes(SCRIPT.format(here=str(Path(__file__).parent)), tmp_path)
    one = losses(fit(Model(), data(), dataclasses.replace(OPTIONS, batch_size=4)))
    for out in outputs:
        line = next(line for line in out.splitlines() if line.startswith("LOSSES"))
        assert json.loads(line.removeprefix("LOSSES")) == pytest.approx(one, rel=1e-4)

"""The training loop: accelerate around a module that returns its own loss.

One process or many (`accelerate launch`), any device, mixed precision, accumulation, clipping, warm-up
and cosine. What is trained is any module whose forward takes a batch and returns a dict with "loss";
which windows a step sees follows from the seed and its number alone, so that a run that was
interrupted goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._dtypes import overflow_hint
from llmkern._json import numbers, to_json
from llmkern._progress import Bar
from llmkern.train._checkpoint import Checkpoint
from llmkern.train._options import TrainOptions
from llmkern.train.lion import Lion

# What a resumed run must have in common with the one before.
_SETTINGS = (
    "steps",
    "lr",
    "batch_size",
    "accumulate",
    "warmup",
    "weight_decay",
    "optimizer",
    "clip",
    "mixed_precision",
    "seed",
)


@dataclass(frozen=True)
class Step:
    """One update of the weights: its number from 1, learning rate, and the means that were minimised."""

    step: int
    lr: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Place:
    """Where in the training a forward is.

    Attributes:
        step: from 0.
        micro: its number among the forwards of this process in the step.
        first: position of its first row in the endless order of rows, over all processes: the next
            rows follow. A random choice that is seeded by positions does not depend on how a step is
            divided into forwards and processes.
    """

    step: int
    micro: int
    first: int


# What replaces the rows of a forward: for instance by tokens that the student has sampled.
Prepare = Callable[[dict[str, Tensor], Place], dict[str, Tensor]]
# What the rows of a forward add to sums that each forward of the step needs whole.
Sums = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class TrainReport:
    """What `fit` did.

    Attributes:
        options: as used, ready for JSON.
        steps: one entry per update, those before a resumption included.
        tokens: that were fed in by this run, over all processes.
        seconds: of this run.
    """

    options: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def fit(
    module: nn.Module,
    data: Mapping[str, Tensor],
    options: TrainOptions,
    *,
    progress: bool = False,
    prepare: Prepare | None = None,
    sums: Sums | None = None,
    after_step: Callable[[], None] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainReport:
    """Train the parameters of `module` that require gradients, in place.

    Args:
        module: its forward takes a batch (a dict with rows of `data`) and `num_items`, the number of
            predictions that count in the whole step over the number of processes, and returns a dict
            of scalars; "loss", their sum over num_items, is minimised, the others are recorded.
        data: tensors with one row per window; "labels" (int64, -100 where nothing is predicted), if
            there, say which predictions count, otherwise all but each window's first token do.
        options: see `TrainOptions`.
        progress: say on standard error how far it is, with the loss.
        prepare: gets the rows of each forward, on the device, and its place, and returns what the
            forward takes, "input_ids" among it. Called before a step's first forward, in the precision
            of the training.
        sums: gets what each forward of a step takes, before the first, and returns a tensor; the total,
            over the number of processes, is the entry "sums" of what each forward takes. Not called
            where a step is one forward of one process.
        after_step: called after each update, for instance to put pruned zeros back.
        settings: ready for JSON; a checkpoint of a run with other settings is refused as one with
            other options is.

    Returns:
        The report; the module is on its own device again.

    Raises:
        ValueError: nothing to train or no data; a checkpoint of other settings or another model.
        FloatingPointError: the loss became NaN or infinite; the last checkpoint is left alone.
        NotImplementedError: checkpoints of a model that is sharded over processes (FSDP).
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, set_seed

    options.check_places()
    rows = len(next(iter(data.values()), ()))
    trained = [p for p in module.parameters() if p.requires_grad]
    if not rows or not trained:
        what = "no window" if not rows else "no parameter that requires gradients"
        raise ValueError(f"data, module: got {what}, expected some to train on")
    on_cpu = trained[0].device.type == "cpu"
    # An earlier run in this process may have had another precision; the process group stays.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=on_cpu)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if options.checkpoint is not None and sharded:
        raise NotImplementedError("checkpoint: got a path under FSDP, expected None there")
    set_seed(options.seed)
    run = _Run(accelerator, module, options, rows, settings or {})
    report = TrainReport(_describe(options))
    first = run.restore(report)
    started = time.perf_counter()
    with _Log(options, accelerator.is_main_process, progress, first) as log:
        for step in range(first, options.steps):
            batches = run.add_sums(run.batches(step, data, prepare), sums)
            entry = run.step(step, batches, report)
            report.steps.append(entry)
            if after_step is not None:
                after_step()
            log.write(entry)
            every = options.checkpoint_every
            if (every and (step + 1) % every == 0) or step + 1 == options.steps:
                run.save(step + 1, report)
    report.seconds = time.perf_counter() - started
    run.close()
    return report


def _describe(options: TrainOptions) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
    }


class _Run:
    """The prepared module, its optimizer and schedule."""

    def __init__(
        self,
        accelerator: Any,
        module: nn.Module,
        options: TrainOptions,
        rows: int,
        settings: Mapping[str, Any],
    ) -> None:
        self._accelerator, self._options = accelerator, options
        self._module = module
        self._training = module.training
        module.train()
        optimizer = _optimizer(module, options)
        self._model, self._optimizer = accelerator.prepare(module, optimizer)
        self._order = Order(rows, options.seed)
        self._store = None if options.checkpoint is None else Checkpoint(Path(options.checkpoint))
        self._settings = {name: getattr(options, name) for name in _SETTINGS}
        self._settings |= {"rows": rows, "processes": accelerator.num_processes}
        # As JSON gives them back, so that they can be compared.
        self._settings |= numbers(json.loads(to_json(dict(settings))))

    def restore(self, report: TrainReport) -> int:
        """Number of steps that a checkpoint has already done."""
        if self._store is None or not self._options.resume:
            return 0
        state = self._store.load(self._module, self._optimizer.optimizer, self._settings)
        if state is None:
            return 0
        if self._accelerator.scaler is not None and state.get("scaler"):
            self._accelerator.scaler.load_state_dict(state["scaler"])
        report.steps = [Step(**entry) for entry in state["steps"]]
        return len(report.steps)

    def save(self, step: int, report: TrainReport) -> None:
        if self._store is not None and self._accelerator.is_main_process:
            steps = [dataclasses.asdict(entry) for entry in report.steps]
            state = {"settings": self._settings, "steps": steps}
            if self._accelerator.scaler is not None:
                state["scaler"] = self._accelerator.scaler.state_dict()
            self._store.save(self._module, self._optimizer.optimizer, state)
        self._accelerator.wait_for_everyone()

    def batches(
        self, step: int, data: Mapping[str, Tensor], prepare: Prepare | None
    ) -> list[dict[str, Tensor]]:
        """What this process's forwards of a step take."""
        accelerator, size = self._accelerator, self._options.batch_size
        found = []
        for micro in range(self._options.accumulate):
            forward = (step * self._options.accumulate + micro) * accelerator.num_processes
            first = (forward + accelerator.process_index) * size
            rows = torch.tensor([self._order.row(first + i) for i in range(size)])
            batch = {name: tensor[rows].to(accelerator.device) for name, tensor in data.items()}
            if prepare is not None:
                with accelerator.autocast():
                    batch = prepare(batch, Place(step, micro, first))
            found.append(batch)
        return found

    def add_sums(
        self, batches: list[dict[str, Tensor]], sums: Sums | None
    ) -> list[dict[str, Tensor]]:
        """The same with sums over the whole step, where a forward does not know them itself."""
        accelerator = self._accelerator
        if sums is None or len(batches) * accelerator.num_processes == 1:
            return batches
        with torch.no_grad(), accelerator.autocast():
            total = torch.stack([sums(batch) for batch in batches]).sum(0)
        total = accelerator.reduce(total, "sum") / accelerator.num_processes
        return [batch | {"sums": total} for batch in batches]

    def step(self, step: int, batches: list[dict[str, Tensor]], report: TrainReport) -> Step:
        options, accelerator = self._options, self._accelerator
        lr = options.lr * _schedule(step, options)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        counts = torch.stack([_predictions(batch) for batch in batches]).sum()
        total = accelerator.reduce(counts.to(accelerator.device), "sum")
        num_items = max(float(total) / accelerator.num_processes, 1.0)
        sums: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            last = micro + 1 == len(batches)
            with nullcontext() if last else accelerator.no_sync(self._model):
                losses = self._model(batch, num_items)
                accelerator.backward(losses["loss"])
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float()
            report.tokens += batch["input_ids"].numel() * accelerator.num_processes
        metrics = {name: float(accelerator.reduce(value, "mean")) for name, value in sums.items()}
        if not math.isfinite(metrics["loss"]):
            hint = overflow_hint(torch.float16) if options.mixed_precision == "fp16" else ""
            kept = (
                "" if self._store is None else f"; the last checkpoint is in {options.checkpoint}"
            )
            raise FloatingPointError(
                f"loss: got {metrics['loss']} in step {step + 1}, expected a finite number{hint}{kept}"
            )
        if options.clip is not None:
            accelerator.clip_grad_norm_(self._model.parameters(), options.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return Step(step + 1, lr, metrics)

    def close(self) -> None:
        """Leave the module as it was but for its weights."""
        self._accelerator.unwrap_model(self._model).train(self._training)
        self._optimizer.zero_grad()
        self._accelerator.free_memory()


class Order:
    """Endless sequence of rows: each pass over the data in another order, by the seed."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def row(self, position: int) -> int:
        """The row at a position of the sequence."""
        epoch, place = divmod(position, self._rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch = epoch
            self._permutation = torch.randperm(self._rows, generator=generator)
        return int(self._permutation[place])


def _predictions(batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch.get("labels", batch["input_ids"])
    return (labels[:, 1:] != -100).sum()


def _schedule(step: int, options: TrainOptions) -> float:
    """Share of lr in a step: up to 1 in the warm-up, then a cosine to 0."""
    warm = round(options.warmup * options.steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(options.steps - warm, 1)))


def _optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """Weight decay on matrices only, as is usual: norms and biases have their own scale."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "lion":
        return Lion(groups, lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))


class _Log:
    """Progress bar and TensorBoard, on the main process only."""

    def __init__(self, options: TrainOptions, main: bool, progress: bool, first: int) -> None:
        self._writer: Any = None
        if options.log_dir is not None and main:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(options.log_dir))
        self._bar = Bar("train", options.steps, "step", shown=progress and main, initial=first)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, entry: Step) -> None:
        self._bar.update(loss=f"{entry.metrics['loss']:.4f}")
        if self._writer is not None:
            for name, value in {**entry.metrics, "lr": entry.lr}.items():
                self._writer.add_scalar(name, value, entry.step)

"""A short training after pruning: all weights of the blocks, or LoRA, on the calibration windows.

Weights that an earlier pruning made zero stay zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmkern.calibrate.gradients import next_token_loss, only_trained
from llmkern.drive import Journal, Shapes, Tokens
from llmkern.drive.shapes import F32
from llmkern.masks import MaskedParameters, pruned_layers
from llmkern.models import block_linears, evaluation_mode, find_blocks, float32_parameters
from llmkern.models.linears import is_conv1d
from llmkern.prune._method import PruneJob
from llmkern.prune._options import RecoveryOptions
from llmkern.train import TrainOptions, fit

_WARMUP = 0.1
_CHECKPOINTS = 10  # of a training, where a journal is kept
_RATES = {"lora": 1e-4, "full": 1e-5}


def recover_job(job: PruneJob) -> None:
    """`recover` what a method has pruned, where its options ask for it."""
    if job.options.recovery != "none":
        job.report.recovery_loss = recover(
            job.model,
            job.windows(),
            job.options,
            batch_size=job.data.batch_size,
            seed=job.data.seed,
            journal=job.journal,
        )


def recover(
    model: nn.Module,
    windows: Tensor,
    options: RecoveryOptions,
    *,
    batch_size: int = 8,
    seed: int = 0,
    journal: Journal | None = None,
) -> list[float]:
    """Train `model` on next-token prediction, in place, by `llmkern.train.fit`.

    Trained are the dense linears of the decoder blocks, whole or through LoRA matrices that are merged
    at the end. Weights of 16 bits are held in 32 while they are trained whole.

    Args:
        model: a causal language model.
        windows: int64 [n, seq_len].
        options: "lora" or "full", and how long.
        batch_size: windows per step.
        seed: of the order of the windows and of LoRA's start.
        journal: keeps the state of training, from which a run that resumes goes on.

    Returns:
        The training loss of each step, in nats per token.

    Raises:
        ValueError: LoRA without peft, or a loss that became NaN.
    """
    names = {
        f"{prefix}.{name}": linear
        for prefix, block in find_blocks(model).items()
        for name, linear in block_linears(block).items()
    }
    pruned = {name: model.get_parameter(f"{name}.weight") for name in pruned_layers(model)}
    masks = MaskedParameters(pruned)
    settings = TrainOptions(
        steps=options.recovery_steps,
        lr=options.recovery_lr or _RATES[options.recovery],
        batch_size=batch_size,
        warmup=_WARMUP,
        seed=seed,
        checkpoint=journal.training() if journal else None,
        checkpoint_every=-(-options.recovery_steps // _CHECKPOINTS) if journal else 0,
        resume=journal is not None,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # LoRA's matrices are drawn before the loop sets it
    try:
        train = _lora if options.recovery == "lora" else _full
        with evaluation_mode(model), train(model, names, options.recovery_rank):
            report = fit(_NextToken(model), {"input_ids": windows}, settings)
    except FloatingPointError as error:
        raise ValueError(f"recovery_lr: got {settings.lr}: {error}") from error
    finally:
        masks.apply()  # merging fills the zeros
        masks.remove()
        torch.random.set_rng_state(state)
    return [step.metrics["loss"] for step in report.steps]


class _NextToken(nn.Module):
    """A language model as `llmkern.train.fit` takes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> _NextToken:
        """Always evaluation mode: dropout would only disturb so short a training."""
        super().train(False)
        return self

    def forward(self, batch: dict[str, Tensor], num_items: float) -> dict[str, Tensor]:
        tokens = batch["input_ids"]
        predictions = tokens.shape[0] * (tokens.shape[1] - 1)
        return {"loss": next_token_loss(self.model, tokens) * (predictions / num_items)}


def recovery_nbytes(options: RecoveryOptions, after: Shapes, batch: int, tokens: Tokens) -> int:
    """Bytes at the peak of the training, weights included; 0 where there is none.

    Args:
        options: of the method.
        after: the pruned model.
        batch: windows per step.
        tokens: of the calibration.
    """
    if options.recovery == "none":
        return 0
    held = sum(p.numel() for p in after.model.parameters())
    passing = tokens.backward(after, batch)
    if options.recovery == "lora":
        return after.weights() + passing
    return held * F32 + 3 * _inside(after) * F32 + passing  # gradient and two moments


def recovery_journal(options: RecoveryOptions, after: Shapes) -> int:
    """Bytes on the disk of the training's newest state and the one being written."""
    return 2 * 3 * F32 * _inside(after) if options.recovery == "full" else 0


def _inside(after: Shapes) -> int:
    return sum(p.numel() for p in find_blocks(after.model).modules.parameters())


@contextmanager
def _full(model: nn.Module, linears: dict[str, nn.Module], rank: int) -> Iterator[None]:
    trained = [p for linear in linears.values() for p in linear.parameters()]
    # A step is far smaller than what 8 bits of mantissa can tell apart.
    with float32_parameters(model), only_trained(model, trained):
        yield


@contextmanager
def _lora(model: nn.Module, linears: dict[str, nn.Module], rank: int) -> Iterator[None]:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(
            "recovery: got 'lora' without the package peft, expected it: pip install llmkern[recovery]"
        ) from error
    settings = [(p, p.requires_grad) for p in model.parameters()]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(linears),
        fan_in_fan_out=all(is_conv1d(linear) for linear in linears.values()),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    try:
        yield
    finally:
        adapted.merge_and_unload()
        for parameter, setting in settings:
            parameter.requires_grad_(setting)

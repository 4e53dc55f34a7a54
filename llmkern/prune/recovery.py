"""A short training after pruning: all weights of the blocks, or LoRA, on the calibration windows.

Weights that an earlier pruning made zero stay zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern._journal import Journal
from llmkern.masks import MaskedParameters, pruned_layers
from llmkern.models import block_linears, evaluation_mode, find_blocks
from llmkern.models.linears import is_conv1d
from llmkern.prune._options import RecoveryOptions
from llmkern.train import TrainOptions, fit

_WARMUP = 0.1
_CHECKPOINTS = 10  # of a training, where a journal is kept
_RATES = {"lora": 1e-4, "full": 1e-5}


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


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each token given those before it, in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@contextmanager
def only_trained(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for `trained` alone; each parameter's own setting afterwards."""
    settings = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in settings:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, setting in settings:
            parameter.requires_grad_(setting)
            parameter.grad = None


@contextmanager
def _full(model: nn.Module, linears: dict[str, nn.Module], rank: int) -> Iterator[None]:
    trained = [p for linear in linears.values() for p in linear.parameters()]
    dtypes = [(p, p.dtype) for p in model.parameters()]
    # A step is far smaller than what 8 bits of mantissa can tell apart. Buffers keep their types: those
    # of rotary embeddings are of 32 bits for a reason.
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    try:
        with only_trained(model, trained):
            yield
    finally:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)


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

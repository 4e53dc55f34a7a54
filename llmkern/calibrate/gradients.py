"""The gradient of a language model's loss with respect to some of its weights, over windows of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmkern.models import compute_dtype, computing_in, evaluation_mode


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each token given those before it, in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@contextmanager
def only_trained(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
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


def loss_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    windows: Tensor,
    *,
    squares: bool,
    compute: str = "auto",
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Mean of the gradient over windows, and of its square: the Fisher information's diagonal.

    Args:
        model: a causal language model; its own modes and settings are restored.
        parameters: whose gradients are wanted, each once.
        windows: int64 [n, seq_len], one backward pass each.
        squares: take the mean squares, too.
        compute: dtype that the model is run in, see `llmkern.models.compute_dtype`.

    Returns:
        By `id` of the parameter, float32 of its shape: the means, and the mean squares or nothing.
    """
    total = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters}
    fisher = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters if squares}
    dtype = compute_dtype(model, compute)
    with (
        computing_in(model, dtype),
        only_trained(model, parameters),
        evaluation_mode(model),
        torch.enable_grad(),
    ):
        for window in windows:
            loss = next_token_loss(model, window[None].to(parameters[0].device))
            torch.autograd.backward(loss)
            for p in parameters:
                if p.grad is not None:
                    total[id(p)] += p.grad / len(windows)
                    if squares:
                        fisher[id(p)] += p.grad.float().square() / len(windows)
                    p.grad = None
    return total, fisher

"""Which decoder block's change cost what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._progress import Bar
from llmkern.calibrate.flow import find_flow
from llmkern.evaluate import next_token_logits, score_logits
from llmkern.models import (
    DecoderBlocks,
    computing_in,
    evaluation_mode,
    find_blocks,
    text_config,
    whole_dtypes,
)
from llmkern.models.calls import forward_replaced, same_values, split_call

_PROBE_TOKENS = 8


def sensitivity(
    before: nn.Module,
    after: nn.Module,
    windows: Tensor,
    *,
    batch_size: int = 4,
    progress: bool = False,
) -> dict[str, float]:
    """What each decoder block's change costs alone.

    Args:
        before: the model before a stage; its blocks are swapped one at a time, and put back.
        after: what the stage made of it; read only. Its blocks may be narrower inside, or packed.
        windows: int64 [n, seq_len], tokens to measure on.
        batch_size: windows per forward.
        progress: say on standard error how far it is.

    Returns:
        Full name of each block -> mean KL(before || before with that block of `after`), in nats per
        token; empty where blocks do not correspond: another number of them or another hidden size.
    """
    blocks, changed = find_blocks(before), find_blocks(after)
    sizes = [getattr(text_config(model), "hidden_size", None) for model in (before, after)]
    if len(blocks) != len(changed) or sizes[0] != sizes[1]:
        return {}
    costs = dict.fromkeys((name for name, _ in blocks.items()), 0.0)
    predicted = len(windows) * (windows.shape[1] - 1)
    dtypes = whole_dtypes([before, after])
    batches = torch.split(windows, batch_size)
    with (
        torch.no_grad(),
        evaluation_mode(before),
        evaluation_mode(after),
        computing_in(before, dtypes[0]),
        computing_in(after, dtypes[1]),
        Bar("cost of each block", len(batches) * len(blocks), "block", shown=progress) as bar,
    ):
        resumes = _resumes(before, blocks, windows[:1, :_PROBE_TOKENS])
        for batch in batches:
            want = next_token_logits(before, batch)
            logits = _swapped(before, list(blocks.modules), list(changed.modules), batch, resumes)
            for name, got in zip(costs, logits, strict=True):
                costs[name] += float(score_logits(got, batch, want)[1]) / predicted
                bar.update()
    return costs


def _swapped(
    model: nn.Module, own: list[nn.Module], others: list[nn.Module], batch: Tensor, resumes: bool
) -> Iterator[Tensor]:
    """The model's logits with each of its blocks replaced alone, one after the other.

    Where the model `resumes`, the blocks before the one replaced hand on what was made before, and do not
    run again.
    """
    made: Any = None
    for index, (block, other) in enumerate(zip(own, others, strict=True)):
        calls: list[Callable[[], Any]] = []
        with (
            _handing_on(own[:index] if resumes else (), made),
            forward_replaced(block, _noted(other, block, calls)),
        ):
            yield next_token_logits(model, batch)
        if resumes:
            made = calls[-1]()


def _noted(
    other: nn.Module, block: nn.Module, calls: list[Callable[[], Any]]
) -> Callable[..., Any]:
    """A forward that runs `other`, and notes how to run `block` on the same."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = split_call(args, kwargs)[1]
        kept = x.clone()  # blocks may add to it in place

        def again() -> Any:
            x.copy_(kept)
            return block(*args, **kwargs)

        calls.append(again)
        return other(*args, **kwargs)

    return forward


@contextmanager
def _handing_on(blocks: Iterable[nn.Module], made: Any) -> Iterator[None]:
    """Let each of these blocks return `made`."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_replaced(block, lambda *args, **kwargs: made))
        yield


def _resumes(model: nn.Module, blocks: DecoderBlocks, few: Tensor) -> bool:
    """Whether what a block returns is all that later blocks and the head see of it and those before."""
    try:
        flow = find_flow(model, blocks, few, keep=False)
    except ValueError:
        return False
    with _handing_on(blocks.modules, flow.outputs[-1]):
        got = next_token_logits(model, few)
    return not flow.changed and same_values(got, next_token_logits(model, few))

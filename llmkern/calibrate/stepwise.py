"""A block whose linears are changed one group after the other, run once all the same.

Where each linear is to see what the changed ones before it make of its input, a block could be run anew
up to every group of linears. Here each batch's forward is a coroutine that waits before a group until it
has been changed: nothing is computed twice, and the hidden states that leave the block come with it.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import psutil
import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn

from llmkern.calibrate.statistics import Statistic
from llmkern.calibrate.walker import Block
from llmkern.models.calls import forward_replaced
from llmkern.models.linears import shape_of

_S = TypeVar("_S", bound=Statistic)


def in_turn(
    block: Block, groups: Sequence[tuple[str, ...]], make: Callable[[tuple[str, ...]], _S]
) -> Generator[tuple[tuple[str, ...], _S], None, None]:
    """Each group with a statistic of its inputs, as the groups before it, changed meanwhile, make them.

    To be closed, if it is not exhausted. Where linears are called more than once, or memory is short, the
    block is run anew for each group.

    Args:
        block: whose linears are changed.
        groups: names of linears that read one tensor, as `Block.groups` returns them.
        make: called with a group, returns its empty statistic.
    """
    done = 0
    if fits(block, groups):
        with Stepwise(block, groups) as steps, suppress(Astray):
            for group in groups:
                statistic = make(group)
                for x in steps.inputs():
                    statistic.update(x)
                done += 1
                yield group, statistic
            if not block.last:
                steps.finish()
    for group in groups[done:]:
        yield group, block.collect([group], make)[0]


class Astray(Exception):
    """A batch did not call the groups in the order of the first one."""


def fits(block: Block, groups: Sequence[tuple[str, ...]]) -> bool:
    """Whether a block can be run once: linears that are called once, and memory for what waits."""
    if not groups or not block.calls_each_once(groups):
        return False
    return _held(block, groups) <= room(block.states.hidden.device)


def room(device: torch.device) -> int:
    """Bytes that waiting forwards may hold: a quarter of what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return int(psutil.virtual_memory().available) // 4


def held_per_token(width: int, K: int) -> int:
    """Elements of a token that a waiting forward holds: the residual stream, attention's, the input."""
    return 5 * width + K


def _held(block: Block, groups: Sequence[tuple[str, ...]]) -> int:
    hidden = block.states.hidden
    widest = max(shape_of(block.module.get_submodule(group[0]))[1] for group in groups)
    tokens = hidden.numel() // hidden.shape[-1]
    return tokens * held_per_token(hidden.shape[-1], widest) * hidden.element_size()


class Stepwise:
    """The forwards of a block on all batches, each held before the first group not yet changed.

    Used as a context manager; what is left of the forwards is dropped at its end.
    """

    def __init__(self, block: Block, groups: Sequence[tuple[str, ...]]) -> None:
        """Start nothing yet.

        Args:
            block: whose linears are each called once per forward.
            groups: names of its linears that read one tensor, in the order of their calls.
        """
        self._block, self._groups = block, groups
        self._done = 0  # groups that have been passed
        self._stack = ExitStack()
        self._passes = [self._make(batch) for batch in range(block.states.batches())]

    def __enter__(self) -> Stepwise:
        for index, group in enumerate(self._groups):
            for name in group:
                linear = self._block.module.get_submodule(name)
                replaced = self._hold(index, name, linear, linear.forward)
                self._stack.enter_context(forward_replaced(linear, replaced))
        return self

    def __exit__(self, *exc: object) -> None:
        for each in filter(None, self._passes):  # those that wait
            each.throw(GreenletExit)
        self._stack.close()

    def inputs(self) -> Iterator[Tensor]:
        """What the next group reads, batch by batch; the groups before it have been changed.

        Raises:
            Astray: see there.
        """
        with self._block.states.computing(self._block.module):
            for each in self._passes:
                x = self._go_on(each)
                if x is None:
                    raise Astray
                yield x
        self._done += 1

    def finish(self) -> None:
        """Run all batches to their end: what leaves the block replaces the hidden states before it."""
        with self._block.states.computing(self._block.module):
            for each in self._passes:
                self._go_on(each)

    def _make(self, batch: int) -> greenlet:
        def run() -> None:
            self._block.states.leave(self._block.index, self._block.module, batch)

        each = greenlet(run)
        each.gr_context = contextvars.copy_context()
        return each

    def _go_on(self, each: greenlet) -> Tensor | None:
        """Let a batch run to the next group, whose input is returned, or to its end."""
        self._controller = greenlet.getcurrent()
        each.parent = self._controller
        waits = each.switch()
        if waits is None:
            return None
        index: int
        x: Tensor
        index, x = waits
        if index != self._done:
            raise Astray
        return x

    def _hold(
        self, index: int, name: str, linear: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def held(*args: Any, **kwargs: Any) -> Any:
            if index >= self._done:
                x = args[0] if args else next(iter(kwargs.values()))
                self._controller.switch((index, x))
            # It may have been replaced while it waited, inside its own hooks.
            now = self._block.module.get_submodule(name)
            return forward(*args, **kwargs) if now is linear else now.forward(*args, **kwargs)

        return held

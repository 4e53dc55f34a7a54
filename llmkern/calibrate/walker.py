"""Walk a model one decoder block at a time, each fed with the output of the compressed ones before it.

    hidden = embed(tokens)
    for block in blocks:
        on_block(block)           # reads the block's inputs, may change the block
        hidden = block(hidden)    # overwrites the stored hidden states, batch by batch

It sees one block, what flows into it and the statistics it asks for, never the model. Held
beyond the model: the hidden states of all windows, once (tokens * width * bytes of the dtype that is
computed in), one block in that dtype, and the statistics that it holds on to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from llmkern.calibrate.flow import HiddenStates, Reached, capture_inputs, find_flow
from llmkern.calibrate.statistics import Statistic
from llmkern.models import block_linears, compute_dtype, evaluation_mode, find_blocks

_S = TypeVar("_S", bound=Statistic)

# Identity of an input: address, sizes, and the version that every in-place change raises.
_Key = tuple[int, int, tuple[int, ...], torch.dtype]


class Keeper(Protocol):
    """Keeps what a walk has finished, so that another can go on from there (`llmkern.drive.journal`)."""

    def restore(self, blocks: nn.ModuleList) -> int:
        """Put the finished blocks back; the index of the first that is left to do."""

    def read_hidden(self, hidden: Tensor, rows: list[slice]) -> None:
        """Overwrite `hidden` by the states that leave the last finished block, part by part."""

    def read_beside(self, name: str) -> dict[str, Tensor]:
        """What was kept with them, under other names than `name`."""

    def commit(
        self, index: int, block: nn.Module, states: Mapping[str, Tensor] | None = None
    ) -> None:
        """Keep a finished block, the hidden states that leave it and what is left beside them."""


class Block:
    """One decoder block as a method sees it.

    Attributes:
        index: position in the model.
        name: full dotted name, e.g. "model.layers.3".
        module: the block itself; what lies inside it may be replaced.
        states: the hidden states that enter it.
        last: nothing follows that needs its outputs.
    """

    def __init__(
        self, index: int, name: str, module: nn.Module, states: HiddenStates, *, last: bool = False
    ) -> None:
        self.index = index
        self.name = name
        self.module = module
        self.states = states
        self.last = last
        self._calls_per_linear: dict[str, int] = {}

    def run(self, batch: int) -> Tensor:
        """Output of the block on one batch of windows."""
        return self.states.run(self.index, self.module, batch)

    def groups(self) -> list[tuple[str, ...]]:
        """Names (inside the block) of its dense linears, those that read the same tensor together.

        Found by running the first batch, in the order of their first call. A linear that was not
        called (an expert that no token was routed to) stands alone, at the end.
        """
        order: dict[tuple[_Key, ...], list[str]] = {}
        calls: dict[str, list[_Key]] = {}
        # Keeping the inputs alive keeps their addresses from being given to another tensor.
        alive: list[Tensor] = []

        def record(name: str, x: Tensor) -> None:
            calls.setdefault(name, []).append(_key(x))
            alive.append(x)

        linears = block_linears(self.module)
        with _on_inputs(linears, record):
            self.run(0)
        for name, keys in calls.items():
            order.setdefault(tuple(keys), []).append(name)
        self._calls_per_linear = {name: len(keys) for name, keys in calls.items()}
        groups = [tuple(names) for names in order.values()]
        return groups + [(name,) for name in linears if name not in calls]

    def calls_each_once(self, groups: Sequence[tuple[str, ...]]) -> bool:
        """Whether a forward calls each of these linears once, as far as `groups` has seen."""
        return all(self._calls_per_linear.get(name) == 1 for group in groups for name in group)

    def collect(
        self, groups: Sequence[tuple[str, ...]], make: Callable[[tuple[str, ...]], _S]
    ) -> list[_S]:
        """Feed one statistic per group with every input of its linears, in one pass over the data.

        Args:
            groups: names of linears that share their input, as `groups` returns them.
            make: called with a group, returns its empty statistic.

        Returns:
            The statistics, in the order of `groups`.
        """
        statistics = [make(group) for group in groups]
        owner = {name: i for i, group in enumerate(groups) for name in group}
        linears = {n: m for n, m in block_linears(self.module).items() if n in owner}
        # Where each linear is called once per forward, the block need not be run beyond the last.
        once = self.calls_each_once(groups)
        seen: dict[int, list[Tensor]] = {}
        missing: set[str] = set()

        def update(name: str, x: Tensor) -> None:
            known = seen.setdefault(owner[name], [])
            if not any(_key(x) == _key(other) for other in known):
                statistics[owner[name]].update(x)
                known.append(x)
            missing.discard(name)
            if once and not missing:
                raise Reached

        with _on_inputs(linears, update), self.states.computing(self.module):
            for batch in range(self.states.batches()):
                seen.clear()
                missing.update(owner)
                try:
                    self.run(batch)
                except Reached:
                    continue
        return statistics


def walk(
    model: nn.Module,
    tokens: Tensor,
    on_block: Callable[[Block], None],
    *,
    batch_size: int = 8,
    compute: str = "auto",
    journal: Keeper | None = None,
) -> None:
    """Call `on_block` on every decoder block of `model`, in order, on the outputs of the one before.

    The model runs in evaluation mode, without gradients and without a cache; its modes, hooks and
    forwards are restored at the end, also after an exception.

    Args:
        model: a causal language model (see `llmkern.models.find_blocks`).
        tokens: int64 [n, seq_len], the calibration windows.
        on_block: called with each `Block`.
        batch_size: windows per forward.
        compute: dtype that the blocks are run in, see `llmkern.models.compute_dtype`.
        journal: keeps each block after its turn, and the hidden states that leave it; blocks that it
            holds already are put back, and `on_block` is not called for them.

    Raises:
        ValueError: `tokens` is no int64 matrix or empty, batch_size is not positive, `compute` is no
            dtype to run the model in, or the blocks were not found, are not run once each, or cannot be
            run one after the other (the block is named); all before `on_block` is called.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.numel() == 0:
        raise ValueError(
            f"tokens: got {tokens.dtype} {list(tokens.shape)}, expected a non-empty int64 [n, seq_len]"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    blocks = find_blocks(model)
    dtype = compute_dtype(model, compute)
    with torch.no_grad(), evaluation_mode(model):
        done = 0 if journal is None else journal.restore(blocks.modules)
        last = len(blocks) - 1
        if done > last:
            return
        flow = find_flow(model, blocks, tokens, keep=journal is not None)
        states = capture_inputs(model, blocks, tokens, batch_size, flow, dtype)
        if journal is not None and done:
            states.read(journal)
        for index, (name, module) in list(enumerate(blocks.items()))[done:]:
            on_block(Block(index, name, module, states, last=index == last))
            if index < last:
                states.advance(index, module)
            if journal is not None:
                journal.commit(index, module, states.tensors() if index < last else None)


def visit(
    model: nn.Module,
    on_block: Callable[[int, str, nn.Module], None],
    *,
    journal: Keeper | None = None,
) -> None:
    """Call `on_block(index, full name, block)` on every decoder block, without data.

    Args:
        model: as for `walk`.
        on_block: may replace what lies inside the block.
        journal: as for `walk`.
    """
    blocks = find_blocks(model)
    with torch.no_grad():
        done = 0 if journal is None else journal.restore(blocks.modules)
        for index, (name, module) in list(enumerate(blocks.items()))[done:]:
            on_block(index, name, module)
            if journal is not None:
                journal.commit(index, module)


def _key(x: Tensor) -> _Key:
    return x.data_ptr(), x._version, (x.numel(), x.shape[-1]), x.dtype


@contextmanager
def _on_inputs(
    linears: dict[str, nn.Module], callback: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `callback(name, x)` before each call of each linear."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: callback(name, args[0])

    handles = [linear.register_forward_pre_hook(hook(n)) for n, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

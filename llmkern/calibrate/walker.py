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

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from llmkern.calibrate.statistics import Statistic
from llmkern.models import (
    block_linears,
    cast_floats,
    compute_dtype,
    computing_in,
    evaluation_mode,
    find_blocks,
)

_S = TypeVar("_S", bound=Statistic)

# Identity of an input: address, sizes, and the version that every in-place change raises.
_Key = tuple[int, int, tuple[int, ...], torch.dtype]


class _Reached(BaseException):
    """Ends a forward early; no Exception, so that no model code can swallow it."""


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of a block, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None  # name under which the hidden states are passed; None: first positional


class HiddenStates:
    """Hidden states of all calibration windows at one depth of the model.

    Attributes:
        hidden: [n, seq_len, width] in the dtype that blocks are run in; overwritten in place by
            `advance`.
    """

    def __init__(self, hidden: Tensor, batches: list[slice], calls: list[list[_Call]]) -> None:
        self.hidden = hidden
        self._batches = batches
        self._calls = calls  # [blocks][batches]; equal arguments are held once
        self._left = False

    def batches(self) -> int:
        """Number of batches that the windows are fed in."""
        return len(self._batches)

    def entering(self, batch: int) -> Tensor:
        """The hidden states of one batch of windows, [windows, seq_len, width]."""
        return self.hidden[self._batches[batch]]

    def run(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """Output hidden states of `block`, the model's block `index`, on one batch of windows."""
        call = self._calls[index][batch]
        # A copy: a block that changes its input in place must find it unchanged in the next pass.
        x = self.hidden[self._batches[batch]].clone()
        with self.computing(block):
            if call.keyword is None:
                return _first(block(x, *call.args, **call.kwargs))
            return _first(block(*call.args, **{call.keyword: x}, **call.kwargs))

    def computing(self, block: nn.Module) -> AbstractContextManager[None]:
        """Around several runs of a block, so that its weights are cast once; see `computing_in`."""
        return computing_in(block, self.hidden.dtype)

    def leave(self, batch: int, output: Tensor) -> None:
        """Replace the hidden states of one batch; all batches must follow before the next block."""
        self.hidden[self._batches[batch]] = output
        self._left = True

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by the output of `block`, unless they have left it already."""
        if self._left:
            self._left = False
            return
        with self.computing(block):
            for batch, rows in enumerate(self._batches):
                self.hidden[rows] = self.run(index, block, batch)

    def read(self, journal: Keeper) -> None:
        """Replace the hidden states by those that a journal has kept."""
        journal.read_hidden(self.hidden, self._batches)


class Keeper(Protocol):
    """Keeps what a walk has finished, so that another can go on from there (`llmkern.drive.journal`)."""

    def restore(self, blocks: nn.ModuleList) -> int:
        """Put the finished blocks back; the index of the first that is left to do."""

    def read_hidden(self, hidden: Tensor, rows: list[slice]) -> None:
        """Overwrite `hidden` by the states that leave the last finished block, part by part."""

    def commit(self, index: int, block: nn.Module, hidden: Tensor | None = None) -> None:
        """Keep a finished block and the hidden states that leave it."""


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
                raise _Reached

        with _on_inputs(linears, update), self.states.computing(self.module):
            for batch in range(self.states.batches()):
                seen.clear()
                missing.update(owner)
                try:
                    self.run(batch)
                except _Reached:
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
        ValueError: `tokens` is no int64 matrix or empty, the blocks were not found or not run, or
            batch_size is not positive, or `compute` is no dtype to run the model in.
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
        states = capture_inputs(model, blocks.modules, tokens, batch_size, dtype)
        if journal is not None and done:
            states.read(journal)
        for index, (name, module) in list(enumerate(blocks.items()))[done:]:
            on_block(Block(index, name, module, states, last=index == last))
            if index < last:
                states.advance(index, module)
            if journal is not None:
                journal.commit(index, module, states.hidden if index < last else None)


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


def capture_inputs(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    batch_size: int,
    dtype: torch.dtype | None = None,
) -> HiddenStates:
    """What enters the first block, and the other arguments (masks, positions) of every block.

    The model's own forward runs with its blocks turned into the identity, so that it costs the
    embedding only, while each block's arguments are those that the model gives it: they differ
    between blocks where sliding and full attention alternate. 16-bit tensors are cast to `dtype`, if
    one is given.
    """
    calls: list[list[_Call]] = [[] for _ in blocks]
    inputs: list[Tensor] = []
    batches = [slice(i, i + batch_size) for i in range(0, len(tokens), batch_size)]
    wrap: list[Callable[[Tensor], Any]] = []

    def identity(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, x = _split(args, kwargs)
            if not wrap:
                # One real call shows whether this model's blocks return a tensor or a tuple; it may
                # change its input in place.
                x = x.clone()
                wrap.append(_like(original(*args, **kwargs)))
            if index == 0:
                inputs.append(x)
            if dtype is not None:
                call = _Call(
                    cast_floats(call.args, dtype), cast_floats(call.kwargs, dtype), call.keyword
                )
            calls[index].append(_share(call, calls[index - 1], calls[index]))
            return wrap[0](x)

        return forward

    device = next(model.parameters()).device
    body = getattr(model, "base_model", model)  # spares the head, whose output nobody needs
    hidden: Tensor | None = None
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(forward_replaced(block, identity(index, block.forward)))
        for rows in batches:
            inputs.clear()
            body(input_ids=tokens[rows].to(device), use_cache=False)
            if len(inputs) != 1:
                raise ValueError(
                    f"model: the first decoder block was run {len(inputs)} times in one forward of "
                    f"{type(model).__name__}, expected once"
                )
            if hidden is None:
                shape = len(tokens), *inputs[0].shape[1:]
                hidden = inputs[0].new_empty(shape, dtype=dtype or inputs[0].dtype)
            hidden[rows] = inputs[0]
    if hidden is None or any(len(block_calls) != len(batches) for block_calls in calls):
        raise ValueError(f"model: {type(model).__name__} does not run each of its blocks once")
    return HiddenStates(hidden, batches, calls)


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Let a decoder block hand on the hidden states that it is given, as if it were not there."""
    wrap: list[Callable[[Tensor], Any]] = []
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = _split(args, kwargs)[1]
        if not wrap:  # once: does this model's block return a tensor or a tuple?
            kept = x.clone()
            wrap.append(_like(original(*args, **kwargs)))
            x = kept
        return wrap[0](x)

    with forward_replaced(block, forward):
        yield


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Call, Tensor]:
    """Take the hidden states out of a block's arguments: the first tensor among them."""
    if args and isinstance(args[0], Tensor):
        return _Call(args[1:], kwargs, None), args[0]
    for keyword, value in kwargs.items():
        if isinstance(value, Tensor):
            rest = {k: v for k, v in kwargs.items() if k != keyword}
            return _Call(args, rest, keyword), value
    raise ValueError("model: its decoder blocks are called without a tensor of hidden states")


def _share(call: _Call, before: list[_Call], earlier: list[_Call]) -> _Call:
    """An equal call of the previous block or of an earlier batch in place of `call`, if there is one.

    Masks and positions are the same for all windows of one length: they are then held once.
    """
    for other in (*before[-1:], *earlier[:1], *earlier[-1:]):
        if _equal(call.args, other.args) and _equal(call.kwargs, other.kwargs):
            return other
    return call


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, (int, float, str, torch.dtype, torch.device)) and bool(a == b)


def _first(output: Any) -> Tensor:
    out = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(out, Tensor)
    return out


def _like(output: Any) -> Callable[[Tensor], Any]:
    """How to return hidden states the way `output` was returned."""
    if isinstance(output, Tensor):
        return lambda x: x
    kind, rest = type(output), tuple(output)[1:]
    return lambda x: kind((x, *rest))


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


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `module` go to `forward`."""
    # Libraries that place models on devices keep a forward of their own in the instance.
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own

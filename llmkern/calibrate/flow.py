"""What flows into the blocks of a model: hidden states, and what else a block leaves to later ones.

Blocks get their arguments (masks, positions) from the model. Some of them pass on more than hidden
states: a shared dict of keys and values (Gemma 3n and 4), a second output that the next block takes.
That is found by running the model on a few tokens, and so is whether the blocks, run one after the
other with these arguments, compute what the model computes.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.calibrate._left import copied, entries_of, refilled, same_entries, tensors_in
from llmkern.models import (
    DecoderBlocks,
    cast_floats,
    computing_in,
    evaluation_mode,
    find_blocks,
    run_on_tokens,
)
from llmkern.models.calls import (
    Call,
    forward_replaced,
    hidden_of,
    returned_like,
    same_values,
    split_call,
)

_PROBE_TOKENS = 8
_HIDDEN = "hidden"
_OUTPUT = "output "  # before the position of a second output of a block
_WAY_OUT = (
    "expected blocks that run one after the other; methods that read no data (rtn, nf4, magnitude) do "
    "without"
)


class Reached(BaseException):
    """Ends a forward early; no Exception, so that no model code can swallow it."""


@dataclass(frozen=True)
class _Left:
    """Stands in a call for what earlier blocks have left under a name."""

    name: str


@dataclass(frozen=True)
class Flow:
    """How a model's blocks pass on what they make.

    Attributes:
        axis: dimension of the hidden states that counts windows: 0 in [windows, seq_len, width].
        outputs: what each block returned; it shows whether it is a tensor or a tuple.
        dtypes: of the hidden states that enter each block (Mamba adds up in float32).
        changed: names of the arguments, dicts or lists, that blocks change for later ones.
    """

    axis: int
    dtypes: list[torch.dtype]
    outputs: list[Any] = field(repr=False)
    changed: frozenset[str] = frozenset()


class HiddenStates:
    """Hidden states of all calibration windows at one depth of the model.

    Attributes:
        hidden: [n, seq_len, width] in the dtype that blocks pass on (where they take several streams,
            these come after the windows); overwritten in place by `advance`.
    """

    def __init__(
        self,
        hidden: Tensor,
        batches: list[slice],
        calls: list[list[Call]],
        left: list[dict[str, Any]],
        flow: Flow,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.hidden = hidden
        self._batches = batches
        self._calls = calls  # [blocks][batches]; equal arguments are held once
        self._left = left  # [batches]; what the blocks so far have left to later ones
        self._axis, self._dtype = flow.axis, dtype
        self._dtypes = [wider(each, dtype) for each in flow.dtypes]
        self._gone = False  # the hidden states have left the block already

    def batches(self) -> int:
        """Number of batches that the windows are fed in."""
        return len(self._batches)

    def entering(self, batch: int) -> Tensor:
        """The hidden states of one batch as blocks take them, most often [windows, seq_len, width]."""
        return self.hidden[self._batches[batch]].movedim(0, self._axis)

    def run(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """Output hidden states of `block`, the model's block `index`, on one batch of windows."""
        return hidden_of(self._result(index, block, batch)[0])

    def computing(self, block: nn.Module) -> AbstractContextManager[None]:
        """Around several runs of a block, so that its weights are cast once; see `computing_in`."""
        return nullcontext() if self._dtype is None else computing_in(block, self._dtype)

    def leave(self, index: int, block: nn.Module, batch: int) -> None:
        """Replace the hidden states of one batch; all batches must follow before the next block."""
        output = self.step(index, block, batch)
        self.hidden[self._batches[batch]] = output.movedim(self._axis, 0)
        self._gone = True

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the hidden states by what `block` makes of them, unless they have left it already.

        With them goes what was left beside them.
        """
        if not self._gone:
            with self.computing(block):
                for batch in range(self.batches()):
                    self.leave(index, block, batch)
        self._gone = False

    def step(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """`run`, and what the block leaves beside its output is there for the next."""
        output, left = self._result(index, block, batch)
        carried = {name: output[_position(name)] for name in left if _position(name)}
        self._left[batch] = left | carried
        return hidden_of(output)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a journal: the hidden states and what was left beside them.

        Raises:
            ValueError: blocks leave something else than tensors and tuples of them.
        """
        found = {_HIDDEN: self.hidden}
        for batch, left in enumerate(self._left):
            for name, value in left.items():
                if value is None:
                    continue
                for path, tensor in tensors_in(value, name):
                    found[json.dumps([batch, name, *path])] = tensor.clone()  # some share memory
        return found

    def read(self, journal: Any) -> None:
        """Go on from what a journal (`llmkern.calibrate.Keeper`) has kept."""
        journal.read_hidden(self.hidden, self._batches)
        kept: list[dict[str, dict[Any, Any]]] = [{} for _ in self._batches]
        for key, tensor in journal.read_beside(_HIDDEN).items():
            batch, name, *path = json.loads(key)
            place = kept[batch].setdefault(name, {})
            for step in path[:-1]:
                place = place.setdefault(step, {})
            place[path[-1] if path else None] = tensor.to(self.hidden.device)
        for left, entries in zip(self._left, kept, strict=True):
            for name, tree in entries.items():
                left[name] = refilled(left[name], tree)

    def _result(self, index: int, block: nn.Module, batch: int) -> tuple[Any, dict[str, Any]]:
        """What the block returns, and what it leaves; nothing here is changed."""
        call = self._calls[index][batch]
        # Copies: a block that changes its input in place must find it unchanged in the next pass.
        x = self.entering(batch).to(self._dtypes[index], copy=True).contiguous()
        left = {name: copied(value) for name, value in self._left[batch].items()}
        args = [left[a.name] if isinstance(a, _Left) else a for a in call.args]
        kwargs = {k: left[v.name] if isinstance(v, _Left) else v for k, v in call.kwargs.items()}
        with self.computing(block):
            if call.keyword is None:
                return block(x, *args, **kwargs), left
            return block(*args, **{call.keyword: x}, **kwargs), left


def wider(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of hidden states that are computed in `dtype`: that, or their own if it holds more."""
    return own if dtype is None else torch.promote_types(own, dtype)


def find_flow(model: nn.Module, blocks: DecoderBlocks, tokens: Tensor, *, keep: bool) -> Flow:
    """How the blocks pass on what they make, found by running the model on a few tokens.

    Args:
        model: in evaluation mode, without gradients.
        blocks: of it.
        tokens: int64 [n, seq_len], of which a few are taken.
        keep: what blocks leave to later ones has to go into a journal.

    Raises:
        ValueError: a block is not run, or more than once, or is given something that the blocks before it
            do not make when they are run one after the other; the block is named.
    """
    few = tokens[:1, :_PROBE_TOKENS]
    seen, outputs, changed = _observed(model, blocks, few)
    _check_each_once(model, blocks, [len(each) for each in seen])
    inputs = [each[0] for each in seen]
    one, two = (_entering_shape(model, blocks, few.expand(n, -1)) for n in (1, 2))
    axis = next((i for i, sizes in enumerate(zip(one, two, strict=True)) if len({*sizes}) > 1), 0)
    flow = Flow(axis, [x.dtype for x in inputs], outputs, changed)
    states = capture_inputs(model, blocks, few, 1, flow)
    for index, (name, block) in enumerate(blocks.items()):
        what = f"{type(model).__name__}, whose block {name} ({type(block).__name__})"
        if not same_values(states.entering(0).to(flow.dtypes[index]), inputs[index]):
            before = f"{blocks.name}.{index - 1}" if index else "the embedding"
            raise ValueError(
                f"model: got {what} reads something else than {before} made, {_WAY_OUT}"
            )
        output = states.step(index, block, 0)
        if not same_values(output, hidden_of(outputs[index])):
            raise ValueError(
                f"model: got {what} computes something else when run alone, {_WAY_OUT}"
            )
        states.hidden.copy_(hidden_of(outputs[index]).movedim(axis, 0))
    if keep:
        states.tensors()
    return flow


def check_runs(model: nn.Module) -> None:
    """Refuse a model with blocks that text does not reach, as far as can be seen without data.

    Raises:
        ValueError: names the block.
    """
    blocks = find_blocks(model)
    few = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
    with torch.no_grad(), evaluation_mode(model):
        try:
            runs = _observed(model, blocks, few)[0]
        except (RuntimeError, NotImplementedError, IndexError, KeyError):
            return  # not every model runs without data
    # Without data a forward may have to be tried twice.
    _check_each_once(model, blocks, [min(len(seen), 1) for seen in runs])


def _check_each_once(model: nn.Module, blocks: DecoderBlocks, runs: list[int]) -> None:
    for (name, block), count in zip(blocks.items(), runs, strict=True):
        if count != 1:
            times = f"runs {count} times" if count else "does not run"
            raise ValueError(
                f"model: got {type(model).__name__}, whose block {name} ({type(block).__name__}) {times} "
                f"on text, {_WAY_OUT}"
            )


def _observed(
    model: nn.Module, blocks: DecoderBlocks, tokens: Tensor
) -> tuple[list[list[Tensor]], list[Any], frozenset[str]]:
    """What enters and leaves each block in the model's own forward, and which arguments blocks change."""
    inputs: list[list[Tensor]] = [[] for _ in blocks.modules]
    outputs: list[Any] = [None] * len(blocks)
    changed: set[str] = set()

    def observe(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, x = split_call(args, kwargs)
            inputs[index].append(x.clone())
            before = {name: entries_of(value) for name, value in _named(call)}
            output = original(*args, **kwargs)
            for name, value in _named(call):
                if not same_entries(before[name], entries_of(value)):
                    changed.add(name)
            outputs[index] = _snapshot(output)
            return output

        return forward

    with ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            stack.enter_context(forward_replaced(block, observe(index, block.forward)))
        run_on_tokens(model, tokens)
    return inputs, outputs, frozenset(changed)


def _entering_shape(model: nn.Module, blocks: DecoderBlocks, tokens: Tensor) -> torch.Size:
    """Of what enters the first block."""
    shapes: list[torch.Size] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes.append(split_call(args, kwargs)[1].shape)
        raise Reached

    with forward_replaced(blocks.modules[0], forward), suppress(Reached):
        run_on_tokens(model, tokens)
    return shapes[0]


def capture_inputs(
    model: nn.Module,
    blocks: DecoderBlocks,
    tokens: Tensor,
    batch_size: int,
    flow: Flow,
    dtype: torch.dtype | None = None,
) -> HiddenStates:
    """What enters the first block, and the other arguments (masks, positions) of every block.

    The model's own forward runs with its blocks turned into the identity, so that it costs the
    embedding only, while each block's arguments are those that the model gives it: they differ
    between blocks where sliding and full attention alternate. 16-bit tensors are cast to `dtype`, if
    one is given.
    """
    calls: list[list[Call]] = [[] for _ in blocks.modules]
    left: list[dict[str, Any]] = []
    inputs: list[Tensor] = []
    batches = [slice(i, i + batch_size) for i in range(0, len(tokens), batch_size)]
    # Stand for the second outputs of blocks: whoever takes one is found by its identity.
    extras = [_stand_ins(output) for output in flow.outputs]
    known = {
        id(t): f"{_OUTPUT}{i}" for each in extras for i, t in enumerate(each) if i and t is not None
    }

    def marked(name: str, value: Any) -> Any:
        carried = known.get(id(value))
        if carried is not None:
            left[-1].setdefault(carried, None)
            return _Left(carried)
        cast = value if dtype is None else cast_floats(value, dtype)
        if name in flow.changed:
            left[-1].setdefault(name, cast)
            return _Left(name)
        return cast

    def identity(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, x = split_call(args, kwargs)
            if index == 0:
                inputs.append(x)
            named = dict(_named(call))
            args = tuple(marked(str(i), named[str(i)]) for i in range(len(call.args)))
            call = Call(args, {k: marked(k, named[k]) for k in call.kwargs}, call.keyword)
            calls[index].append(_share(call, calls[index - 1], calls[index]))
            return returned_like(flow.outputs[index], extras[index])(x)

        return forward

    hidden: Tensor | None = None
    with ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            stack.enter_context(forward_replaced(block, identity(index)))
        for rows in batches:
            inputs.clear()
            left.append({})
            run_on_tokens(model, tokens[rows])
            entering = inputs[0].movedim(flow.axis, 0)
            if hidden is None:
                shape, widest = (
                    entering.shape[1:],
                    functools.reduce(torch.promote_types, flow.dtypes),
                )
                hidden = entering.new_empty(len(tokens), *shape, dtype=wider(widest, dtype))
            hidden[rows] = entering
    assert hidden is not None
    return HiddenStates(hidden, batches, calls, left, flow, dtype)


def _named(call: Call) -> Iterator[tuple[str, Any]]:
    yield from ((str(i), value) for i, value in enumerate(call.args))
    yield from call.kwargs.items()


def _share(call: Call, before: list[Call], earlier: list[Call]) -> Call:
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
    return isinstance(a, (int, float, str, torch.dtype, torch.device, _Left)) and bool(a == b)


def _stand_ins(output: Any) -> tuple[Any, ...]:
    """Objects of their own in place of the tensors of a tuple."""
    if isinstance(output, Tensor):
        return ()
    return tuple(v.detach() if isinstance(v, Tensor) else copy.copy(v) for v in output)


def _snapshot(output: Any) -> Any:
    """Hidden states as they are now: the next block may change them in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)((hidden_of(output).clone(), *output[1:]))


def _position(name: str) -> int:
    """Which output of a block stands under this name; 0: none."""
    return int(name.removeprefix(_OUTPUT)) if name.startswith(_OUTPUT) else 0

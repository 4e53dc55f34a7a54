"""What the drivers that change a model layer by layer share: options, the plan, the work, the stage.

A driver sorts its options (`sort_options`), decides what each linear of the decoder blocks gets
(`plan_layers`), opens a `Work`, and runs through the blocks: without data by `for_each_layer`, with
calibration data by `walk` and a `layer_stage`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmkern._dtypes import FLOATS
from llmkern._journal import Journal
from llmkern.calibrate import Block, Statistic, visit
from llmkern.models import block_linears, find_blocks
from llmkern.models.linears import dense_weight, shape_of
from llmkern.patch import choose_linears, warn_dense, winning_pattern

_T = TypeVar("_T")
_S = TypeVar("_S", bound=Statistic)


@dataclass(frozen=True)
class DataOptions:
    """How the calibration data is cut and fed.

    Attributes:
        samples: windows.
        seq_len: tokens per window; None takes a tensor's own width, else 512.
        seed: of the choice of windows.
        batch_size: windows per forward.
    """

    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    batch_size: int = 8


def sort_options(
    method: str, methods: Mapping[str, type], options: Mapping[str, Any], common: Any = DataOptions
) -> tuple[Any, Any]:
    """Sort keyword options into the method's dataclass and the one that all methods share.

    Args:
        method: a key of `methods`.
        methods: the dataclass of options of each method.
        options: by name, of either.
        common: the dataclass of the options that all methods share.

    Raises:
        ValueError: an unknown method, an option that belongs to neither, a value that the method's
            dataclass refuses.
    """
    if method not in methods:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(methods)}")
    kinds: tuple[Any, ...] = (methods[method], common)
    known = [{f.name for f in dataclasses.fields(kind)} for kind in kinds]
    for name in options:
        if not any(name in names for names in known):
            expected = ", ".join(sorted(set().union(*known)))
            raise ValueError(f"{name}: not an option of method {method!r}, expected {expected}")
    own, shared = ({k: v for k, v in options.items() if k in names} for names in known)
    return methods[method](**own), common(**shared)


def plan_layers(
    model: nn.Module,
    rules: Mapping[str, _T | None],
    *,
    what: str,
    check: Callable[[Mapping[str, tuple[int, Any]]], None],
    values: bool = True,
) -> tuple[dict[str, _T], dict[str, str]]:
    """What each linear inside the decoder blocks gets, and why each other linear gets nothing.

    Args:
        model: a causal language model.
        rules: glob over full layer names -> what the layer gets, or None to leave it as it is; "*"
            first, for all; the last pattern that matches decides.
        what: the driver's name, for messages: "quantize".
        check: called with the K of each layer and what it is to get, by name; raises ValueError
            where that does not fit.
        values: look at the weights' values; False for a model without data, of which only the shapes
            count.

    Returns:
        What each layer gets, in the order of definition, and why the others get nothing.

    Raises:
        ValueError: no dense linear in the blocks, a pattern that matches none of them, whatever
            `check` raises, a weight without data, of another dtype, or with NaN or Inf (named).

    Warns:
        UserWarning: matrices that the rules ask for and that no linear holds (experts).
    """
    blocks = find_blocks(model)
    inside = {
        f"{prefix}.{name}": linear
        for prefix, block in blocks.items()
        for name, linear in block_linears(block).items()
    }
    if not inside:
        raise ValueError(f"model: got no dense linear in {blocks.name}, expected some to {what}")
    for pattern in rules:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in inside):
            raise ValueError(
                f"rules: got {pattern!r}, which matches no linear in {blocks.name}; they are named "
                f"like {next(iter(inside))!r}"
            )
    asked = {}
    for name, linear in inside.items():
        winner = winning_pattern(rules, name)
        wanted = None if winner is None else rules[winner]
        if wanted is not None:
            asked[name] = (shape_of(linear)[1], wanted)
    check(asked)
    choice = choose_linears(model, rules, lambda wanted, shape: None)
    left = dict(choice.left)
    plan = {}
    for name, wanted in choice.replaced.items():
        if name in inside:
            if values:
                check_values(name, inside[name])
            plan[name] = wanted
        else:
            left[name] = f"outside the decoder blocks ({blocks.name})"
    warn_dense(what, {name: left[name] for name in choice.unexpected})
    return plan, left


def check_values(name: str, linear: nn.Module) -> None:
    """Refuse a linear whose weight a method cannot work on.

    Raises:
        ValueError: the weight has no data, is of another dtype than float32, bfloat16 or float16, or
            holds NaN or Inf; names the layer.
    """
    weight = linear.get_parameter("weight")
    if weight.is_meta or weight.dtype not in FLOATS:
        kind = "a weight without data" if weight.is_meta else f"a {weight.dtype} weight"
        raise ValueError(f"{name}: got {kind}, expected float32, bfloat16 or float16")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: its weight holds NaN or Inf, expected finite numbers")


class Work:
    """The progress of a driver through its layers.

    On the way out, also by an exception, `record` is called if any layer was changed, so that the
    model's config says what the model holds; after an exception a warning says how far it came.
    """

    def __init__(
        self,
        verb: str,
        participle: str,
        total: int,
        *,
        progress: bool,
        record: Callable[[], None] | None = None,
    ) -> None:
        """Open the bar.

        Args:
            verb, participle: for messages, as in "quantize", "quantized".
            total: layers (or blocks) to do.
            progress: show a bar, where standard error is a terminal.
            record: see above.
        """
        from tqdm import tqdm

        self._verb, self._participle = verb, participle
        self._total = total
        self._done: list[str] = []
        self._record = record
        # disable=None: no bar where standard error is no terminal.
        self._bar = tqdm(total=total, unit="layer", disable=None if progress else True)

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bar.close()
        done = self._done
        if done and self._record is not None:
            self._record()
        if done and exc is not None:
            warnings.warn(
                f"{self._verb}: stopped after {len(done)} of {self._total} layers; {done[0]} to "
                f"{done[-1]} are already {self._participle}",
                RuntimeWarning,
                stacklevel=3,
            )

    def say(self, text: str) -> None:
        """Show what is being done."""
        self._bar.set_description(text)

    @contextmanager
    def layer(self, name: str) -> Iterator[None]:
        """Work on the layer `name`: shown, without gradients, and named in every ValueError."""
        self.say(name)
        try:
            with torch.no_grad():
                yield
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def finish(self, name: str, **figures: str) -> None:
        """Count the layer `name` as done, and show its figures."""
        self._done.append(name)
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update()


class Lines:
    """The lines of a driver's report, as a journal keeps them with each block."""

    def __init__(self, work: Work, lines: list[Any], kind: type) -> None:
        """Follow the list.

        Args:
            work: counts the layers of restored lines as done.
            lines: of the report, one per layer, with a `name`; grows as the driver works.
            kind: their dataclass.
        """
        self._work, self._lines, self._kind = work, lines, kind
        self._taken = len(lines)

    def take(self, index: int) -> dict[str, Any]:
        """What has been added since the last block."""
        new = self._lines[self._taken :]
        self._taken = len(self._lines)
        return {"lines": [dataclasses.asdict(line) for line in new]}

    def give(self, index: int, block: nn.Module, notes: dict[str, Any]) -> None:
        """Add the lines of a block again."""
        for entry in notes["lines"]:
            # JSON has no tuples.
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
            line = self._kind(**fields)
            self._lines.append(line)
            self._work.finish(line.name)
        self._taken = len(self._lines)


def for_each_layer(
    model: nn.Module,
    planned: Callable[[str], bool],
    apply: Callable[[str, nn.Module, str], None],
    *,
    journal: Journal | None = None,
) -> None:
    """Call `apply(block's name, block, linear's name in it)` on the planned linears, in order."""

    def stage(index: int, prefix: str, block: nn.Module) -> None:
        for name in block_linears(block):
            if planned(f"{prefix}.{name}"):
                apply(prefix, block, name)

    visit(model, stage, journal=journal)


def layer_stage(
    work: Work,
    planned: Callable[[str], bool],
    empty: Callable[[Tensor], _S],
    apply: Callable[[str, nn.Module, str, _S], None],
    *,
    sequential: bool,
) -> Callable[[Block], None]:
    """A stage for `walk`: one block's statistics, and its planned layers in the order of execution.

    Args:
        work: shows the progress.
        planned: whether the layer of this full name is to be changed.
        empty: the empty statistic of a weight [N, K]; linears with the same input share one.
        apply: called with the block's name, the block, the linear's name in it and its statistic.
        sequential: let each linear see the outputs of the changed ones before it in the block;
            otherwise all of a block's statistics are taken in one pass.
    """

    def stage(block: Block) -> None:
        def make(group: tuple[str, ...]) -> _S:
            return empty(dense_weight(block.module.get_submodule(group[0])))

        here = [tuple(n for n in g if planned(f"{block.name}.{n}")) for g in block.groups()]
        groups = [group for group in here if group]
        for sweep in [[group] for group in groups] if sequential else [groups]:
            work.say(f"{block.name} (inputs)")
            statistics = block.collect(sweep, make)
            for group in sweep:
                statistic = statistics.pop(0)
                for name in group:
                    apply(block.name, block.module, name, statistic)

    return stage

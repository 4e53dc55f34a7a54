"""The ways through the layers of a model that methods take; each is the `work` of a method.

    EachLinear    one linear after the other: its weight, and perhaps a statistic of its inputs
    EachGroup     the linears that read one tensor together, with the norm or linear that makes it
    EachBlock     a whole block, which can be run on what flows into it
    ByGradient    one linear after the other, with the gradient of the model's loss
    Elsewhere     modules that are no linears of a block: embeddings, the head, attention's cache

A method is a function of what it is given at a time (a `Layer` or a `Group`) and its options. It returns
a result, or results by layer name; the driver puts them into the model and reports (`Driver`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmkern.calibrate import Block, InputStatistic, visit, walk
from llmkern.calibrate.gradients import loss_gradients
from llmkern.calibrate.stepwise import in_turn
from llmkern.drive.journal import Journal
from llmkern.drive.method import MethodWork, Needs
from llmkern.drive.plan import plan_layers, plan_modules
from llmkern.drive.progress import Progress
from llmkern.drive.shapes import F32, Shapes, Tokens
from llmkern.masks import kept_mask, recorded_layers
from llmkern.models import Source, block_linears, find_blocks, find_sources
from llmkern.models.linears import dense_weight, is_conv1d, weight_rows
from llmkern.models.replace import like

# Copies of a weight [N, K] in float32 that a column loop works on.
_WEIGHTS = 4
# Windows whose gradient is taken.
_GRADIENT_WINDOWS = 16


@dataclass
class Layer:
    """A module that a method is to change, most often a linear of a block.

    Attributes:
        model: that it is part of.
        name: full dotted name.
        wanted: what the plan gives it: a format, an amount.
        statistic: what was asked for, of its inputs or gradients; linears with one input share it.
    """

    model: nn.Module
    name: str
    wanted: Any
    statistic: Any = None

    @property
    def module(self) -> nn.Module:
        """The module as it is now."""
        return self.model.get_submodule(self.name)

    @property
    def weight(self) -> Tensor:
        """Its weight [N, K]."""
        return dense_weight(self.module)

    @property
    def bias(self) -> nn.Parameter | None:
        """Its bias [N]."""
        return self.module._parameters.get("bias")

    def kept(self, keep_zeros: bool | None) -> Tensor | None:
        """Mask of the weights that may be other than zero, where some may not; see `kept_mask`."""
        recorded = self.name in recorded_layers(self.model)
        return kept_mask(self.weight, recorded=recorded, keep_zeros=keep_zeros)

    def replace(self, module: nn.Module) -> None:
        """Put another module in its place, with its hooks."""
        self.model.set_submodule(self.name, like(self.module, module))


@dataclass
class Group:
    """Linears of one block that a method changes together.

    Attributes:
        name: of the block or of the first layer, for messages.
        block: can be run on what flows into it (`run`, `states`).
        layers: in the order of their first call.
        statistic: of their common input; None where none was asked for.
        source: the norm or linear whose output they read and that can take up a scale of its features
            (`llmkern.models.fold`); None where there is none.
    """

    name: str
    block: Block
    layers: tuple[Layer, ...]
    statistic: Any = None
    source: Source | None = None


class Driver(Protocol):
    """What a driver does with a method's results."""

    def place(self, layer: Layer, result: Any) -> None:
        """Put a result into the model."""

    def report(self, layer: Layer, result: Any, seconds: float) -> None:
        """Add a layer's line to the report."""


@dataclass
class LayerRun:
    """One pass of a method through a model.

    Attributes:
        model: changed in place.
        settings: the method's options.
        plan: what each layer gets, by full name.
        driver: takes the results.
        progress: shown.
        windows: calibration, int64 [n, seq_len]; None where the method reads none.
        batch_size: windows per forward.
        compute_dtype: that blocks are run in.
        journal: keeps finished blocks; None: nothing does.
    """

    model: nn.Module
    settings: Any
    plan: Mapping[str, Any]
    driver: Driver
    progress: Progress
    windows: Tensor | None = None
    batch_size: int = 8
    compute_dtype: str = "auto"
    journal: Journal | None = None

    @property
    def tokens(self) -> int:
        """Rows that a layer's statistic will see."""
        return 0 if self.windows is None else self.windows.numel()

    def layer(self, name: str, statistic: Any = None) -> Layer:
        """The planned layer of this full name."""
        return Layer(self.model, name, self.plan[name], statistic)

    def change(self, layer: Layer, function: Callable[[Layer, Any], Any]) -> None:
        """Let a method change one layer."""
        start = time.perf_counter()
        with self.progress.layer(layer.name):
            result = function(layer, self.settings)
            self.driver.place(layer, result)
        self.driver.report(layer, result, time.perf_counter() - start)

    def change_group(
        self, group: Group, function: Callable[[Group, Any], Mapping[str, Any]]
    ) -> None:
        """Let a method change the layers of a group; their time is shared out evenly."""
        start = time.perf_counter()
        with self.progress.layer(group.name):
            results = function(group, self.settings)
            for layer in group.layers:
                self.driver.place(layer, results[layer.name])
        seconds = (time.perf_counter() - start) / len(group.layers)
        for layer in group.layers:
            self.driver.report(layer, results[layer.name], seconds)

    def walk(self, on_block: Callable[[Block], None]) -> None:
        """Through the blocks, each fed with the output of the changed ones before it."""
        assert self.windows is not None
        walk(
            self.model,
            self.windows,
            on_block,
            batch_size=self.batch_size,
            compute=self.compute_dtype,
            journal=self.journal,
        )

    def visit(self, on_block: Callable[[int, str, nn.Module], None]) -> None:
        """Through the blocks, without data."""
        visit(self.model, on_block, journal=self.journal)

    def groups(self, block: Block) -> list[tuple[str, ...]]:
        """The planned linears of a block that read the same tensor, by their names in it."""
        here = [
            tuple(name for name in group if f"{block.name}.{name}" in self.plan)
            for group in block.groups()
        ]
        return [group for group in here if group]

    def statistics(
        self, block: Block, groups: list[tuple[str, ...]], kind: type[InputStatistic]
    ) -> list[Any]:
        """One statistic of the inputs of each group, taken in one pass."""

        return block.collect(groups, partial(self.empty, block, kind))

    def empty(
        self, block: Block, kind: type[InputStatistic], group: tuple[str, ...]
    ) -> InputStatistic:
        """A statistic that has seen nothing of the inputs of a group."""
        self.progress.say(f"{block.name} (inputs)")
        weight = weight_rows(block.module.get_submodule(group[0]))
        return kind(weight.shape[1], tokens=self.tokens, device=weight.device)


class LayerWork(MethodWork):
    """Work that goes through layers by a plan."""

    def plan(
        self, model: nn.Module, rules: Mapping[str, Any], **options: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What each layer gets and why the others get nothing; see `plan_layers`."""
        return plan_layers(model, rules, **options)

    def run(self, run: LayerRun) -> None:
        """Change the planned layers."""
        raise NotImplementedError


def _statistic_nbytes(kind: type[InputStatistic] | None, settings: Any, shapes: Shapes) -> int:
    """What the layer that needs the most needs, and what waits beside it for the other layers."""
    sizes = list(shapes.linears().values())
    work = [_WEIGHTS * N * K * F32 for N, K in sizes]
    if kind is None:
        return max(work)
    most = max(held + kind.nbytes(K) for held, (_, K) in zip(work, sizes, strict=True))
    if getattr(settings, "true_sequential", False):
        return most
    return most + sum(kind.nbytes_held(K) for _, K in sizes) // len(find_blocks(shapes.model))


@dataclass(frozen=True)
class EachLinear(LayerWork):
    """One linear after the other, in the order of execution.

    Attributes:
        function: (layer, options) -> result.
        statistic: class of what it is told of each layer's inputs; None where the weight is enough. With
            an option `true_sequential` each linear of a block sees the outputs of the changed ones before
            it; otherwise all of a block's statistics are taken in one pass.
    """

    function: Callable[[Layer, Any], Any]
    statistic: type[InputStatistic] | None = None

    def needs(self, settings: Any) -> Needs:
        """Tokens, where there is a statistic."""
        return Needs(tokens=self.statistic is not None)

    def nbytes(self, settings: Any, shapes: Shapes, tokens: Tokens) -> int:
        """Copies of the largest weight, its statistic, and the forwards that wait for its turn."""
        waits = self.statistic is not None and getattr(settings, "true_sequential", False)
        held = _statistic_nbytes(self.statistic, settings, shapes)
        return held + (tokens.waiting(shapes) if waits else 0)

    def run(self, run: LayerRun) -> None:
        """Change the planned layers."""
        kind = self.statistic
        if kind is None:
            run.visit(lambda index, prefix, block: self._alone(run, prefix, block))
        else:
            run.walk(lambda block: self._told(run, block, kind))

    def _alone(self, run: LayerRun, prefix: str, block: nn.Module) -> None:
        for name in block_linears(block):
            if f"{prefix}.{name}" in run.plan:
                run.change(run.layer(f"{prefix}.{name}"), self.function)

    def _told(self, run: LayerRun, block: Block, kind: type[InputStatistic]) -> None:
        groups, make = run.groups(block), partial(run.empty, block, kind)
        if getattr(run.settings, "true_sequential", False):
            with closing(in_turn(block, groups, make)) as turns:
                for group, statistic in turns:
                    self._change(run, block, group, statistic)
        else:
            statistics = run.statistics(block, groups, kind)
            for group in groups:
                self._change(run, block, group, statistics.pop(0))

    def _change(self, run: LayerRun, block: Block, group: tuple[str, ...], statistic: Any) -> None:
        for name in group:
            run.change(run.layer(f"{block.name}.{name}", statistic), self.function)


@dataclass(frozen=True)
class EachGroup(LayerWork):
    """The linears that share an input, with the norm or linear before them.

    Attributes:
        function: (group, options) -> result of each layer, by full name.
        statistic: class of what both functions are told of the group's input.
        transform: (group, options) -> None, called for every group of a block before `function` is called
            for any of them, so that all layers and sources are dense: it may scale the layers' columns
            and fold the inverse into the group's source. The journal keeps that with the block.
    """

    function: Callable[[Group, Any], Mapping[str, Any]]
    statistic: type[InputStatistic]
    transform: Callable[[Group, Any], None] | None = None

    def needs(self, settings: Any) -> Needs:
        """Tokens."""
        return Needs(tokens=True)

    def nbytes(self, settings: Any, shapes: Shapes, tokens: Tokens) -> int:
        """Copies of the largest weight, and the statistic."""
        return _statistic_nbytes(self.statistic, settings, shapes)

    def run(self, run: LayerRun) -> None:
        """Change the planned layers."""
        run.walk(lambda block: self._block(run, block))

    def _block(self, run: LayerRun, block: Block) -> None:
        groups = run.groups(block)
        sources = find_sources(block.module, lambda: block.run(0), groups)
        if self.transform is not None:
            for group in self._groups(run, block, groups, sources):
                with run.progress.layer(group.name):
                    self.transform(group, run.settings)
        for group in self._groups(run, block, groups, sources):
            run.change_group(group, self.function)

    def _groups(
        self,
        run: LayerRun,
        block: Block,
        groups: list[tuple[str, ...]],
        sources: Sequence[Source | None],
    ) -> Iterator[Group]:
        """One after the other: each reads what the ones before it have been changed to."""
        for names, source in zip(groups, sources, strict=True):
            (statistic,) = run.statistics(block, [names], self.statistic)
            layers = tuple(run.layer(f"{block.name}.{name}", statistic) for name in names)
            yield Group(layers[0].name, block, layers, statistic, source)


@dataclass(frozen=True)
class EachBlock(LayerWork):
    """A whole block at a time, with all of its planned linears.

    Attributes:
        function: (group, options) -> result of each layer, by full name. The group's block gives its
            inputs (`states.entering`) and its outputs (`run`), which are those of the dense block until
            the function changes it.
        extra: (settings, shapes, tokens) -> bytes that the function holds; None: three times the largest
            block in float32, what training all of it takes.
    """

    function: Callable[[Group, Any], Mapping[str, Any]]
    extra: Callable[[Any, Shapes, Tokens], int] | None = None

    def needs(self, settings: Any) -> Needs:
        """Tokens."""
        return Needs(tokens=True)

    def nbytes(self, settings: Any, shapes: Shapes, tokens: Tokens) -> int:
        """What the function holds."""
        if self.extra is not None:
            return self.extra(settings, shapes, tokens)
        return 3 * shapes.largest_block() * F32 // shapes.dtype.itemsize

    def run(self, run: LayerRun) -> None:
        """Change the planned layers."""
        run.walk(lambda block: self._block(run, block))

    def _block(self, run: LayerRun, block: Block) -> None:
        names = [f"{block.name}.{name}" for group in run.groups(block) for name in group]
        if names:
            layers = tuple(run.layer(name) for name in names)
            run.change_group(Group(block.name, block, layers), self.function)


@dataclass
class Gradient:
    """The gradient of the model's loss with respect to a weight.

    Attributes:
        mean: float32 [N, K], over windows.
        mean_square: float32 [N, K], the Fisher information's diagonal.
    """

    mean: Tensor = field(repr=False)
    mean_square: Tensor = field(repr=False)


@dataclass(frozen=True)
class ByGradient(LayerWork):
    """One linear after the other, with the gradient of the loss of the model as it was before.

    Attributes:
        function: (layer, options) -> result; the layer's statistic is a `Gradient`. Options may name
            `gradient_samples`, the windows whose gradient is taken; 16 otherwise.
    """

    function: Callable[[Layer, Any], Any]

    def needs(self, settings: Any) -> Needs:
        """Tokens, and the gradients on them."""
        return Needs(tokens=True, gradients=True)

    def nbytes(self, settings: Any, shapes: Shapes, tokens: Tokens) -> int:
        """Gradients and their squares of all linears, and what one backward pass keeps."""
        trained = sum(N * K for N, K in shapes.linears().values())
        held = trained * (2 * F32 + shapes.dtype.itemsize)
        return held + tokens.backward(shapes, 1)

    def run(self, run: LayerRun) -> None:
        """Take the gradients, which a resumed run does again, then change the planned layers."""
        assert run.windows is not None
        count = getattr(run.settings, "gradient_samples", _GRADIENT_WINDOWS)
        weights = {n: run.model.get_submodule(n).get_parameter("weight") for n in run.plan}
        run.progress.say("gradients")
        means, squares = loss_gradients(
            run.model,
            list(weights.values()),
            run.windows[:count],
            squares=True,
            compute=run.compute_dtype,
        )

        def taken(name: str) -> Gradient:
            pair = (means[id(weights[name])], squares[id(weights[name])])
            if is_conv1d(run.model.get_submodule(name)):
                return Gradient(pair[0].t(), pair[1].t())
            return Gradient(*pair)

        def on_block(index: int, prefix: str, block: nn.Module) -> None:
            for name in block_linears(block):
                full = f"{prefix}.{name}"
                if full in run.plan:
                    run.change(run.layer(full, taken(full)), self.function)

        run.visit(on_block)


@dataclass(frozen=True)
class Elsewhere(LayerWork):
    """Modules that are no linears of a decoder block.

    Attributes:
        find: (model) -> their full names.
        function: (layer, options) -> result.
        what: for messages: "embedding".
    """

    find: Callable[[nn.Module], list[str]]
    function: Callable[[Layer, Any], Any]
    what: str = "module"

    def plan(
        self, model: nn.Module, rules: Mapping[str, Any], **options: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """All that `find` names, as the rules have it.

        Raises:
            ValueError: it names none, or a rule matches none.
        """
        return plan_modules(self.find(model), rules, self.what)

    def nbytes(self, settings: Any, shapes: Shapes, tokens: Tokens) -> int:
        """Copies of the largest module in float32."""
        names = self.find(shapes.model)
        sizes = [
            sum(p.numel() for p in shapes.model.get_submodule(name).parameters()) for name in names
        ]
        return _WEIGHTS * max(sizes, default=0) * F32

    def nbytes_journal(self, settings: Any, after: Shapes, tokens: Tokens) -> int:
        """Nothing: all of it is done again."""
        return 0

    def run(self, run: LayerRun) -> None:
        """Change the planned modules; a resumed run does all of it again."""
        with torch.no_grad():
            for name in run.plan:
                run.change(run.layer(name), self.function)

"""A model as shapes alone, what a method makes of it, and the bytes that follow from them.

Counted is what grows with the model: weights, hidden states, activations of one batch. Not counted are
the interpreter and its libraries, and what the allocator keeps for later.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmkern.calibrate.stepwise import held_per_token, room
from llmkern.formats import WeightFormat
from llmkern.models import (
    block_linears,
    empty_like,
    find_blocks,
    text_config,
    vocabulary_size,
)
from llmkern.models.experts import find_expert_matrices
from llmkern.models.linears import other_function, shape_of
from llmkern.patch import by_reason, some

F32 = 4  # bytes


@dataclass
class Shapes:
    """A model as a step will find it.

    Attributes:
        model: dense, on the meta device, in the dtype that it will have.
        formats: of the layers that are packed, by full name.
        widths: K of layers of which only data will decide how many columns stay: those it may be, by
            full name.
        stored: bytes of its weights as they are, where it is there already; None: as the shapes say.
        packed: layers are packed in what is there.
        name: for messages.
    """

    model: nn.Module
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    widths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stored: int | None = None
    packed: bool = False
    name: str = "model"

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.model.parameters()).dtype

    def dense(self) -> Shapes:
        """The same with packed layers expanded."""
        return Shapes(self.model, widths=dict(self.widths), name=self.name)

    def with_model(self, model: nn.Module) -> Shapes:
        """The same with another model in its place."""
        return dataclasses.replace(self, model=model)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each dense linear of the decoder blocks, by full name."""
        return {
            f"{prefix}.{name}": shape_of(linear)
            for prefix, block in find_blocks(self.model).items()
            for name, linear in block_linears(block).items()
        }

    def weights(self) -> int:
        """Bytes of the weights in memory, packed ones as the kernels hold them."""
        if self.stored is not None:
            return self.stored
        return self._nbytes(self.model, "", in_memory=True)

    def on_disk(self) -> int:
        """Bytes of the weights in a checkpoint."""
        if self.stored is not None:
            return self.stored
        return self._nbytes(self.model, "", in_memory=False)

    def blocks_nbytes(self) -> int:
        """Bytes of the decoder blocks on disk."""
        blocks = find_blocks(self.model).items()
        return sum(self._nbytes(block, f"{name}.", in_memory=False) for name, block in blocks)

    def largest_block(self) -> int:
        """Bytes of the dense block that has the most of them."""
        return max(
            sum(p.numel() * p.element_size() for p in block.parameters())
            for block in find_blocks(self.model).modules
        )

    def _nbytes(self, module: nn.Module, prefix: str, *, in_memory: bool) -> int:
        total = sum(p.numel() * p.element_size() for p in module.parameters())
        for name, fmt in self.formats.items():
            if not name.startswith(prefix):
                continue
            module_of = self.model.get_submodule(name)
            weight = module_of._parameters.get("weight")
            if weight is None:
                continue  # what has no matrix of its own, such as a cache
            shape = shape_of(module_of)
            total += fmt.nbytes(*shape, weight.element_size(), in_memory=in_memory)
            total -= weight.numel() * weight.element_size()
        return total


class Tokens:
    """The windows that a step reads.

    Attributes:
        windows, window: so many windows of so many tokens.
        dtype: that blocks are run in; None: that of the weights.
        device: where.
    """

    def __init__(self, windows: int, window: int) -> None:
        """So many windows of so many tokens."""
        self.windows, self.window = windows, window
        self.dtype: torch.dtype | None = None
        self.device = torch.device("cpu")

    def _itemsize(self, shapes: Shapes) -> int:
        return (self.dtype or shapes.dtype).itemsize

    def cast(self, shapes: Shapes) -> int:
        """Bytes of the copy of a block in another dtype than its own."""
        own, other = shapes.dtype.itemsize, self._itemsize(shapes)
        return 0 if own == other else shapes.largest_block() // own * other

    def hidden(self, shapes: Shapes) -> int:
        """Bytes of the hidden states of all windows."""
        width: Any = text_config(shapes.model).hidden_size
        return int(self.windows * self.window * width * self._itemsize(shapes))

    def waiting(self, shapes: Shapes) -> int:
        """What the forwards of a block hold that wait before its widest linear, if there is room."""
        width = text_config(shapes.model).hidden_size
        widest = max(K for _, K in shapes.linears().values())
        rows = self.windows * self.window
        need = rows * held_per_token(width, widest) * self._itemsize(shapes)
        return int(need) if need <= room(self.device) else 0

    def activations(self, shapes: Shapes, batch: int) -> int:
        """What one block holds while a batch passes, without gradients."""
        width = text_config(shapes.model).hidden_size
        widest = max(max(size) for size in shapes.linears().values())
        rows = min(batch, self.windows) * self.window
        return int(rows * (6 * width + 3 * widest) * self._itemsize(shapes))

    def backward(self, shapes: Shapes, batch: int) -> int:
        """What all blocks keep of a batch for its gradients, in float32, and the logits."""
        blocks = len(find_blocks(shapes.model))
        per_row = sum(N + K for N, K in shapes.linears().values())
        width = text_config(shapes.model).hidden_size
        rows = min(batch, self.windows) * self.window
        return int(rows * (per_row + 6 * width * blocks) * F32)

    def logits(self, shapes: Shapes) -> int:
        """Of a batch of windows while they are scored."""
        vocabulary = vocabulary_size(shapes.model) or 0
        return int(min(4, self.windows) * self.window * vocabulary * shapes.dtype.itemsize)


@dataclass
class Findings:
    """What was found: impossible, doubtful, and good to know."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """What is refused inside becomes an error."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `left_alone` says the same of all layers
            try:
                yield
            except (ValueError, NotImplementedError) as error:
                self.errors.append(str(error))

    def left_alone(self, model: nn.Module, left: dict[str, str]) -> None:
        """One line per reason why modules stay as they are, with what they hold of the weights."""
        total = sum(p.numel() for p in model.parameters())
        experts = find_expert_matrices(model)
        for reason, names in by_reason(left).items():
            modules = [model.get_submodule(name) for name in names]
            held = sum(p.numel() for module in modules for p in module.parameters())
            line = f"{some(names)} ({held / total:.1%} of the weights) left as it is: {reason}"
            # The rules ask for these, and they cannot be had.
            odd = names[0] in experts or reason == other_function(modules[0])
            (self.warnings if odd else self.notes).append(line)


def fresh(model: nn.Module) -> nn.Module:
    """A model without data like `model`, whose blocks may be taken out."""
    made: nn.Module = empty_like(model).to(next(model.parameters()).dtype)
    return made

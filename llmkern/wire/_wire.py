"""What a checkpoint format answers for itself, so that nothing else asks which one it deals with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from llmkern.nn import PackedLinear
from llmkern.wire.checkpoint_files import CheckpointFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader(Protocol):
    """How the packed layers of one checkpoint come into a model that transformers loads."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Replace linears of the skeleton, on the meta device, before the files are read.

        What takes their place either has parameters and buffers by the names in the files, which
        transformers then loads, or is a `Pending`, whose tensors `fill` reads.

        Raises:
            ValueError: the files do not fit the model (the layer is named).
        """

    def explain(self, unexpected: Sequence[str]) -> str | None:
        """What it means that these tensors have found no place, if it is more than that; one line."""

    def fill(self, model: PreTrainedModel) -> None:
        """Finish the packed layers once everything else is loaded, and check them.

        Raises:
            ValueError: tensors that do not fit, NaN or Inf (the layer is named).
        """


class TakenOver(NamedTuple):
    """What `Wire.take_over` did.

    Attributes:
        left: why modules stay with transformers, by full name.
        complete: no layer of the format is among them, so that the model is one of ours now.
    """

    left: dict[str, str]
    complete: bool


class Wire:
    """A checkpoint format: reading it, writing it, and taking over what others have read.

    A format defines a subclass and puts an instance of it into `llmkern.wire.WIRES`; what it leaves out
    it does not offer.
    """

    # Its `quant_method` in config.json.
    name: ClassVar[str]
    # Packed modules that it holds, by their classes in `llmkern.nn.PACKED`.
    kinds: ClassVar[tuple[type[PackedLinear], ...]] = ()
    # What `take_over` takes, for messages.
    takes: ClassVar[str | None] = None

    # Reading.

    def reads(self, files: CheckpointFiles) -> bool:
        """Whether these files, which have a `quantization_config`, are in this format."""
        return bool(files.config["quantization_config"].get("quant_method") == self.name)

    def reader(self, files: CheckpointFiles) -> Reader:
        """How they are read.

        Raises:
            ValueError: an option that llmkern does not read (named), or no packed weights.
        """
        raise ValueError(f"{files.directory}: got {self.name}, which is only written")

    # Writing.

    def holds(self, layer: PackedLinear) -> bool:
        """Whether layers of this kind can be written, as far as one says without its values."""
        return isinstance(layer, self.kinds)

    def refuse(self, layers: Mapping[str, PackedLinear]) -> str | None:
        """Why these layers, which it holds one by one, cannot make up one checkpoint, or None."""
        return None

    def describe(
        self, layers: Mapping[str, PackedLinear], dense: Sequence[str], stacks: Sequence[str]
    ) -> dict[str, Any]:
        """The `quantization_config` of a model, JSON-serialisable.

        Args:
            layers: the packed layers, by full name; it does not refuse them.
            dense: names of the linears that are written dense.
            stacks: names of the modules that hold stacks of dense matrices (MoE experts).
        """
        raise NotImplementedError

    def leave_dense(self, entry: dict[str, Any], name: str) -> None:
        """Change what `describe` made for a layer that has become dense since; others are left."""
        raise NotImplementedError

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        """A layer's weight as files have it, by the names that follow the module's."""
        return layer.own_tensors()

    def canonical(self, layer: PackedLinear, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `tensors` for the layer's part of a state_dict, its bias included.

        Raises:
            ValueError: tensors that do not fit (named).
        """
        return tensors

    def unread(self, model: PreTrainedModel, layers: Mapping[str, PackedLinear]) -> str | None:
        """Why other readers of the format would not read what is written, or None."""
        return None

    # Models that transformers has loaded with another package.

    def take_over(self, model: nn.Module) -> TakenOver | None:
        """Replace that package's layers by packed ones of the same tensors, in place.

        Returns:
            None where `model` is none of this format's.

        Raises:
            ValueError: nothing in it can be taken over (any more).
        """
        return None

    def spoilt(self, model: nn.Module) -> str | None:
        """Why a model that transformers has loaded can no longer be written, or None."""
        return None

"""Zeros that pruning made, and how they outlive what comes after it.

A layer counts as pruned if the model's config says so, or if so many of its weights are exactly zero
that training did not bring them about. `llmkern.quantize` leaves the zeros of pruned layers zero;
`keep_masks` does the same for fine-tuning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from llmkern.models.linears import dense_weight, find_linears

# Of a layer's weights, exactly zero: that many and it has been pruned, whoever did it. A trained layer
# has next to none, also in half precision.
PRUNED_FRACTION = 0.05

# Key in the model's config, and so in config.json: {"layers": {name: sparsity or "n:m"}}.
_RECORD = "llmkern_pruning"


def record_pruning(model: nn.Module, layers: Mapping[str, float | str]) -> None:
    """Write into the model's config which layers have been pruned, beside those that it knows of.

    Args:
        model: one without a transformers config is left alone.
        layers: sparsity or "n:m" by full name.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        setattr(config, _RECORD, {"layers": {**recorded_layers(model), **layers}})


def recorded_layers(model: nn.Module) -> dict[str, float | str]:
    """What `record_pruning` wrote: sparsity or "n:m" by full name."""
    record = getattr(getattr(model, "config", None), _RECORD, None)
    layers = record.get("layers") if isinstance(record, dict) else None
    return dict(layers) if isinstance(layers, dict) else {}


def rename_recorded(model: nn.Module, names: Mapping[str, str | None]) -> None:
    """Give recorded layers the names that they have now.

    Args:
        names: old prefix of a layer's name -> new one, or None where the layers are gone.
    """
    renamed = {}
    for name, value in recorded_layers(model).items():
        old = next((prefix for prefix in names if name.startswith(f"{prefix}.")), None)
        new = name if old is None else names[old]
        if new is not None:
            renamed[new if old is None else new + name[len(old) :]] = value
    if hasattr(getattr(model, "config", None), _RECORD):
        setattr(model.config, _RECORD, {"layers": renamed})


def forget_filled(model: nn.Module, what: str) -> list[str]:
    """Take layers out of the record whose zeros are no longer there, and say so in one warning.

    Training without `keep_masks` fills them, merging an adapter does, and quantizing with
    `keep_zeros=False`; what reads the record (this package later, people) would take it at its word.

    Args:
        model: one without a record, or with its weights on the meta device, is left alone.
        what: is being done, for the warning.

    Returns:
        Their full names.
    """
    recorded, linears = recorded_layers(model), find_linears(model)
    filled = [
        name
        for name, value in recorded.items()
        if name in linears and not _has_zeros(dense_weight(linears[name]), value)
    ]
    if filled:
        first = filled[0]
        warnings.warn(
            f"{what}: {len(filled)} of {len(recorded)} layers that the config records as pruned have "
            f"lost their zeros ({first}: {recorded[first]}), by training or a merge: they are recorded "
            "no longer; keep_masks(model) keeps zeros, and its apply() sets them again",
            stacklevel=3,
        )
        rest = {name: value for name, value in recorded.items() if name not in filled}
        setattr(model.config, _RECORD, {"layers": rest})
        if not rest:
            delattr(model.config, _RECORD)
    return filled


def _has_zeros(weight: Tensor, value: float | str) -> bool:
    """Whether a weight [N, K] has the zeros that a record speaks of, give or take a tenth."""
    pattern = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    if weight.is_meta or not (pattern or isinstance(value, float)):
        return True
    if pattern is None:
        return zero_fraction(weight) >= 0.9 * float(value)
    removed, group = int(pattern[1]), int(pattern[2])
    if weight.shape[1] % group:
        return zero_fraction(weight) >= 0.9 * removed / group
    zeros = (weight == 0).view(len(weight), -1, group).sum(-1)
    return bool((zeros >= removed).all())


def zero_fraction(weight: Tensor) -> float:
    """Fraction of a weight's entries that are exactly zero."""
    return 1 - int(weight.count_nonzero()) / weight.numel() if weight.numel() else 0.0


def kept_mask(weight: Tensor, *, recorded: bool, keep_zeros: bool | None) -> Tensor | None:
    """Which entries of a weight may be something else than zero, where some may not.

    Args:
        weight: any shape.
        recorded: the model's config says that it has been pruned.
        keep_zeros: keep all zeros, none, or, if None, those of a pruned layer.

    Returns:
        Bool like `weight`, False where it is to stay zero, or None where nothing is.
    """
    if keep_zeros is False:
        return None
    kept = weight != 0
    zeros = kept.numel() - int(kept.sum())
    enough = keep_zeros or recorded or zeros >= PRUNED_FRACTION * kept.numel()
    return kept if zeros and enough else None


def pruned_layers(model: nn.Module) -> list[str]:
    """Full names of the dense linears (and Conv1D) that have been pruned and still have zeros."""
    recorded = recorded_layers(model)
    names = []
    for name, linear in find_linears(model).items():
        weight = linear._parameters.get("weight")
        if weight is None or weight.is_meta:
            continue
        if kept_mask(weight.detach(), recorded=name in recorded, keep_zeros=None) is not None:
            names.append(name)
    return names


class MaskedParameters:
    """Keeps the zeros of some weights zero while a model is trained; see `keep_masks`.

    The gradient of a removed weight is zeroed as it arrives, so that norms, momenta and clipping do not
    see it, and after every optimizer step the weight itself, whatever the step did to it.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Take the masks from the weights as they are, and start keeping them.

        Args:
            weights: by name.
            optimizer: the one whose steps are followed; None follows those of every optimizer.
        """
        self._removed = {name: weight.detach() == 0 for name, weight in weights.items()}
        self._weights = dict(weights)
        self._handles: list[Any] = []
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(self._removed[name], 0)
            if weight.requires_grad:
                hook = _masking(self._removed[name])
                self._handles.append(weight.register_hook(hook))  # type: ignore[no-untyped-call]
        self._handles.append(_after_steps(optimizer, self.apply))

    def __enter__(self) -> MaskedParameters:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.apply()
        self.remove()

    def __len__(self) -> int:
        return len(self._weights)

    def masks(self) -> dict[str, Tensor]:
        """Bool mask of each weight by name, in the weight's own layout, True where it was kept."""
        return {name: ~removed for name, removed in self._removed.items()}

    def zeros(self) -> int:
        """How many weights are held at zero."""
        return sum(int(removed.sum()) for removed in self._removed.values())

    def apply(self) -> None:
        """Set every removed weight to zero; done after each step, and of use after a LoRA merge."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.masked_fill_(self._removed[name], 0)

    def remove(self) -> None:
        """Stop: from here on, training may change the zeros."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def keep_masks(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> MaskedParameters:
    """Keep the zeros of a pruned model while it is trained, by whatever loop.

        with llmkern.keep_masks(model):
            trainer.train()

    Works with any torch optimizer and with transformers' and accelerate's trainers on whole parameters
    (not shards of them), and changes no module of the model. One byte per weight is held.

    Args:
        model: with layers that have been pruned (`pruned_layers`), on its device already.
        optimizer: follow the steps of this one only; None follows every optimizer, those that are made
            later too.

    Returns:
        What keeps them, until its `remove()` or the end of the `with` block.

    Raises:
        ValueError: the model has no pruned layer.
    """
    names = pruned_layers(model)
    if not names:
        raise ValueError(
            f"model: got {type(model).__name__} without a pruned layer, expected one with zeros to keep"
        )
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in names}
    return MaskedParameters(weights, optimizer)


def _masking(removed: Tensor) -> Any:
    return lambda grad: grad.masked_fill(removed, 0)


def _after_steps(optimizer: torch.optim.Optimizer | None, apply: Any) -> Any:
    """Call `apply` after every step; returns a handle with `remove`."""

    def hook(*args: Any) -> None:
        apply()

    if optimizer is None:
        return register_optimizer_step_post_hook(hook)
    # accelerate's wrapper holds the torch optimizer that really steps.
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.register_step_post_hook(hook)

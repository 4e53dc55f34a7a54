"""A student made from its teacher: fewer blocks, narrower MLPs, the same embeddings and head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmkern.calibrate.data import Source
from llmkern.models import find_blocks, keep_blocks
from llmkern.nn import is_packed
from llmkern.patch import expand_packed
from llmkern.prune import prune


def make_student(
    teacher: Any,
    layers: float | int | Sequence[int] = 1.0,
    *,
    width: float = 1.0,
    calibration: Source = None,
    tokenizer: Any = None,
    **pruning: Any,
) -> Any:
    """A dense copy of the teacher with fewer blocks or narrower MLPs, for `distill` to train.

    Args:
        teacher: a transformers causal language model; packed layers are expanded in the copy.
        layers: fraction of the blocks in (0, 1], their number, or which of them. A fraction or number
            takes blocks evenly spread, the first and the last among them.
        width: fraction of the neurons of every MLP that stay, in (0, 1] (`llmkern.prune`, "mlp").
        calibration, tokenizer: what the neurons are chosen by. With either, by the OBS cost on that
            data (or the text that comes with llmkern), and what is left is adjusted; with neither, by
            their magnitude.
        pruning: other options of `llmkern.prune` for the width, as importance or round_to.

    Returns:
        A model of the same class, its config changed; it loads anywhere once saved.

    Raises:
        ValueError: layers or width out of range, options for a width of 1, a model that cannot be
            built so, and what `llmkern.prune` raises.
    """
    depth = len(find_blocks(teacher))
    kept = chosen_blocks(layers, depth)
    if not 0 < width <= 1:
        raise ValueError(f"width: got {width}, expected a fraction in (0, 1]")
    given = {"calibration": calibration, "tokenizer": tokenizer, **pruning}
    needless = [n for n, v in given.items() if v is not None and n != "tokenizer"]
    if width == 1 and needless:
        raise ValueError(f"{needless[0]}: got it with width = 1, expected a width below 1 with it")
    student = copy.deepcopy(teacher)
    expand_packed(student)
    keep_blocks(student, kept)
    if width < 1:
        if calibration is None and tokenizer is None:
            pruning = {"importance": "magnitude", "compensate": False} | pruning
        else:
            pruning |= {"calibration": calibration, "tokenizer": tokenizer}
        prune(student, "mlp", ratio=1 - width, **pruning)
    return student


def chosen_blocks(layers: float | int | Sequence[int], depth: int) -> list[int]:
    if isinstance(layers, (int, float)):
        count = layers if isinstance(layers, int) else round(layers * depth)
        if layers <= 0 or not 1 <= count <= depth or (isinstance(layers, float) and layers > 1):
            raise ValueError(
                f"layers: got {layers}, expected a fraction in (0, 1] or 1 to {depth} of the "
                "teacher's blocks"
            )
        return [round(i) for i in torch.linspace(0, depth - 1, count).tolist()]
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < depth:
        raise ValueError(f"layers: got {kept}, expected rising numbers from 0 to {depth - 1}")
    return kept


def is_dense(model: nn.Module) -> bool:
    """Whether all weights of `model` can be trained as they are."""
    return not any(is_packed(module) for module in model.modules())

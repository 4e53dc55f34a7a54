"""A student made from its teacher: fewer blocks, the same embeddings and head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmkern.models import find_blocks
from llmkern.models.resize import keep_blocks
from llmkern.nn._packed_linear import PackedLinear


def make_student(teacher: Any, layers: float | int | Sequence[int]) -> Any:
    """A dense copy of the teacher with some of its blocks, for `distill` to train.

    Args:
        teacher: a transformers causal language model; packed layers are expanded in the copy.
        layers: fraction of the blocks in (0, 1], their number, or which of them. A fraction or number
            takes blocks evenly spread, the first and the last among them.

    Returns:
        A model of the same class, its config changed; it loads anywhere once saved.

    Raises:
        ValueError: layers out of range, or a model that cannot be built with fewer blocks.
    """
    depth = len(find_blocks(teacher))
    kept = _chosen(layers, depth)
    student = copy.deepcopy(teacher)
    for name, module in list(student.named_modules()):
        if isinstance(module, PackedLinear):
            student.set_submodule(name, module.to_linear())
    if getattr(student.config, "quantization_config", None) is not None:
        del student.config.quantization_config
    keep_blocks(student, kept)
    return student


def _chosen(layers: float | int | Sequence[int], depth: int) -> list[int]:
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
    return not any(isinstance(module, PackedLinear) for module in model.modules())

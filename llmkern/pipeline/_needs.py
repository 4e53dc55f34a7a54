"""Bytes that a stage will hold at its peak, and leave on the disk: estimates from shapes alone.

Counted are what grows with the model: weights, hidden states, the largest statistics and the copies of
a layer that the drivers work on, activations of one batch, optimizer state. Not counted are the
interpreter and its libraries, and what the allocator keeps for later.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from llmkern.formats.int4 import QuantFormat
from llmkern.formats.lut4 import LutFormat
from llmkern.models import find_blocks, text_config, vocabulary_size
from llmkern.models.linears import shape_of
from llmkern.pipeline._shapes import Shapes, linear_shapes, settings_of
from llmkern.pipeline._stage import Stage
from llmkern.pipeline.stages import CURRENT, Distill, Prune, Quantize
from llmkern.prune import DepthOptions, TaylorOptions, WidthOptions
from llmkern.prune._options import RecoveryOptions

_F32 = 4
# Matrices [K, K] in float32 that live at once: a Hessian, its factor and the factorization's own.
_HESSIANS = 3
# For removing columns: H filled, centred, permuted, its inverse, the part that stays and its factor.
_COLUMN_HESSIANS = 7
# Copies of a weight [N, K] in float32 that a column loop works on.
_WEIGHTS = 4
_KD_CHUNK = 3 << 22  # elements of a chunk's logits, of both models and the gradient
_MEASURED_BATCH = 4  # windows, see `llmkern.pipeline.measure`


def weights(shapes: Shapes) -> int:
    """Bytes of the weights in memory, packed ones as the kernels hold them."""
    if shapes.stored is not None:
        return shapes.stored
    return _with_packed(shapes, shapes.model, "", in_memory=True)


def on_disk(shapes: Shapes) -> int:
    """Bytes of the weights in a checkpoint."""
    if shapes.stored is not None:
        return shapes.stored
    return _with_packed(shapes, shapes.model, "", in_memory=False)


def _with_packed(shapes: Shapes, module: nn.Module, prefix: str, *, in_memory: bool) -> int:
    total = sum(p.numel() * p.element_size() for p in module.parameters())
    for name, fmt in shapes.formats.items():
        if not name.startswith(prefix):
            continue
        weight = shapes.model.get_submodule(name).get_parameter("weight")
        N, K = shape_of(shapes.model.get_submodule(name))
        total += _packed(fmt, N, K, weight.element_size(), in_memory)
        total -= weight.numel() * weight.element_size()
    return total


def _packed(fmt: QuantFormat | LutFormat, N: int, K: int, itemsize: int, in_memory: bool) -> int:
    if isinstance(fmt, LutFormat):
        return N * K // 2 + -(-N * K // fmt.block_size) * _F32
    # Kernels compute 2 and 3 bits as 4, and hold scales of 32.
    bits, scale = (4, _F32) if in_memory else (fmt.bits, itemsize)
    groups = K // fmt.groups(K)
    zeros = 0 if fmt.symmetric else N * groups * bits // 8
    return N * -(-K * bits // 32) * 4 + N * groups * scale + zeros


def memory(stage: Stage, before: Shapes, after: Shapes, original: Shapes, tokens: Tokens) -> int:
    """Bytes at the peak of a stage's work.

    Args:
        stage: of the pipeline.
        before, after: the model that it gets and leaves.
        original: the model that the pipeline began with.
        tokens: of the stage's data.
    """
    if isinstance(stage, Distill):
        return _distilling(stage, before, after, original, tokens)
    dense = Shapes(before.model)
    held = weights(dense)
    if isinstance(stage, Quantize) or (
        isinstance(stage, Prune) and not isinstance(settings_of(stage)[0], RecoveryOptions)
    ):
        work = _layers(stage, dense)
    else:
        work = _structures(stage, dense, tokens)
    if not stage.needs_calibration:
        return held + work
    hidden = tokens.hidden(dense)
    passing = tokens.activations(dense, settings_of(stage)[1].batch_size)
    # While a block is kept, its bytes and the hidden states' are there twice.
    kept = hidden + _largest_block(dense)
    peak = held + hidden + max(work + passing, kept)
    recovery = getattr(settings_of(stage)[0], "recovery", "none")
    if recovery != "none":
        peak = max(peak, _recovering(recovery, after, settings_of(stage)[1].batch_size, tokens))
    return peak


def _layers(stage: Stage, shapes: Shapes) -> int:
    """Statistics and copies of the layer that needs the most."""
    settings, _ = settings_of(stage)
    hessian = stage.method in ("gptq", "sparsegpt")
    sizes = list(linear_shapes(shapes.model).values())
    largest = max(
        (_WEIGHTS * N * K + (_HESSIANS * K * K if hessian else 0)) * _F32 for N, K in sizes
    )
    if hessian and not settings.true_sequential:
        blocks = len(find_blocks(shapes.model))
        largest += sum(K * K * _F32 for _, K in sizes) // blocks
    return largest


def _structures(stage: Stage, shapes: Shapes, tokens: Tokens) -> int:
    settings, _ = settings_of(stage)
    if isinstance(settings, DepthOptions):
        return tokens.logits(shapes) if settings.criterion == "perplexity" else 0
    assert isinstance(settings, WidthOptions)
    sizes = list(linear_shapes(shapes.model).values())
    per_layer = 2 if not settings.calibrated else 3
    work = max(
        (per_layer * N * K + (_COLUMN_HESSIANS * K * K if settings.calibrated else 0)) * _F32
        for N, K in sizes
    )
    if isinstance(settings, TaylorOptions):
        trained = sum(N * K for N, K in sizes)
        second = settings.taylor in ("param_second", "param_mix")
        gradients = trained * (_F32 * (2 if second else 1) + shapes.dtype.itemsize)
        work = max(work, gradients + tokens.backward(shapes, 1))
    return work


def _recovering(recovery: str, after: Shapes, batch: int, tokens: Tokens) -> int:
    held = sum(p.numel() for p in after.model.parameters())
    passing = tokens.backward(after, batch)
    if recovery == "lora":
        return weights(after) + passing
    inside = sum(p.numel() for p in find_blocks(after.model).modules.parameters())
    return held * _F32 + 3 * inside * _F32 + passing  # gradient and two moments


def _distilling(
    stage: Distill, before: Shapes, after: Shapes, original: Shapes, tokens: Tokens
) -> int:
    _, training = settings_of(stage)
    trained = sum(p.numel() for p in after.model.parameters())
    states = 1 if training.optimizer == "lion" else 2
    teacher = before if stage.teacher == CURRENT else original
    student = trained * _F32 * (2 + states)
    passing = tokens.backward(after, training.batch_size) + tokens.activations(
        teacher, training.batch_size
    )
    head: int = (vocabulary_size(after.model) or 0) * text_config(after.model).hidden_size * _F32
    return weights(teacher) + student + passing + head + _KD_CHUNK * _F32


def measuring(before: Shapes, after: Shapes, original: Shapes, window: int) -> int:
    """Bytes at the peak of what follows a stage: both models' logits of a batch, and the models."""
    vocabulary = vocabulary_size(after.model) or 0
    logits = 2 * _MEASURED_BATCH * window * vocabulary * after.dtype.itemsize
    return weights(after) + max(weights(before), weights(original)) + logits


def journal(stage: Stage, after: Shapes, tokens: Tokens) -> int:
    """Bytes that the state of an unfinished stage takes on disk, the newest and the one being written."""
    if isinstance(stage, Distill):
        _, training = settings_of(stage)
        trained = sum(p.numel() for p in after.model.parameters())
        return 2 * trained * _F32 * (2 if training.optimizer == "lion" else 3)
    blocks, settings = find_blocks(after.model), settings_of(stage)[0]
    total = 0
    if not isinstance(settings, DepthOptions):
        total += sum(
            _with_packed(after, block, f"{name}.", in_memory=False)
            for name, block in blocks.items()
        )
        total += 2 * tokens.hidden(after) if stage.needs_calibration else 0
    if getattr(settings, "recovery", "none") == "full":
        total += 2 * 3 * _F32 * sum(p.numel() for p in blocks.modules.parameters())
    return total


def _largest_block(shapes: Shapes) -> int:
    return max(
        sum(p.numel() * p.element_size() for p in block.parameters())
        for block in find_blocks(shapes.model).modules
    )


class Tokens:
    """The windows that a stage reads."""

    def __init__(self, windows: int, window: int) -> None:
        """So many windows of so many tokens."""
        self.windows, self.window = windows, window

    def hidden(self, shapes: Shapes) -> int:
        """Hidden states of all windows."""
        width: Any = text_config(shapes.model).hidden_size
        return int(self.windows * self.window * width * shapes.dtype.itemsize)

    def activations(self, shapes: Shapes, batch: int) -> int:
        """What one block holds while a batch passes, without gradients."""
        width = text_config(shapes.model).hidden_size
        widest = max(max(size) for size in linear_shapes(shapes.model).values())
        rows = min(batch, self.windows) * self.window
        return int(rows * (6 * width + 3 * widest) * shapes.dtype.itemsize)

    def backward(self, shapes: Shapes, batch: int) -> int:
        """What all blocks keep of a batch for its gradients, in float32, and the logits."""
        blocks = len(find_blocks(shapes.model))
        per_row = sum(N + K for N, K in linear_shapes(shapes.model).values())
        width = text_config(shapes.model).hidden_size
        rows = min(batch, self.windows) * self.window
        return int(rows * (per_row + 6 * width * blocks) * _F32)

    def logits(self, shapes: Shapes) -> int:
        """Of a batch of windows while they are scored."""
        vocabulary = vocabulary_size(shapes.model) or 0
        return int(min(4, self.windows) * self.window * vocabulary * shapes.dtype.itemsize)


def shown(count: int) -> str:
    """Bytes for people."""
    if count < 1 << 20:
        return f"{count / 1024:.0f} KiB"
    power = 3 if count >= 1 << 30 else 2
    return f"{count / 1024**power:.{1 if power == 3 else 0}f} {'GiB' if power == 3 else 'MiB'}"

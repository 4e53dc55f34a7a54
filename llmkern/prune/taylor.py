"""LLM-Pruner: neurons and heads whose removal changes the model's loss the least, by its gradient.

With w the weights of a unit (in all matrices that make and read it) and g the gradient of the loss on a
few calibration windows, the loss without the unit is L - sum(w g) + 1/2 sum(w^2 F) + ..., F the Fisher
information's diagonal, the mean square of the gradient over windows:

    param_first    sum |w g|                      element by element (the paper's best)
    param_second   sum w^2 F
    param_mix      sum |w g - 1/2 w^2 F|
    vectorize      |sum w g|, matrix by matrix

Source: Ma, Fang and Wang 2023, arXiv 2305.11697 (LLM-Pruner), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkern._dtypes import overflow_hint
from llmkern.calibrate.gradients import loss_gradients
from llmkern.drive import Shapes, Tokens
from llmkern.drive.shapes import F32
from llmkern.models import find_blocks
from llmkern.models.linears import is_conv1d
from llmkern.prune._method import PruneJob, PruneMethod
from llmkern.prune._options import WidthOptions
from llmkern.prune._structured import UnitWork
from llmkern.prune._unit_plan import Scores
from llmkern.prune._widths import Layer

TAYLORS = ("param_first", "param_second", "param_mix", "vectorize")
_SECOND = ("param_second", "param_mix")
PARTS = {"both": ("glu", "mlp", "attention"), "mlp": ("glu", "mlp"), "heads": ("attention",)}


@dataclass(frozen=True)
class TaylorOptions(WidthOptions):
    """Options of `taylor`; `importance` is not one of them.

    Attributes:
        taylor: score of a unit: "param_first", "param_second", "param_mix" or "vectorize".
        parts: what goes: "both", "mlp" or "heads".
        gradient_samples: calibration windows whose gradient is taken.
    """

    importance: str = "taylor"
    taylor: str = "param_first"
    parts: str = "both"
    gradient_samples: int = 16

    importances: ClassVar[tuple[str, ...]] = ("taylor",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taylor not in TAYLORS:
            raise ValueError(f"taylor: got {self.taylor!r}, expected one of {', '.join(TAYLORS)}")
        if self.parts not in PARTS:
            raise ValueError(f"parts: got {self.parts!r}, expected one of {', '.join(PARTS)}")
        if self.gradient_samples < 1:
            raise ValueError(f"gradient_samples: got {self.gradient_samples}, expected at least 1")


def taylor_scores(
    model: nn.Module,
    layers: list[Layer],
    windows: Tensor,
    kind: str = "param_first",
    compute: str = "auto",
) -> Scores:
    """Importance of the units of each layer, float32 [units], by the layer's name.

    Args:
        model: a causal language model.
        layers: as `find_layers` returns them.
        windows: int64 [n, seq_len]; the loss is the mean over all.
        kind: one of `TAYLORS`.
        compute: dtype that the model is run in, see `llmkern.models.compute_dtype`.

    Raises:
        ValueError: a gradient that is NaN (the layer is named).
    """
    blocks = find_blocks(model).modules
    linears = {
        id(linear): linear
        for layer in layers
        for name in (*layer.units.producers, layer.units.consumer)
        for linear in (blocks[layer.block].get_submodule(name),)
    }
    trained = [p for linear in linears.values() for p in linear.parameters()]
    total, fisher = loss_gradients(
        model, trained, windows, squares=kind in _SECOND, compute=compute
    )
    return {layer.name: _score(blocks[layer.block], layer, total, fisher, kind) for layer in layers}


def _score(
    block: nn.Module, layer: Layer, total: dict[int, Tensor], fisher: dict[int, Tensor], kind: str
) -> Tensor:
    units, score = layer.units, torch.zeros(len(layer.units))
    for name, rows in (*units.producers.items(), (units.consumer, units.columns)):
        linear = block.get_submodule(name)
        for key, parameter in linear.named_parameters():
            if name == units.consumer and key == "bias":
                continue
            w, g = parameter.detach().float(), total[id(parameter)]
            value = w * g
            if kind == "param_second":
                value = w.square() * fisher[id(parameter)]
            elif kind == "param_mix":
                value = value - 0.5 * w.square() * fisher[id(parameter)]
            if key == "weight":
                value = value.t() if is_conv1d(linear) else value
                value = value.t() if name == units.consumer else value
            else:
                value = value[:, None]
            per_row = (value if kind == "vectorize" else value.abs()).sum(1).cpu()
            score += per_row[rows].sum(1).abs()
    if not bool(torch.isfinite(score).all()):
        raise ValueError(
            f"{layer.name}: its gradient holds NaN or Inf, expected finite numbers"
            f"{overflow_hint(next(block.parameters()).dtype)}"
        )
    return score


def _scores(job: PruneJob, layers: list[Layer]) -> Scores:
    options = job.options
    windows = job.windows()[: options.gradient_samples]
    return taylor_scores(job.model, layers, windows, options.taylor, job.data.compute_dtype)


@dataclass(frozen=True)
class _Work(UnitWork):
    """Units by their Taylor importance: the gradient of all linears, twice with second-order terms."""

    def nbytes(self, settings: Any, shapes: Shapes, tokens: Tokens) -> int:
        """Of the gradients, or of what the columns are adjusted by."""
        trained = sum(N * K for N, K in shapes.linears().values())
        gradients = F32 * (2 if settings.taylor in _SECOND else 1) + shapes.dtype.itemsize
        taken = trained * gradients + tokens.backward(shapes, 1)
        return max(super().nbytes(settings, shapes, tokens), taken)


METHOD = PruneMethod(
    name="taylor",
    about="neurons and heads, by the gradient of the model's loss",
    options=TaylorOptions,
    amounts=("ratio",),
    work=_Work(lambda options: PARTS[options.parts], _scores),
    needs_amount=False,
    compared={"taylor 20 %": {"ratio": 0.2}},
)

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
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmkern.models import evaluation_mode, find_blocks
from llmkern.models.linears import is_conv1d
from llmkern.prune._job import Job, Method
from llmkern.prune._options import WidthOptions
from llmkern.prune._structured import Scores, check_job, find_layers, prune_units
from llmkern.prune._widths import Layer
from llmkern.prune.recovery import next_token_loss, only_trained

TAYLORS = ("param_first", "param_second", "param_mix", "vectorize")
PARTS = {"both": ("glu", "mlp", "attention"), "mlp": ("glu", "mlp"), "heads": ("attention",)}


@dataclass(frozen=True)
class TaylorOptions(WidthOptions):
    """Options of `taylor`; `importance` is not one of them.

    Attributes:
        taylor: "param_first", "param_second", "param_mix" or "vectorize".
        parts: "both", "mlp" or "heads".
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


def taylor(job: Job) -> None:
    """Remove neurons and heads from every block, those of the least Taylor importance.

    Needs memory for the gradient of all linears of the blocks (twice with second-order terms).

    Raises:
        ValueError: what `prune_units` raises; a gradient that is NaN (the layer is named).
    """
    check_job(job)
    options, kinds = job.options, PARTS[job.options.parts]
    layers = find_layers(job.model, kinds, options.round_to)
    job.open_journal(calibrated=True)
    windows = job.windows()[: options.gradient_samples]
    scores = taylor_scores(job.model, layers, windows, options.taylor)
    prune_units(job, kinds, scores=scores, layers=layers)


def taylor_scores(
    model: nn.Module, layers: list[Layer], windows: Tensor, kind: str = "param_first"
) -> Scores:
    """Importance of the units of each layer, float32 [units], by the layer's name.

    Args:
        model: a causal language model.
        layers: as `find_layers` returns them.
        windows: int64 [n, seq_len]; the loss is the mean over all.
        kind: one of `TAYLORS`.
    """
    blocks = find_blocks(model).modules
    linears = {
        id(linear): linear
        for layer in layers
        for name in (*layer.units.producers, layer.units.consumer)
        for linear in (blocks[layer.block].get_submodule(name),)
    }
    trained = [p for linear in linears.values() for p in linear.parameters()]
    second = kind in ("param_second", "param_mix")
    fisher = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in trained if second}
    total = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in trained}
    with only_trained(model, trained), evaluation_mode(model), torch.enable_grad():
        for window in windows:
            loss = next_token_loss(model, window[None].to(trained[0].device))
            torch.autograd.backward(loss)
            for p in trained:
                if p.grad is not None:
                    total[id(p)] += p.grad / len(windows)
                    if second:
                        fisher[id(p)] += p.grad.float().square() / len(windows)
                    p.grad = None
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
        raise ValueError(f"{layer.name}: its gradient holds NaN or Inf, expected finite numbers")
    return score


METHOD = Method(TaylorOptions, ("ratio",), taylor, needs_amount=False)

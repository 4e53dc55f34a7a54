"""Calibration: windows of tokens, the walk through a model's blocks, statistics of their inputs."""

from llmkern.calibrate.data import load_tokens, load_windows
from llmkern.calibrate.statistics import (
    ActivationNormStatistic,
    HessianStatistic,
    InputStatistic,
    Statistic,
)
from llmkern.calibrate.walker import (
    Block,
    HiddenStates,
    Keeper,
    capture_inputs,
    skipped,
    visit,
    walk,
)

__all__ = [
    "ActivationNormStatistic",
    "Block",
    "HessianStatistic",
    "HiddenStates",
    "InputStatistic",
    "Keeper",
    "Statistic",
    "capture_inputs",
    "load_tokens",
    "load_windows",
    "skipped",
    "visit",
    "walk",
]

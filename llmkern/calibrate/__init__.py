"""Calibration: windows of tokens, the walk through a model's blocks, statistics of their inputs."""

from llmkern.calibrate.data import load_tokens, load_windows
from llmkern.calibrate.flow import HiddenStates, check_runs
from llmkern.calibrate.statistics import (
    ActivationNormStatistic,
    HessianStatistic,
    InputStatistic,
    Statistic,
)
from llmkern.calibrate.walker import (
    Block,
    Keeper,
    visit,
    walk,
)
from llmkern.models.calls import skipped

__all__ = [
    "ActivationNormStatistic",
    "Block",
    "HessianStatistic",
    "HiddenStates",
    "InputStatistic",
    "Keeper",
    "Statistic",
    "check_runs",
    "load_tokens",
    "load_windows",
    "skipped",
    "visit",
    "walk",
]

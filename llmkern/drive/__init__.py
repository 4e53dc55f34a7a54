"""What all drivers share: methods, their ways through a model, plans, progress, the journal."""

from llmkern.drive.journal import Journal, discard, open_journal
from llmkern.drive.layers import (
    ByGradient,
    EachBlock,
    EachGroup,
    EachLinear,
    Elsewhere,
    Gradient,
    Group,
    Layer,
    LayerRun,
    LayerWork,
)
from llmkern.drive.method import Method, MethodWork, Needs
from llmkern.drive.options import DataOptions, find_method, sort_options
from llmkern.drive.plan import check_values, plan_layers
from llmkern.drive.progress import Lines, Progress
from llmkern.drive.shapes import Findings, Shapes, Tokens, fresh

__all__ = [
    "ByGradient",
    "DataOptions",
    "EachBlock",
    "EachGroup",
    "EachLinear",
    "Elsewhere",
    "Findings",
    "Gradient",
    "Group",
    "Journal",
    "Layer",
    "LayerRun",
    "LayerWork",
    "Lines",
    "Method",
    "MethodWork",
    "Needs",
    "Progress",
    "Shapes",
    "Tokens",
    "check_values",
    "discard",
    "find_method",
    "fresh",
    "open_journal",
    "plan_layers",
    "sort_options",
]

"""The pipeline: stages in a row, each measured, with a report of what they bought and cost."""

from llmkern.pipeline.recipe import default_recipe, dump_recipe, load_recipe, parse_recipe
from llmkern.pipeline.run import Pipeline
from llmkern.pipeline.run_options import RunOptions
from llmkern.pipeline.stages import STAGES, Distill, Prune, Quantize, Stage
from llmkern.report import PipelineReport, StageRecord

__all__ = [
    "STAGES",
    "Distill",
    "Pipeline",
    "PipelineReport",
    "Prune",
    "Quantize",
    "RunOptions",
    "Stage",
    "StageRecord",
    "default_recipe",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
]

"""The pipeline: stages in a row, each measured, with a report of what they bought and cost."""

from llmkern.pipeline.records import PipelineReport, StageRecord

__all__ = ["PipelineReport", "StageRecord"]

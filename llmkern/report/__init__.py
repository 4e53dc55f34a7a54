"""The report: records of what was made and measured, and the page, text and JSON written from them."""

from llmkern.report.records import PipelineReport, StageRecord
from llmkern.report.write import write_report

__all__ = ["PipelineReport", "StageRecord", "write_report"]

"""What a run of the pipeline leaves behind: one record per stage, and the report that holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmkern._json import numbers


@dataclass(frozen=True)
class StageRecord:
    """One row of the report: the original model, or the model after a stage.

    Attributes:
        name: unique in the run: "original", "1-prune", "2-quantize".
        stage: "original", or the stage's key in a recipe.
        label: for a reader: "prune glu 25 %".
        options: of the stage, as given in the recipe.
        seed: of the stage.
        directory: of its checkpoint, relative to the run's; None for the original.
        parameters: of the model; those of packed layers count as weights, not as stored words.
        disk_bytes: of the safetensors files; of an original that lies in memory only, of its weights.
        evaluation: as `llmkern.Evaluation.to_dict` gives it: quality against the original, bytes in
            memory, tokens per second, protocol.
        seconds: that the stage took, measuring not included.
        peak_memory_bytes: largest resident set of the process during the stage (on a GPU: of torch's
            allocator); None where it cannot be known.
        driver: report of the driver that did the work, as its `to_dict` gives it.
        sensitivity: KL in nats to the model before the stage when one block alone is replaced by what
            the stage made of it, by the block's name; empty where blocks do not correspond.
        generations: continuations of the report's prompts.
    """

    name: str
    stage: str
    label: str
    options: dict[str, Any]
    seed: int | None
    directory: str | None
    parameters: int
    disk_bytes: int
    evaluation: dict[str, Any]
    seconds: float
    peak_memory_bytes: int | None
    driver: dict[str, Any] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    generations: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> StageRecord:
        """The record that `to_dict` made."""
        held = dict(entry)
        for name in ("evaluation", "driver", "sensitivity"):
            held[name] = numbers(held.get(name, {}))
        return cls(**held)


@dataclass
class PipelineReport:
    """What a run did.

    Attributes:
        title: a line for the top of the report.
        command: exact command or call that made it.
        model: name or directory of the original.
        recipe: list of stages, each {name: options}, as in the YAML file.
        versions, hardware: see `llmkern.env`.
        prompts: that the generations continue.
        warnings: about the recipe and the run.
        stages: the original first.
        in_sequence: each stage works on the model that the one before left; False where each works on
            the original, as in a comparison of methods.
        left_out: why each method that was asked for has no row, by its label.
    """

    title: str
    command: str
    model: str
    recipe: list[dict[str, Any]]
    versions: dict[str, str]
    hardware: dict[str, str]
    prompts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    in_sequence: bool = True
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> PipelineReport:
        """The report that `to_dict` made."""
        stages = [StageRecord.from_dict(stage) for stage in entry["stages"]]
        return cls(**{**entry, "stages": stages})

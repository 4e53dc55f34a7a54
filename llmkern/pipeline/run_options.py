"""How a pipeline is run and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmkern.calibrate.data import Source, check_text_field, has_fields
from llmkern.pipeline.preflight import Preflight
from llmkern.pipeline.stages import source_of


@dataclass(frozen=True)
class RunOptions:
    """How a pipeline is run and measured.

    Attributes:
        calibration: text, path, tokens or dataset (see `llmkern.calibrate.data`) for the stages that
            need data and name none; "builtin" is the text that comes with llmkern.
        evaluation: the same, to measure on, not seen by any stage; None is the held-out text that comes
            with llmkern.
        evaluation_windows: at most so many windows of it.
        text_field: field of the rows of both that holds their text, where they have rows; None chooses,
            and says which.
        tokenizer: of the model; None takes the one in its directory.
        prompts: to continue in the report; None takes beginnings of evaluation windows.
        dtype: to load a directory in; None is the checkpoint's own.
        device: None takes a GPU if there is one.
        speed: measure tokens per second.
        sensitivity: measure what each block's change costs alone.
        progress: say on standard error what is being done, and how far it is.
        command: for the report; None is the Python call.
        on_preflight: called with what the preflight has found, before any work.
    """

    calibration: Source = None
    evaluation: Source = None
    evaluation_windows: int = 64
    text_field: str | None = None
    tokenizer: Any = None
    prompts: Sequence[str] | None = None
    dtype: torch.dtype | None = None
    device: str | None = None
    speed: bool = True
    sensitivity: bool = True
    progress: bool = False
    command: str | None = None
    on_preflight: Callable[[Preflight], None] | None = None

    def __post_init__(self) -> None:
        if self.evaluation_windows < 1:
            raise ValueError(
                f"evaluation_windows: got {self.evaluation_windows}, expected at least 1"
            )
        sources = {name: source_of(getattr(self, name)) for name in ("calibration", "evaluation")}
        for name, source in sources.items():
            if isinstance(source, Iterator):
                raise ValueError(
                    f"{name}: got a {type(source).__name__}, expected a list of its texts: a run reads "
                    "it more than once"
                )
        check_text_field(self.text_field, *sources.values())

    def field_of(self, source: Source) -> str | None:
        """`text_field`, where a source has rows."""
        return self.text_field if has_fields(source) else None

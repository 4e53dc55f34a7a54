"""The model that a run begins with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkern.hf import load, load_tokenizer
from llmkern.pipeline import _fingerprint


@dataclass(frozen=True)
class Origin:
    """The model that a run begins with: in memory, or a directory that is read as often as needed."""

    model: Any
    directory: Path | None
    tokenizer: Any
    dtype: torch.dtype | None
    device: torch.device

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, dtype: torch.dtype | None, device: str | None
    ) -> Origin:
        """What `Pipeline.run` was given.

        Raises:
            ValueError: a dtype or device for a model in memory.
        """
        default = "cuda" if torch.cuda.is_available() else "cpu"
        if not isinstance(model, str | Path):
            if dtype is not None or device is not None:
                given = "dtype" if dtype is not None else "device"
                raise ValueError(
                    f"{given}: got one for a model in memory, expected None: it has its own"
                )
            return cls(model, None, tokenizer, None, next(model.parameters()).device)
        directory = Path(model).expanduser()
        tokenizer = tokenizer or load_tokenizer(directory)
        return cls(None, directory, tokenizer, dtype, torch.device(device or default))

    def open(self) -> Any:
        """The model itself, not to be changed."""
        if self.directory is None:
            return self.model
        return load(self.directory, dtype=self.dtype or "auto").to(self.device)  # type: ignore[arg-type]

    def copy(self) -> Any:
        """The model, to be changed."""
        return copy.deepcopy(self.model) if self.directory is None else self.open()

    @property
    def name(self) -> str:
        """For the report."""
        if self.directory is not None:
            return str(self.directory)
        return str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)

    def fingerprint(self) -> str:
        """Of the weights and the config."""
        return _fingerprint.of_model(self.directory or self.model)

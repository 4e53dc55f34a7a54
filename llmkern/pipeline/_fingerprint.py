"""Short names for what a run was made from, by content, so that a resumed run can tell a change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.pipeline.stages import Stage

_CHUNK = 1 << 24
# Entries of a config that say where a model came from, not what it is.
_ORIGIN = ("_name_or_path", "transformers_version")


def of_model(model: nn.Module | Path) -> str:
    """Of a model in memory, or of the config and weights in a directory."""
    if isinstance(model, Path):
        return _of_files([model / "config.json", *sorted(model.glob("*.safetensors"))])
    entries = {k: v for k, v in model.config.to_dict().items() if k not in _ORIGIN}  # type: ignore[operator,union-attr]
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        _add_tensor(digest, tensor)
    return digest.hexdigest()


def of_source(source: Any) -> str:
    """Of text or tokens (see `llmkern.calibrate.data`); a dataset goes by its name."""
    if source is None:
        return "the text that comes with llmkern"
    if isinstance(source, Tensor):
        digest = hashlib.sha256()
        _add_tensor(digest, source)
        return digest.hexdigest()
    paths = [_file(entry) for entry in ([source] if isinstance(source, str | Path) else source)]
    if all(paths):
        return _of_files([path for path in paths if path])
    text = str(source)
    return hashlib.sha256(text.encode()).hexdigest() if any(map(str.isspace, text)) else text


def of_options(stages: Sequence[Stage[Any]]) -> dict[str, str]:
    """Of the files and models that options of the stages name, by "1-prune.option"."""
    found = {}
    for index, stage in enumerate(stages, 1):
        for name, value in stage.options.items():
            for path in () if name in stage.outputs else _paths(value):
                key = f"{index}-{stage.name}.{name}"
                found[key] = of_model(path) if path.is_dir() else of_source(path)
    return found


def _paths(value: Any) -> Iterator[Path]:
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str):
            path = _file(entry)
            if path is not None:
                yield path
            elif len(entry) < 4096 and (Path(entry) / "config.json").is_file():
                yield Path(entry)


def _file(entry: str | Path) -> Path | None:
    try:
        return Path(entry) if Path(entry).is_file() else None
    except (OSError, ValueError):  # a text that is too long, or too strange, for a path
        return None


def _of_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(data.numpy())

"""Short names for what a run was made from, by content, so that a resumed run can tell a change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.calibrate.data import existing, is_stream
from llmkern.pipeline.stages import Stage, source_of
from llmkern.wire.checkpoint_files import CONFIG, weight_files

_CHUNK = 1 << 24
# Entries of a config that say where a model came from, not what it is.
_ORIGIN = ("_name_or_path", "transformers_version")


def of_model(model: nn.Module | Path) -> str:
    """Of a model in memory, or of the config and weights in a directory."""
    if isinstance(model, Path):
        return _of_files([model / CONFIG, *weight_files(model)])
    entries = {k: v for k, v in model.config.to_dict().items() if k not in _ORIGIN}  # type: ignore[operator,union-attr]
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        _add_tensor(digest, tensor)
    return digest.hexdigest()


def of_source(source: Any) -> str:
    """Of text, rows or tokens (see `llmkern.calibrate.data`); a dataset goes by its name.

    One in memory goes by the fingerprint that its package keeps, another iterable by its class.
    """
    if source is None:
        return "the text that comes with llmkern"
    if isinstance(source, str | Path):
        path = existing(source)
        if path is not None:
            return _of_files(sorted(p for p in path.rglob("*") if p.is_file()) or [path])
        text = str(source)
        return hashlib.sha256(text.encode()).hexdigest() if any(map(str.isspace, text)) else text
    digest = hashlib.sha256()
    _add(digest, source)
    return digest.hexdigest()


def of_options(stages: Sequence[Stage[Any]]) -> dict[str, str]:
    """Of the files and models that options of the stages name, by "1-prune.option"."""
    found = {}
    for index, stage in enumerate(stages, 1):
        for name, value in stage.options.items():
            for path in () if name in stage.outputs else _paths(value):
                key = f"{index}-{stage.name}.{name}"
                found[key] = of_model(path) if path.is_dir() else of_source(path)
        own = source_of(stage.own_data)
        entries = own if isinstance(own, list) else [own]
        if any(path.is_dir() for path in map(existing, filter(None, entries)) if path):
            found[f"{index}-{stage.name}.data"] = of_source(own)
    return found


def _paths(value: Any) -> Iterator[Path]:
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str):
            path = _file(entry)
            if path is not None:
                yield path
            elif len(entry) < 4096 and (Path(entry) / CONFIG).is_file():
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


def _add(digest: Any, value: Any) -> None:
    """Add what a source in memory holds; the files that it names count by their content."""
    if isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif not isinstance(value, str | bytes | int | float) and is_stream(value):
        digest.update(str(getattr(value, "_fingerprint", type(value).__name__)).encode())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(f"{key!r} ".encode())
            _add(digest, item)
    elif isinstance(value, list | tuple) and not all(isinstance(item, int) for item in value):
        for item in value:
            _add(digest, item)
    else:
        path = existing(value) if isinstance(value, str | Path) else None
        digest.update((repr(value) if path is None else of_source(path)).encode())


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(data.numpy())

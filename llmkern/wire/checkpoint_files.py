"""The files of a checkpoint directory, checked before anything is built from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmkern._dtypes import SAFETENSORS_FLOATS

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor: dtype by its safetensors name, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype, for the floats that scales may have."""
        return SAFETENSORS_FLOATS.get(self.dtype)


@dataclass(frozen=True)
class CheckpointFiles:
    """A model directory.

    Attributes:
        directory: where it is.
        config: the parsed config.json.
        tensors: every tensor of the weight files, by name.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def read(self, module: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of one module, by what follows its name.

        Args:
            module: full name.
            names: "weight" also reads what begins with "weight."; those that are not there are left
                out.
        """
        wanted = [
            tensor
            for tensor in self.tensors
            if any(f"{tensor}.".startswith(f"{module}.{name}.") for name in names)
        ]
        shards = dict.fromkeys(wanted, WEIGHTS)
        if (self.directory / INDEX).is_file():
            shards = _read_json(self.directory / INDEX)["weight_map"]
        found = {}
        for tensor in wanted:
            with safe_open(self.directory / shards[tensor], framework="pt") as file:
                found[tensor.removeprefix(f"{module}.")] = file.get_tensor(tensor)
        return found


def read_checkpoint(directory: str | Path) -> CheckpointFiles:
    """Read the config and the headers of the weight files.

    Raises:
        ValueError: not a model directory, no safetensors weights, a damaged file, or an index that
            does not fit the files; one line that names the file.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{path}: got no directory, expected a model directory")
    if not (path / CONFIG).is_file():
        raise ValueError(f"{path}: got no {CONFIG} in it, expected a model directory")
    config = _read_json(path / CONFIG)
    if (path / INDEX).is_file():
        return CheckpointFiles(path, config, _read_sharded(path))
    if (path / WEIGHTS).is_file():
        return CheckpointFiles(path, config, _read_header(path / WEIGHTS))
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if pickles:
        raise ValueError(
            f"{path}: got only pickled weights ({pickles[0]}), expected safetensors: pickles can run "
            "code and are not read"
        )
    raise ValueError(f"{path}: got no weights in it, expected {WEIGHTS} or {INDEX}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: got no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a {type(value).__name__}, expected a JSON object")
    return value


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: got a damaged safetensors file ({error})") from error


def _read_sharded(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: got no weight_map, expected the file of each tensor")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: got the shard {shard!r}, expected a plain file name")
        if not (directory / shard).is_file():
            raise ValueError(f"{directory / shard}: got no such file, but {INDEX} names it")
        found = _read_header(directory / shard)
        wanted = {name for name, file in weight_map.items() if file == shard}
        if wanted != set(found):
            odd = sorted(wanted ^ set(found))[0]
            has, lacks = ("index", "file") if odd in wanted else ("file", "index")
            raise ValueError(f"{directory / shard}: {odd}: in the {has}, but not in the {lacks}")
        tensors.update(found)
    return tensors

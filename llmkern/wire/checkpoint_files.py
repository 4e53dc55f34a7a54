"""The files of a checkpoint directory, checked before anything is built from them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmkern._dtypes import SAFETENSORS_FLOATS
from llmkern.wire.model_directory import CONFIG, find_model, from_gguf, read_json

__all__ = [
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "CheckpointFiles",
    "TensorInfo",
    "read_checkpoint",
    "weight_files",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Entry of config.json by which transformers is told another name of the weights.
_NAMED = "transformers_weights"
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
        shards: the name of the file that holds each of them.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: dict[str, str]

    @property
    def files(self) -> list[Path]:
        """The weight files that are read."""
        return [self.directory / name for name in sorted(set(self.shards.values()))]

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
        found = {}
        for tensor in wanted:
            with safe_open(self.directory / self.shards[tensor], framework="pt") as file:
                found[tensor.removeprefix(f"{module}.")] = file.get_tensor(tensor)
        return found


def read_checkpoint(directory: str | Path) -> CheckpointFiles:
    """Read the config and the headers of the weight files.

    Raises:
        ValueError: not a model directory, no safetensors weights, a damaged file, or an index that
            does not fit the files; one line that names the file.

    Warns:
        UserWarning: `model.safetensors` is there whole and in shards, too: the shards are not read.
    """
    path = find_model(directory)
    config = read_json(path / CONFIG)
    entry = _entry(path, config)
    if entry is None:
        raise ValueError(_no_weights(path))
    if entry.name == WEIGHTS and (path / INDEX).is_file():
        warnings.warn(
            f"{path}: got {WEIGHTS} and {INDEX}: the former is read, as transformers does; delete what "
            "is out of date",
            stacklevel=2,
        )
    if entry.name.endswith(".json"):
        return CheckpointFiles(path, config, *_read_sharded(entry))
    tensors = _read_header(entry)
    return CheckpointFiles(path, config, tensors, dict.fromkeys(tensors, entry.name))


def weight_files(directory: Path) -> list[Path]:
    """The files whose weights loading the directory reads, sorted; none where it has none.

    Others may lie beside them: weights in an author's own format, those of an older model.
    """
    config = directory / CONFIG
    entry = _entry(directory, read_json(config) if config.is_file() else {})
    if entry is None or not entry.name.endswith(".json"):
        return [] if entry is None else [entry]
    return [directory / shard for shard in sorted(set(_weight_map(entry).values()))]


def _entry(directory: Path, config: dict[str, Any]) -> Path | None:
    """The weights, or the index of their shards: whichever transformers takes."""
    named = config.get(_NAMED)
    if named is None:
        names = (WEIGHTS, INDEX)
        return next((directory / n for n in names if (directory / n).is_file()), None)
    suffixes = (".safetensors", ".safetensors.index.json")
    if not isinstance(named, str) or Path(named).name != named or not named.endswith(suffixes):
        raise ValueError(
            f"{directory / CONFIG}: {_NAMED}: got {named!r}, expected the name of a safetensors file"
        )
    if not (directory / named).is_file():
        raise ValueError(f"{directory / named}: got no such file, but {CONFIG} names it")
    return directory / named


def _no_weights(path: Path) -> str:
    """What a directory has in place of weights that can be read, and what to do."""
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern))
    if pickles:
        return (
            f"{path}: got only pickled weights ({pickles[0]}), expected safetensors: pickles can run "
            "code and are not read; transformers' save_pretrained writes safetensors of a model that "
            "you trust"
        )
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        return f"{path}: got only {gguf[0].name}, expected safetensors{from_gguf(gguf[0])}"
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f"{path}: got {others[0]}{more} without {INDEX}, expected {WEIGHTS} or {INDEX}"
    return f"{path}: got no weights in it, expected {WEIGHTS} or {INDEX}"


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


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index has it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: got no weight_map, expected the file of each tensor")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: got the shard {shard!r}, expected a plain file name")
    return weight_map


def _read_sharded(index: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    directory, weight_map = index.parent, _weight_map(index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise ValueError(f"{directory / shard}: got no such file, but {index.name} names it")
        found = _read_header(directory / shard)
        wanted = {name for name, file in weight_map.items() if file == shard}
        if wanted != set(found):
            odd = sorted(wanted ^ set(found))[0]
            raise ValueError(f"{directory / shard}: {odd}: {_misplaced(odd, wanted, weight_map)}")
        tensors.update(found)
    return tensors, weight_map


def _misplaced(name: str, wanted: set[str], weight_map: dict[str, str]) -> str:
    if name in wanted:
        return "in the index, but not in the file"
    if name in weight_map:
        return f"in this file, and by the index in {weight_map[name]}, expected in one of them"
    return "in the file, but not in the index"

"""The journal of a driver: what is finished of a model, on disk, so that a killed run can go on.

    checkpoint/
      settings.json           what was asked for, of which model; a run that resumes must ask the same
      block-00000/            one directory per finished decoder block, renamed into place when whole
        block.json            its packed layers, the driver's notes (report lines), seconds spent so far
        block.safetensors     its parameters, and the tensors of its packed layers
      block-00001/
        hidden.safetensors    the hidden states that leave it; kept of the newest block only
      recovery/               state of a training after the blocks, by `llmkern.train`

A block counts as finished once its directory has its name. It is read and written alone and by number,
so that a walk may stream blocks from disk, or let one of several processes write. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkern._files import check_writable, sync_entry, sync_tree, write_whole
from llmkern._json import numbers, to_json
from llmkern._version import __version__
from llmkern.models.linears import is_conv1d, is_linear, set_weight
from llmkern.models.replace import like
from llmkern.nn import is_packed
from llmkern.nn._stored import describe_packed, rebuild_packed

_SETTINGS, _NOTES, _TENSORS, _HIDDEN = (
    "settings.json",
    "block.json",
    "block.safetensors",
    "hidden.safetensors",
)
_PACKED = "packed."  # before the names of a packed layer's tensors
# Values of each tensor that the fingerprint of a model looks at, evenly spaced.
_SAMPLED = 64
# Entries of a config that say where a model came from, not what it is.
_ORIGIN = ("_name_or_path", "transformers_version")
_SHOWN = 5

Take = Callable[[int], dict[str, Any]]
Give = Callable[[int, nn.Module, dict[str, Any]], None]


class Journal:
    """The state of one call of a driver.

    Attributes:
        directory: where it is.
        resume: go on from what is there.
        finished: blocks that an earlier run has finished.
        seconds: that earlier runs took up to the last of them.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Read what is there; nothing is written before the first commit.

        Args:
            directory: new or empty, or with the state of an earlier run.
            settings: all that the result depends on, ready for JSON; entries may be nested.
            resume: go on from the state, if there is one.

        Raises:
            ValueError: the directory holds state and `resume` is not set, or state of other settings
                (shown), or other files, or damaged state.
            OSError: nothing can be written there.
        """
        self.directory, self.resume = directory, resume
        self.finished, self.seconds = 0, 0.0
        self._settings = _flat(json.loads(to_json(settings)))
        self._started = time.perf_counter()
        self._packed_before: set[int] = set()
        self._take: Take = lambda index: {}
        self._give: Give = lambda index, block, notes: None
        self._check()

    def note(self, take: Take, give: Give) -> None:
        """Let the driver keep something of its own with each block.

        Args:
            take: called with a block's index when it is finished, returns the notes, ready for JSON.
            give: called with the index, the restored block and its notes.
        """
        self._take, self._give = take, give

    def restore(self, blocks: nn.ModuleList) -> int:
        """Put the finished blocks back into the model that they came from.

        Returns:
            How many there are: the index of the first block to work on.

        Raises:
            ValueError: the state is damaged (the file is named).
        """
        self._packed_before = {id(m) for m in blocks.modules() if is_packed(m)}
        for index in range(self.finished):
            where = self._block(index)
            state = _read_json(where / _NOTES)
            try:
                tensors = load_file(where / _TENSORS)
                _put_back(blocks[index], state["packed"], tensors)
            except (SafetensorError, OSError, KeyError, AttributeError) as error:
                raise ValueError(f"{where / _TENSORS}: got a damaged file ({error})") from error
            self._give(index, blocks[index], numbers(state["notes"]))
            if index + 1 < self.finished:  # left there by a run that was killed before deleting it
                (where / _HIDDEN).unlink(missing_ok=True)
        return self.finished

    def read_hidden(self, hidden: Tensor, rows: list[slice]) -> None:
        """Overwrite `hidden` [n, seq_len, width] by the states that leave the last finished block.

        Args:
            hidden: of the walk.
            rows: the parts of it that are read one after the other.

        Raises:
            ValueError: they are damaged, or of another shape.
        """
        path = self._block(self.finished - 1) / _HIDDEN
        try:
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice("hidden")
                if stored.get_shape() != list(hidden.shape):
                    raise ValueError(
                        f"{path}: got {stored.get_shape()}, expected {list(hidden.shape)}"
                    )
                for part in rows:
                    hidden[part] = stored[part].to(hidden.device)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: got a damaged file ({error})") from error

    def read_beside(self, name: str) -> dict[str, Tensor]:
        """What was kept with the hidden states, under other names than `name`.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._block(self.finished - 1) / _HIDDEN
        try:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key != name]  # noqa: SIM118 (no dict)
                return {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: got a damaged file ({error})") from error

    def commit(
        self, index: int, block: nn.Module, states: Mapping[str, Tensor] | None = None
    ) -> None:
        """Keep a finished block, all or nothing; the hidden states before it are deleted then.

        Args:
            index: of the block; those before it have been kept.
            block: as it is now.
            states: "hidden", the states that leave it, and what is left beside them; None for the last
                block, or where the driver has none.
        """
        self.begin()
        partial = self.directory / "block.partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        packed, tensors = self._contents(block)
        save_file(tensors, partial / _TENSORS)
        if states is not None:
            kept = {name: t.detach().cpu().contiguous() for name, t in states.items()}
            save_file(kept, partial / _HIDDEN)
        spent = self.seconds + time.perf_counter() - self._started
        state = {"packed": packed, "notes": self._take(index), "seconds": spent}
        (partial / _NOTES).write_text(to_json(state) + "\n", encoding="utf-8")
        sync_tree(partial)
        os.replace(partial, self._block(index))
        sync_entry(self.directory)
        if index:
            (self._block(index - 1) / _HIDDEN).unlink(missing_ok=True)

    def begin(self) -> None:
        """Make the directory and write the settings, if that has not been done."""
        if not (self.directory / _SETTINGS).is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_whole(self.directory / _SETTINGS, to_json(self._settings, indent=1) + "\n")

    def training(self) -> Path:
        """The directory for the checkpoints of a training after the blocks."""
        self.begin()
        return self.directory / "recovery"

    def _block(self, index: int) -> Path:
        return self.directory / f"block-{index:05d}"

    def _contents(self, block: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The packed layers that the driver made, described, and all tensors to keep."""
        tensors = {name: p.detach() for name, p in block.named_parameters()}
        packed = {}
        for name, module in block.named_modules():
            if is_packed(module) and id(module) not in self._packed_before:
                packed[name], held = describe_packed(module)
                tensors |= {f"{_PACKED}{name}.{key}": t for key, t in held.items()}
        return packed, {name: t.cpu().contiguous() for name, t in tensors.items()}

    def _check(self) -> None:
        path = self.directory
        if path.exists() and not path.is_dir():
            raise ValueError(f"checkpoint: got the file {path}, expected a directory")
        check_writable(path / _SETTINGS, "checkpoint")
        entries = [p for p in path.iterdir() if p.suffix != ".partial"] if path.is_dir() else []
        if not entries:
            return
        if not (path / _SETTINGS).is_file():
            raise ValueError(
                f"checkpoint: got {path} with other files in it, expected a new or empty directory"
            )
        if not self.resume:
            raise ValueError(
                f"checkpoint: got {path}, which holds the state of an earlier run; expected another "
                "directory, or resume to go on from there"
            )
        self._compare(_read_json(path / _SETTINGS))
        while self._block(self.finished).is_dir():
            self.finished += 1
        if self.finished:
            self.seconds = _read_json(self._block(self.finished - 1) / _NOTES)["seconds"]

    def _compare(self, before: dict[str, Any]) -> None:
        now = self._settings
        missing = object()
        odd = [
            f"{key}: {_shown(before, key)} there, {_shown(now, key)} now"
            for key in {**before, **now}
            if before.get(key, missing) != now.get(key, missing)
        ]
        if odd:
            more = f"; and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
            raise ValueError(
                f"checkpoint: {self.directory} was made with other settings ({'; '.join(odd[:_SHOWN])}"
                f"{more}), expected the same, or another directory"
            )


def open_journal(
    model: nn.Module,
    settings: Mapping[str, Any],
    windows: Tensor | None,
    *,
    checkpoint: str | Path | None,
    resume: bool,
) -> Journal | None:
    """The journal of a driver's call; None where no checkpoint is asked for.

    Args:
        model: as it was given to the driver.
        settings: of the driver: all that the result depends on but the model and the data.
        windows: int64 [n, seq_len], the calibration windows, or None where the method reads none.
        checkpoint: directory, or None.
        resume: go on from it.

    Raises:
        ValueError: resume without a checkpoint, and what `Journal` refuses.
    """
    if checkpoint is None:
        if resume:
            raise ValueError("checkpoint: got None with resume, expected a directory")
        return None
    data = None
    if windows is not None:
        digest = hashlib.sha256(_bytes(windows)).hexdigest()
        data = f"{len(windows)} windows of {windows.shape[1]} tokens, sha256 {digest[:16]}"
    known = {"llmkern": __version__, **settings, "calibration": data, **_describe_model(model)}
    return Journal(Path(checkpoint), known, resume=resume)


def discard(checkpoint: str | Path) -> None:
    """Delete the state of a run that is done; a directory without any is left alone."""
    if (Path(checkpoint) / _SETTINGS).is_file():
        shutil.rmtree(checkpoint)


def _describe_model(model: nn.Module) -> dict[str, Any]:
    """A cheap fingerprint: class, config, and the names, shapes and some values of the weights."""
    entry: dict[str, Any] = {"model": type(model).__name__}
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        values = json.loads(to_json(config.to_dict(), default=str))
        entry["config"] = {key: value for key, value in values.items() if key not in _ORIGIN}
        entry["attention"] = getattr(config, "_attn_implementation", None)
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        # Of packed layers as in their files: what the kernels hold depends on what has been run.
        held = dict(module.named_parameters(recurse=False))
        if is_packed(module):
            held |= {k: t for k, t in module._file_tensors().items() if t is not None}
        for key, tensor in held.items():
            digest.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_some_values(tensor.detach()))
    return entry | {"weights": f"sha256 {digest.hexdigest()[:16]}"}


def _some_values(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    step = max(1, tensor.numel() // _SAMPLED)
    return _bytes(tensor.reshape(-1)[::step])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _put_back(
    block: nn.Module, packed: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    """Give a block the parameters and the packed layers that it was left with."""
    for name, tensor in tensors.items():
        if name.startswith(_PACKED):
            continue
        path, _, key = name.rpartition(".")
        _set_parameter(block.get_submodule(path), key, tensor)
    for name, entry in packed.items():
        linear = block.get_submodule(name)
        prefix = f"{_PACKED}{name}."
        device = linear.get_parameter("weight").device
        held = {
            k.removeprefix(prefix): t.to(device) for k, t in tensors.items() if k.startswith(prefix)
        }
        layer = rebuild_packed(entry, held, linear._parameters.get("bias"))
        block.set_submodule(name, like(linear, layer))


def _set_parameter(module: nn.Module, key: str, value: Tensor) -> None:
    old = module.get_parameter(key)
    if old.shape == value.shape:
        old.data.copy_(value)  # in place: another module may hold the same parameter
    elif key == "weight" and is_linear(module):
        set_weight(module, (value.t() if is_conv1d(module) else value).to(old.device))
    else:
        new = nn.Parameter(value.to(old.device, old.dtype), old.requires_grad)
        setattr(module, key, new)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: got a damaged file ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a {type(value).__name__}, expected a JSON object")
    return value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested entries under dotted keys, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = json.dumps(settings[key]) if key in settings else "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."

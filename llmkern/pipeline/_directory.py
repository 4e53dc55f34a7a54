"""The directory of a run.

    OUT/
      config.json, model.safetensors, ...   the model after the last stage
      report.html, report.md, report.json
      recipe.yaml                what ran
      llmkern_run.json           what it ran on; the first file to be written
      stages/original.json       the original's record
      stages/1-prune/            one model directory per finished stage, with llmkern_stage.json
      state/2-quantize/          the driver's own state of the stage that is being worked on

A stage is finished once its directory has its name: it is written and measured beside it and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmkern._files import check_writable, write_whole
from llmkern._json import to_json
from llmkern.hf.save import check_content, replacing
from llmkern.report import StageRecord
from llmkern.wire.checkpoint_files import CONFIG

RUN, STAGE, RECIPE = "llmkern_run.json", "llmkern_stage.json", "recipe.yaml"
_ORIGINAL = "original"


class RunDirectory:
    """Where a run keeps what it has finished and what it is working on."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._stages, self._state = self.root / "stages", self.root / "state"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a directory that the run may not write to; nothing is changed.

        Raises:
            FileExistsError: it holds a run or a model and neither resume nor overwrite is set, or other
                files.
            OSError: nothing can be written there.
            ValueError: both are set.
        """
        if resume and overwrite:
            raise ValueError("resume, overwrite: got both, expected one of them")
        if not self.is_run():
            if set(self._names()) - {f"{RUN}.partial"}:
                check_content(self.root, overwrite)
        elif not resume and not overwrite:
            done = len(list(self._stages.glob(f"*/{STAGE}")))
            raise FileExistsError(
                f"output: got {self.root}, which holds a run with {done} finished stages, expected a new "
                "directory, or resume or overwrite"
            )
        check_writable(self.root / RUN, "output")

    def begin(
        self, settings: Mapping[str, Any], recipe: str, about: Mapping[str, Any], *, resume: bool
    ) -> dict[str, Any] | None:
        """Make the directory ready; what `about` was when the run began that goes on, or None.

        Args:
            settings: all that the result depends on, ready for JSON.
            recipe: as YAML, for the reader.
            about: what it is to be the same on, but need not.
            resume: go on with the run that is there; otherwise it is deleted.

        Raises:
            ValueError: the run that is there was started with other settings (shown).
        """
        settings = json.loads(to_json(settings))
        if resume and self.is_run():
            before = json.loads((self.root / RUN).read_text(encoding="utf-8"))
            differences = _differences(before["settings"], settings)
            if differences:
                raise ValueError(
                    f"resume: got another run than the one in {self.root}: {'; '.join(differences)}; "
                    "expected the same, or another directory"
                )
            self._tidy()
            write_whole(self.root / RECIPE, recipe)
            return {name: before[name] for name in about}
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self.root.iterdir():  # the directory itself stays: it may be a mount point
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_whole(self.root / RUN, to_json({"settings": settings, **about}, indent=2) + "\n")
        write_whole(self.root / RECIPE, recipe)
        return None

    def is_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.root / RUN).is_file()

    def record(self, name: str) -> tuple[StageRecord, list[str]] | None:
        """A finished stage's record and notes; None if it is not finished."""
        path = self._record_file(name)
        if not path.is_file():
            return None
        entry = json.loads(path.read_text(encoding="utf-8"))
        return StageRecord.from_dict(entry["record"]), entry["notes"]

    def write_original(self, record: StageRecord, about: Mapping[str, Any]) -> None:
        """Keep the record of the model that the run began with."""
        self._stages.mkdir(exist_ok=True)
        write_whole(self._record_file(_ORIGINAL), _entry(record, [], about))

    def write_record(
        self, directory: Path, record: StageRecord, notes: list[str], about: Mapping[str, Any]
    ) -> None:
        """Write a stage's record into its directory, or what will be its directory."""
        write_whole(directory / STAGE, _entry(record, notes, about))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A new directory that becomes the stage's when the block ends well; its state goes then."""
        with replacing(self.stage(name)) as partial:
            yield partial
        self._drop_state(name)

    def stage(self, name: str) -> Path:
        """The model directory of a stage."""
        return self._stages / name

    def state(self, name: str) -> Path:
        """Where the driver of a stage keeps its unfinished work."""
        return self._state / name

    def publish(self, name: str) -> None:
        """Make the run's directory a model directory: that of the stage, without a second copy."""
        source = self.stage(name)
        files = [p for p in sorted(source.rglob("*")) if p.is_file() and p.name != STAGE]
        # What makes it a model directory comes last.
        for path in sorted(files, key=lambda p: p.name == CONFIG):
            target = self.root / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:  # a file system without hard links
                shutil.copy2(path, target)

    def _record_file(self, name: str) -> Path:
        if name == _ORIGINAL:
            return self._stages / f"{_ORIGINAL}.json"
        return self.stage(name) / STAGE

    def _names(self) -> list[str]:
        if self.root.is_dir():
            return [path.name for path in self.root.iterdir()]
        return [self.root.name] if self.root.exists() else []

    def _tidy(self) -> None:
        """Remove what a killed process was about to write."""
        for pattern in ("*.partial", "*.partial-*", "*.replaced-*"):
            for folder in (self.root, self._stages):
                for path in folder.glob(pattern) if folder.is_dir() else ():
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
        # Killed between the last two steps of `writing`.
        for state in list(self._state.iterdir()) if self._state.is_dir() else ():
            if self._record_file(state.name).is_file():
                self._drop_state(state.name)

    def _drop_state(self, name: str) -> None:
        shutil.rmtree(self.state(name), ignore_errors=True)
        if self._state.is_dir() and not any(self._state.iterdir()):
            self._state.rmdir()


def _entry(record: StageRecord, notes: list[str], about: Mapping[str, Any]) -> str:
    entry = {"record": record.to_dict(), "notes": notes, **about}
    return to_json(entry, indent=2) + "\n"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in two settings, one phrase each."""
    old, new = _flat(before), _flat(now)
    found = []
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key) or (key in old) != (key in new):
            was, is_now = (_shown(side, key) for side in (old, new))
            found.append(f"{key}: was {was}, is {is_now}")
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    joined = {key: f"{prefix}.{key}" if prefix else str(key) for key in value}
    return {k: v for key, item in value.items() for k, v in _flat(item, joined[key]).items()}


def _shown(side: Mapping[str, Any], key: str) -> str:
    if key not in side:
        return "not there"
    value = side[key]
    # A digest says no more than that the content is another.
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)

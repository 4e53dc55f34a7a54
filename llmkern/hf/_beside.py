"""The files of a model directory that are neither weights nor config: they go with the model.

Chat templates, processors, vocabularies, licences and the model card. Never weights in any format, code,
what describes weights in another format, or what a training or llmkern itself left there.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SUFFIXES = (
    *(".json", ".jinja", ".txt", ".md", ".model", ".spm"),
    *(".tiktoken", ".vocab", ".bpe", ".merges"),
)
_BY_NAME = ("license*", "licence*", "notice*", "copying*", "use_policy*", "readme*")
_NEVER = (
    *("config.json", "*.index.json", "params.json", "consolidated*", "*quant*config.json"),
    *("adapter_*", "trainer_state.json", "*_results.json", "requirements*.txt"),
    *("llmkern_*", "report.json", "report.md"),
    *("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.safetensors", "*.gguf", "*.onnx", "*.h5"),
)
_TOKENIZER = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.spm", "*.tiktoken", "*.vocab", "*.bpe", "*.merges", "tekken.json"),
    *("chat_template*",),
)
_TEMPLATES = "additional_chat_templates"


def carry_over(source: Path, target: Path, tokenizer: Any = None) -> None:
    """Copy what belongs to a model from its directory into that of what was made of it.

    Nothing that `target` has is overwritten; links are followed. What cannot be copied is warned of.

    Args:
        source: the model's directory.
        target: with the model and its tokenizer in it.
        tokenizer: what was written there; the files of another one are left out.
    """
    own = tokenizer is None or _is_from(tokenizer, source)
    files = [path for path in source.iterdir() if _goes_along(path.name)]
    files = [path for path in files if own or not _any(path.name, _TOKENIZER)]
    failed = []
    for path in (*files, *_of_parts(source)):
        copy = target / path.relative_to(source)
        if copy.exists() or not path.is_file():
            continue
        try:
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        except OSError as error:  # the model is worth more than its licence
            copy.unlink(missing_ok=True)
            failed.append(f"{path.name} ({error.strerror})")
    if failed:
        warnings.warn(f"save: not carried over from {source}: {', '.join(failed)}", stacklevel=3)


def _is_from(tokenizer: Any, source: Path) -> bool:
    origin = getattr(tokenizer, "name_or_path", None) or ""
    return origin != "" and Path(origin).expanduser().resolve() == source.resolve()


def _goes_along(name: str) -> bool:
    kept = name.lower().endswith(_SUFFIXES) or _any(name, _BY_NAME)
    return kept and not name.startswith(".") and not _any(name, _NEVER)


def _of_parts(source: Path) -> Iterator[Path]:
    """Files in the directories that a model may have inside its own, none of which holds weights."""
    names = [_TEMPLATES]
    listed = source / "modules.json"  # of sentence-transformers
    if listed.is_file():
        try:
            names += [str(part["path"]) for part in json.loads(listed.read_text(encoding="utf-8"))]
        except (ValueError, TypeError, KeyError):
            return
    for name in names:
        folder = source / name
        if name and Path(name).name == name and folder.is_dir():
            # A part's config.json is its own.
            yield from (path for path in folder.iterdir() if path.suffix in (".json", ".jinja"))


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)

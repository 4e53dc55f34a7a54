"""Which directory a user means, and what to do where it holds no model that can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(directory: str | Path) -> Path:
    """The directory itself, "~" expanded, which holds a config and no mere adapter.

    Raises:
        ValueError: it does not; says what is there and what to do about it.
    """
    path = Path(directory).expanduser()
    if path.is_file():
        raise ValueError(_of_a_file(path))
    if not path.is_dir():
        raise ValueError(f"{path}: got no directory, expected a model directory{_not_here(path)}")
    if (path / _ADAPTER).is_file():
        raise ValueError(
            f"{path}: got {_ADAPTER}, which is an adapter{_base(path)} and no model: merge it into its "
            "base with peft (merge_and_unload), save that, and give its directory"
        )
    if not (path / CONFIG).is_file():
        raise ValueError(
            f"{path}: got no {CONFIG} in it, expected a model directory{_inside(path)}"
        )
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it cannot be read, is no JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: could not be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a {type(value).__name__}, expected a JSON object")
    return value


def _of_a_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path}: got a GGUF file, expected a model directory{from_gguf(path)}"
    return f"{path}: got a file, expected the model directory that it is in"


def from_gguf(file: Path) -> str:
    """What to do with a GGUF file, as the end of a message."""
    return (
        f": AutoModelForCausalLM.from_pretrained({str(file.parent)!r}, gguf_file={file.name!r}) of "
        "transformers reads it, and save_pretrained writes one"
    )


def _not_here(path: Path) -> str:
    """How to get a model that may be meant by its name."""
    name = path.as_posix()
    if not _HUB_NAME.fullmatch(name):
        return ""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, CONFIG)
    except HFValidationError:
        return ""
    if isinstance(cached, str):
        return f": the model of that name on the Hub has been downloaded to {Path(cached).parent}"
    return f": for the model of that name on the Hub, `hf download {name}` prints one"


def _base(path: Path) -> str:
    base = read_json(path / _ADAPTER).get("base_model_name_or_path")
    return f" of {base}" if base else ""


def _inside(path: Path) -> str:
    """What a directory without a config has that a user may have meant."""
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        return from_gguf(gguf[0])
    snapshots = sorted(path.glob(f"snapshots/*/{CONFIG}"))
    models = snapshots or sorted(path.glob(f"*/{CONFIG}"))
    if models:
        return f", such as {models[-1].parent}"
    if (path / "params.json").is_file():
        return ": params.json belongs to its author's own format; take the files in that of Hugging Face"
    return ""

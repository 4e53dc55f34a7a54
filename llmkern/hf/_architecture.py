"""The config of a model directory and the class of its model, without any code from the directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmkern.wire.checkpoint_files import CheckpointFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_config(files: CheckpointFiles) -> Any:
    """The config as transformers has it.

    Raises:
        ValueError: an architecture that transformers lacks, so that code from the directory would have
            to be executed, or entries that it refuses.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = files.config.get("model_type")
    reader: Any = AutoConfig
    if kind not in CONFIG_MAPPING:
        named = _named_class(files)
        if kind is not None or named is None:
            raise ValueError(
                f"{files.directory}: model_type: got {kind!r}, which transformers lacks"
                f"{_remote(files)}"
            )
        reader = named.config_class
    try:
        return reader.from_pretrained(files.directory, trust_remote_code=False)
    except Exception as error:  # whatever the class of a config raises
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{files.directory}: config.json: {text}") from error


def find_model_class(files: CheckpointFiles, config: Any) -> type[PreTrainedModel]:
    """The class that `architectures` names; without it, the language model of the config's type.

    Args:
        files: of the directory.
        config: as `read_config` gives it.

    Raises:
        ValueError: a class that transformers lacks, or no language model for this type of config.
    """
    from transformers.models.auto import modeling_auto

    named = _named_class(files)
    if named is not None:
        return named
    names = _architectures(files)
    if names:
        raise ValueError(
            f"{files.directory}: architectures: got {names[0]!r}, which transformers lacks"
            f"{_remote(files)}"
        )
    mappings: tuple[Any, ...] = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
    raise ValueError(
        f"{files.directory}: architectures: got none in config.json, and {config.model_type} is no "
        "language model of transformers; expected the name of the model's class"
    )


def _architectures(files: CheckpointFiles) -> list[Any]:
    named = files.config.get("architectures") or []
    return named if isinstance(named, list) else [named]


def _named_class(files: CheckpointFiles) -> type[PreTrainedModel] | None:
    """The class that `architectures` names, if transformers has it."""
    import transformers

    for name in _architectures(files)[:1]:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def _remote(files: CheckpointFiles) -> str:
    if "auto_map" in files.config:
        return ": its code is in the directory (auto_map), and llmkern runs no code from there"
    return "; a newer transformers may have it"

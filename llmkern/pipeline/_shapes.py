"""The shapes of a model in memory, in a directory, or as a config; nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmkern.drive import Shapes
from llmkern.evaluate import weight_bytes
from llmkern.models import changed_config, find_blocks, skeleton
from llmkern.models.heads import tied_embedding
from llmkern.models.resize import resize_blocks
from llmkern.nn import is_packed
from llmkern.wire.checkpoint_files import CheckpointFiles, read_checkpoint


def read_shapes(model: Any, dtype: torch.dtype | None = None) -> Shapes:
    """The shapes of a model in memory, of its config, or of one in a directory; nothing is loaded.

    Args:
        model: a transformers model, its config, or a directory.
        dtype: that a directory or config will be loaded in; None is the checkpoint's own.

    Raises:
        ValueError: none of these, or a model class that transformers lacks.
        NotImplementedError: an encoder-decoder model.
    """
    from transformers import PretrainedConfig

    if isinstance(model, nn.Module):
        if getattr(model, "config", None) is None:
            raise ValueError(
                f"model: got {type(model).__name__}, expected a transformers model: it has no config"
            )
        find_blocks(model)
        made = skeleton(model, changed_config(model.config, {}))
        packed = any(map(is_packed, model.modules()))
        made = made.to(next(model.parameters()).dtype)
        return Shapes(made, stored=weight_bytes(model), packed=packed, name=type(model).__name__)
    if isinstance(model, PretrainedConfig):
        return Shapes(_built(model, None, dtype), name=type(model).__name__)
    files = read_checkpoint(model)
    return _of_directory(files, dtype)


def _of_directory(files: CheckpointFiles, dtype: torch.dtype | None) -> Shapes:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(files.directory, trust_remote_code=False)
    name = (files.config.get("architectures") or [None])[0]
    packed = bool(files.config.get("quantization_config"))
    stored = sum(p.stat().st_size for p in Path(files.directory).glob("*.safetensors"))
    made = _built(config, name, dtype)
    return Shapes(made, stored=stored, packed=packed, name=str(files.directory))


def _built(config: Any, name: str | None, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"model: got the encoder-decoder {name or type(config).__name__}, expected a causal "
            "language model"
        )
    plain = changed_config(config, {})
    own = getattr(transformers, name or "", None)
    if name is not None and own is None:
        raise ValueError(f"model: got {name!r}, a class that transformers lacks")
    with torch.device("meta"):
        auto: Any = transformers.AutoModelForCausalLM
        made = auto.from_config(plain) if own is None else own(plain)
        resize_blocks(made, type(made), plain)
    find_blocks(made)
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    if isinstance(kind, str):  # as the file has it
        kind = getattr(torch, kind)
    return made.eval().to(kind)  # type: ignore[no-any-return]


def tied_embeddings(model: Any) -> str | None:
    """What it means that a model's head is its embedding; None where it has its own."""
    weight = tied_embedding(model)
    if weight is None:
        return None
    rows, width = weight.shape
    return (
        f"embeddings are tied: one matrix of {rows} x {width} embeds the tokens and gives the logits; it "
        "counts once, and no stage compresses it"
    )

"""The shapes of a model in memory, in a directory, or as a config; nothing is loaded."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from llmkern._dtypes import FLOATS_BY_NAME
from llmkern.drive import Shapes, fresh
from llmkern.evaluate import weight_bytes
from llmkern.hf import find_model_class, read_config
from llmkern.models import changed_config, find_blocks
from llmkern.models.heads import tied_embedding
from llmkern.models.resize import resize_blocks
from llmkern.nn import is_packed
from llmkern.wire import reading_wire
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
        packed = any(map(is_packed, model.modules()))
        stored, name = weight_bytes(model), type(model).__name__
        return Shapes(fresh(model), stored=stored, packed=packed, name=name)
    if isinstance(model, PretrainedConfig):
        return Shapes(_built(model, None, dtype), name=type(model).__name__)
    files = read_checkpoint(model)
    return _of_directory(files, dtype)


def _of_directory(files: CheckpointFiles, dtype: torch.dtype | None) -> Shapes:
    wire = reading_wire(files)
    if wire is not None:
        wire.reader(files)  # refuses what loading would
    config = read_config(files)
    kind = find_model_class(files, config)
    stored = sum(path.stat().st_size for path in files.files)
    made = _built(config, kind, dtype or stored_dtype(files))
    return Shapes(made, stored=stored, packed=wire is not None, name=str(files.directory))


def stored_dtype(files: CheckpointFiles) -> torch.dtype:
    """The dtype that a directory is loaded in: its config's, or that of most of its float tensors."""
    entry = files.config.get("dtype") or files.config.get("torch_dtype")
    named = FLOATS_BY_NAME.get(str(entry))
    if named is not None:
        return named
    floats = Counter(info.torch_dtype for info in files.tensors.values() if info.torch_dtype)
    return floats.most_common(1)[0][0] if floats else torch.float32


def _built(config: Any, kind: Any, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        name = type(config).__name__ if kind is None else kind.__name__
        raise NotImplementedError(
            f"model: got the encoder-decoder {name}, expected a causal language model"
        )
    plain = changed_config(config, {})
    with torch.device("meta"):
        auto: Any = transformers.AutoModelForCausalLM
        made = auto.from_config(plain) if kind is None else kind(plain)
        resize_blocks(made, type(made), plain)
    find_blocks(made)
    own = dtype or getattr(config, "dtype", None) or torch.float32
    if isinstance(own, str):  # as the file has it
        own = getattr(torch, own)
    return made.eval().to(own)  # type: ignore[no-any-return]


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

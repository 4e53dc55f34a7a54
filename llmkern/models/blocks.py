"""The decoder blocks of a causal language model and the linears inside them.

It goes by structure alone: the blocks are the longest outermost `nn.ModuleList` of the decoder, and their
linears whatever multiplies by a dense matrix below them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.models.linears import find_linears, uncalled_linears


@dataclass(frozen=True)
class DecoderBlocks:
    """The list of blocks that a model's forward runs through, one after the other.

    Attributes:
        name: dotted path of the list inside the model, e.g. "model.layers".
        modules: the blocks, in order.
    """

    name: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        return len(self.modules)

    def items(self) -> Iterator[tuple[str, nn.Module]]:
        """(full dotted name, block) of every block."""
        for index, module in enumerate(self.modules):
            yield f"{self.name}.{index}", module


def find_blocks(model: nn.Module) -> DecoderBlocks:
    """The decoder blocks of `model`.

    Args:
        model: a Hugging Face causal language model, or any module that keeps its blocks in one
            `nn.ModuleList`; a vision tower beside the text decoder is passed over.

    Raises:
        ValueError: there is no list of blocks in it.
        NotImplementedError: it is an encoder-decoder model.
    """
    _check_one_stack(model, "model")
    decoder = _decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    best: DecoderBlocks | None = None
    for name, modules in _outermost_lists(decoder, prefix):
        # Lists of bare layers (norms, projections) are no blocks: a block has layers of its own.
        if not all(any(True for _ in entry.children()) for entry in modules):
            continue
        if best is None or _size(modules) > _size(best.modules):
            best = DecoderBlocks(name, modules)
    if best is None:
        raise ValueError(
            f"model: got {type(model).__name__}, in which no nn.ModuleList of decoder blocks was found"
        )
    return best


def check_reads_text(model: nn.Module, argument: str = "model") -> None:
    """Refuse a model that cannot be run on token ids alone.

    Args:
        model: any module; one that says nothing about its inputs passes.
        argument: what error messages call it.

    Raises:
        NotImplementedError: it is an encoder-decoder model.
        ValueError: it reads pictures or sounds, and no text beside them.
    """
    _check_one_stack(model, argument)
    reads = getattr(model, "main_input_name", None)
    known = inspect.signature(model.forward).parameters
    if reads in known and "input_ids" not in known:
        raise ValueError(
            f"{argument}: got {type(model).__name__}, which reads {reads}, expected a causal language "
            "model"
        )


def check_writes_text(model: nn.Module, argument: str = "model") -> None:
    """Refuse a model whose logits are not of the next token, by what transformers says of its class.

    Raises:
        NotImplementedError: it is an encoder-decoder model.
        ValueError: it reads no text, or does not generate any (masked language models, classifiers).
    """
    check_reads_text(model, argument)
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and not can_generate():
        raise ValueError(
            f"{argument}: got {type(model).__name__}, which does not generate text, expected a causal "
            "language model"
        )


def _check_one_stack(model: nn.Module, argument: str) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{argument}: got the encoder-decoder {type(model).__name__}, expected a causal language "
            "model"
        )


def _decoder(model: nn.Module) -> nn.Module:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    return decoder if isinstance(decoder, nn.Module) else model


def _outermost_lists(module: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every non-empty ModuleList below `module` that lies inside no other one."""
    if isinstance(module, nn.ModuleList):
        if len(module):
            yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_lists(child, f"{name}.{child_name}" if name else child_name)


def _size(modules: nn.ModuleList) -> tuple[int, int]:
    return len(modules), sum(p.numel() for p in modules.parameters())


def block_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The dense linears of a block by their names inside it, in the order of definition.

    Linears are `nn.Linear` and transformers' `Conv1D` (GPT-2), wherever they lie. Left out are packed
    ones, which hold no weight parameter, and the projections that `nn.MultiheadAttention` reads
    without calling them.
    """
    uncalled = uncalled_linears(block)
    return {
        name: module
        for name, module in find_linears(block).items()
        if module._parameters.get("weight") is not None and id(module) not in uncalled
    }


def run_on_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Run the decoder on windows of tokens, without a cache and without the head.

    Args:
        model: with or without data in its weights.
        tokens: int64 [n, seq_len].

    Raises:
        ValueError: the model does not run on tokens alone.
    """
    body = getattr(model, "base_model", model)  # spares the head, whose output nobody needs
    parameter = next(model.parameters())
    tokens = tokens.to(parameter.device)
    try:
        if not tokens.is_meta:
            body(input_ids=tokens, use_cache=False)
            return
        # Without a mask, transformers looks whether positions repeat, and there is nothing to look at;
        # but not every model takes a ready mask.
        n, size = tokens.shape
        mask = torch.ones(n, 1, size, size, dtype=torch.bool, device="meta")
        try:
            body(input_ids=tokens, attention_mask=mask, use_cache=False)
        except Exception:  # models raise what they like
            body(input_ids=tokens, use_cache=False)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"model: got {type(model).__name__}, which does not run on tokens alone ({error}), expected "
            "a causal language model"
        ) from error


def cache_name(model: nn.Module) -> str:
    """What the model calls its cache, as an argument and in its output: transformers 5.24 renamed it."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def context_length(model: nn.Module) -> int | None:
    """Longest window, in tokens, that the model was built for; None if it sets no limit."""
    config = text_config(model)
    # GPT-2's name is n_positions; its config answers to both.
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of rows of the model's token embedding; None if it cannot be told."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    if get_embeddings is None:
        return None
    weight = getattr(get_embeddings(), "weight", None)
    return int(weight.shape[0]) if weight is not None else None


def text_config(model: nn.Module) -> Any:
    """The part of the model's config that describes its decoder; None if it has no config."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    return config if get_text_config is None else get_text_config()


@contextmanager
def float32_parameters(model: nn.Module) -> Iterator[None]:
    """Every parameter in float32, to be trained; its own dtype afterwards.

    Buffers keep theirs: those of rotary embeddings are of 32 bits for a reason.
    """
    dtypes = [(p, p.dtype) for p in model.parameters() if p.is_floating_point()]
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for every module of `model`, each one's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

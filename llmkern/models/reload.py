"""What becomes of a model that is saved and read again, found in memory: no file is written.

The plain class is given the config as its file will hold it and the model's own tensors, uncopied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.models.blocks import evaluation_mode, vocabulary_size
from llmkern.models.calls import same_values
from llmkern.models.linears import find_linears
from llmkern.models.resize import class_with_widths

_TOKENS = 32


def can_reload(model: nn.Module) -> bool:
    """Whether `reloaded` serves a model: one of transformers, with data, none of its layers packed."""
    dense = all(m._parameters.get("weight") is not None for m in find_linears(model).values())
    data = not any(p.is_meta for p in model.parameters())
    return dense and data and hasattr(type(model), "from_pretrained")


def reloaded(
    model: Any, config: Any, rename: Callable[[str], str | None] = lambda name: name
) -> nn.Module:
    """The model that plain transformers reads from `config` and the tensors of `model`, which it shares.

    Args:
        model: see `can_reload`.
        config: as it will be saved.
        rename: the name of a tensor there; None where it is left out.

    Raises:
        ValueError: it cannot be built; tensors are missing, left over, or of another shape (named).
    """
    tensors = {rename(name): tensor for name, tensor in model.state_dict().items()}
    tensors.pop(None, None)
    device = next(model.parameters()).device
    read = type(config).from_dict(copy.deepcopy(config.to_dict()))
    name = type(model).__name__
    try:
        with _quiet_transformers():
            made, info = class_with_widths(type(model), read).from_pretrained(
                None,
                config=read,
                state_dict=tensors,
                dtype=model.dtype,
                attn_implementation=getattr(config, "_attn_implementation", None),
                ignore_mismatched_sizes=True,  # named below
                output_loading_info=True,
            )
    except Exception as error:  # model classes raise what they like
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be built: {reason}") from error
    # A buffer that the class never had was put there by hand; it is none the worse for the change.
    own = {rename(buffer) for buffer, _ in model.named_buffers()}
    for what in ("missing", "unexpected", "mismatched"):
        names = {str(k[0]) if isinstance(k, tuple) else str(k) for k in info[f"{what}_keys"]}
        odd = sorted(names - own if what == "unexpected" else names)
        if odd:
            raise ValueError(f"{name} finds {what} tensors: {', '.join(odd[:3])}")
    # In their own dtypes: reading casts all to one, which is no other function. Those that are computed
    # were rounded with the rest, if the model was cast as a whole.
    made.load_state_dict(tensors, strict=False, assign=True)
    dtypes = {rename(buffer): tensor.dtype for buffer, tensor in model.named_buffers()}
    for buffer, tensor in made.named_buffers():
        tensor.data = tensor.data.to(dtypes.get(buffer, tensor.dtype))
    return made.to(device).eval()  # type: ignore[no-any-return]


def check_reload(model: Any) -> None:
    """Refuse a model that would compute something else once it is saved and read.

    Raises:
        ValueError: says what would be different.
    """
    if not can_reload(model):
        return
    with torch.no_grad(), evaluation_mode(model):
        wanted = logits(model)
        try:
            same = same_values(logits(reloaded(model, model.config)), wanted)
        except ValueError as error:
            raise ValueError(_refusal(model, str(error))) from error
        if not same:
            raise ValueError(_refusal(model, "its logits would be others"))


def _refusal(model: nn.Module, why: str) -> str:
    return (
        f"model: got a {type(model).__name__} that is another once it is saved and read, expected the "
        f"same: {why}"
    )


def logits(model: Any, **options: Any) -> Tensor:
    """Of a few tokens, with the model's own defaults or with `options` of its forward."""
    tokens = torch.arange(_TOKENS, device=next(model.parameters()).device)
    output = model(input_ids=tokens[None] % (vocabulary_size(model) or _TOKENS), **options)
    values: Tensor = output[0]
    return values


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars, and no lines about what is found by name here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]

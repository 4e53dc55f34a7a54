"""Whether the logits of two models are about the same tokens, and which of them are padding."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmkern.models.blocks import vocabulary_size


def logits_width(model: nn.Module) -> int | None:
    """Logits that a causal language model makes; None if it cannot be told."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    width = getattr(head, "out_features", None)
    return vocabulary_size(model) if width is None else int(width)


def known_tokens(tokenizer: Any) -> int:
    """Tokens of a tokenizer, those that were added and gaps between them included."""
    return 1 + max(map(int, tokenizer.get_vocab().values()), default=-1)


def shared_vocabulary(
    sizes: tuple[int | None, int | None],
    tokenizers: tuple[Any, Any],
    names: tuple[str, str],
    argument: str = "tokenizer",
) -> int | None:
    """First tokens of two tables of embeddings that both have, where the tables differ in size.

    A table may be padded to a rounder size. What is beyond the tokenizer's own tokens in either is
    padding then, and counts for nothing.

    Args:
        sizes: logits of the two models.
        tokenizers: theirs, as far as they are known; one alone is that of both.
        names: of the arguments that gave the models.
        argument: that gave the first tokenizer.

    Returns:
        Their number; None for tables of one size, all of which counts.

    Raises:
        ValueError: different tokenizers, or sizes that none says to be padding.
    """
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if len(known) == 2 and known[0] is not known[1]:
        mine, theirs = (tokenizer.get_vocab() for tokenizer in known)
        if mine != theirs:
            odd = next(t for t in {**theirs, **mine} if mine.get(t) != theirs.get(t))
            raise ValueError(
                f"{argument}: got another vocabulary than the {names[1]}'s ({odd!r} is "
                f"{mine.get(odd)} in one and {theirs.get(odd)} in the other), expected the same: "
                "logits are compared"
            )
    if sizes[0] == sizes[1]:
        return None
    text = (
        f"{names[0]}: got a vocabulary of {sizes[0]}, expected the {names[1]}'s, {sizes[1]}: logits "
        "are compared"
    )
    if not known or None in sizes:
        raise ValueError(f"{text} (if the larger is only padded: with the tokenizer of both)")
    tokens, smaller = known_tokens(known[0]), min(size for size in sizes if size is not None)
    if tokens > smaller:
        raise ValueError(
            f"{text}, or both at least the {tokens} tokens of the tokenizer, beyond which they are padded"
        )
    return tokens

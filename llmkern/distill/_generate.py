"""Sampling of continuations: in batches, with a cache of keys and values, by random numbers given.

A token is found by the inverse of the cumulative distribution at a number that belongs to its row and
position, so that a row's text depends neither on its neighbours nor on what was drawn before.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern.models import cache_name, context_length, evaluation_mode, vocabulary_size


@dataclass(frozen=True)
class SamplingOptions:
    """How continuations are drawn.

    Attributes:
        max_new_tokens: most tokens of a continuation.
        sample_temperature: of the softmax that tokens are drawn from; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that have at least this probability together, in (0, 1].
    """

    max_new_tokens: int = 128
    sample_temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {self.max_new_tokens}, expected at least 1")
        if not self.sample_temperature >= 0:
            raise ValueError(
                f"sample_temperature: got {self.sample_temperature}, expected at least 0"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected a probability in (0, 1]")


class Sampled(NamedTuple):
    """Prompts with their continuations, padded on the right.

    Attributes:
        input_ids: int64 [B, T].
        attention_mask: int64 [B, T], 0 for padding.
        labels: int64 [B, T], the tokens that were drawn (with the one that ends a row), else -100.
        log_probs: float32 [B, T], log of the probability with which each of them was drawn, else 0.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    log_probs: Tensor


class Mixture(NamedTuple):
    """A second model that is drawn from: with probability `share` at each token."""

    model: Any
    share: float


def seeded_uniforms(count: int, *key: object) -> Tensor:
    """float32 [count] in [0, 1): always the same for the same key."""
    # torch's generator on the CPU takes 32 bits of a seed, so all of the key must go into them.
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(count, generator=generator)


def stop_tokens(model: Any, tokenizer: Any = None) -> list[int]:
    """Tokens that end a text, by the model's and the tokenizer's settings."""
    settings = getattr(model, "generation_config", None) or model.config
    found = getattr(settings, "eos_token_id", None)
    ends = list(found) if isinstance(found, (list, tuple)) else [found]
    ends.append(getattr(tokenizer, "eos_token_id", None))
    return sorted({int(token) for token in ends if token is not None})


def check_room(
    lengths: Sequence[int], max_new_tokens: int, models: Sequence[Any], argument: str
) -> None:
    """Refuse prompts that leave no room for an answer.

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: tokens of the longest answer.
        models: that read both.
        argument: where the prompts come from.

    Raises:
        ValueError: an empty prompt, or a prompt and an answer that are longer than a model's context.
    """
    contexts = [length for model in models if (length := context_length(model)) is not None]
    for i, length in enumerate(lengths):
        if not length:
            raise ValueError(f"{argument}: got a prompt of no tokens (number {i}), expected some")
        if contexts and length + max_new_tokens > min(contexts):
            raise ValueError(
                f"{argument}: got {length} tokens in prompt number {i}, expected at most "
                f"{min(contexts) - max_new_tokens}: the model's context of {min(contexts)} less "
                f"max_new_tokens = {max_new_tokens}"
            )


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    options: SamplingOptions,
    ends: Sequence[int] = (),
    mixture: Mixture | None = None,
    vocabulary: int | None = None,
) -> Sampled:
    """Continue each prompt.

    Args:
        model: a transformers causal language model; dropout is off meanwhile.
        prompts: token ids of each, at least one.
        uniforms: float [B, max_new_tokens] in [0, 1): what each token is drawn with.
        options: how.
        ends: tokens after which a row is complete.
        mixture: also draw from another model of the same tokens.
        vocabulary: draw from the first tokens only, which both models have; None: from all.

    Returns:
        `Sampled`, on the model's device.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    pad = ends[0] if ends else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    V = vocabulary or vocabulary_size(model)
    stops = torch.tensor(list(ends), device=device, dtype=torch.int64)
    log_probs = torch.zeros_like(ids, dtype=torch.float32)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with ExitStack() as stack:
        readers = [_Reader(model)] if mixture is None else [_Reader(model), _Reader(mixture.model)]
        for reader in readers:
            stack.enter_context(evaluation_mode(reader.model))
        fed = ids
        for i in range(options.max_new_tokens):
            logits = [reader(fed, mask)[:, :V].to(device) for reader in readers]
            share = 0.0 if mixture is None else mixture.share
            token, log_prob = draw(logits, uniforms[:, i].to(device), options, share)
            fed = torch.where(done, pad, token)[:, None]
            ids, mask = torch.cat([ids, fed], 1), torch.cat([mask, (~done).long()[:, None]], 1)
            log_probs = torch.cat([log_probs, torch.where(done, 0, log_prob)[:, None]], 1)
            done |= torch.isin(token, stops)
            if bool(done.all()):
                break
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :longest] = -100
    shift = longest - torch.tensor([len(p) for p in prompts], device=device)
    places = (torch.arange(ids.shape[1], device=device) + shift[:, None]) % ids.shape[1]
    return Sampled(*(t.gather(1, places) for t in (ids, mask, labels, log_probs)))


def draw(
    logits: Sequence[Tensor], uniforms: Tensor, options: SamplingOptions, share: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One token of each row and the log of its probability.

    Args:
        logits: float [B, V] of the model, and of the one that it is mixed with, if any.
        uniforms: float [B] in [0, 1).
        options: how.
        share: weight of the second distribution.

    Returns:
        int64 [B] and float32 [B].
    """
    p = _distribution(logits[0], options)
    if len(logits) > 1:
        p = (1 - share) * p + share * _distribution(logits[1], options)
    sums = p.cumsum(-1)
    # The largest number below 1 in float32 times the sum in float64 stays below the sum.
    token = torch.searchsorted(sums, uniforms.double()[:, None] * sums[:, -1:], right=True)
    return token[:, 0], p.gather(1, token).log()[:, 0].float()


def _distribution(logits: Tensor, options: SamplingOptions) -> Tensor:
    """float64 [B, V]."""
    if options.sample_temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    p = (logits.double() / options.sample_temperature).softmax(-1)
    if options.top_p < 1:
        values, order = p.sort(stable=True, dim=-1, descending=True)
        values = values.masked_fill(values.cumsum(-1) - values >= options.top_p, 0)
        p = torch.zeros_like(p).scatter(-1, order, values)
        p /= p.sum(-1, keepdim=True)
    return p


class _Reader:
    """A model that reads rows piece by piece, from its cache where it has one."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known = inspect.signature(model.forward).parameters
        self._cache: Any = None
        self._ids: Tensor | None = None

    def __call__(self, new: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, V] after the new tokens [B, n]; mask [B, T] covers all read so far."""
        device = next(self.model.parameters()).device
        new, mask = new.to(device), mask.to(device)
        self._ids = new if self._ids is None else torch.cat([self._ids, new], 1)
        fed = self._ids if self._cache is None else new
        extra: dict[str, Any] = {"use_cache": True, "attention_mask": mask}
        name = cache_name(self.model)
        if self._cache is not None:
            extra[name] = self._cache
        if "position_ids" in self._known:
            extra["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        if "logits_to_keep" in self._known:
            extra["logits_to_keep"] = 1
        out = self.model(input_ids=fed, **extra)
        self._cache = getattr(out, name, None)
        logits: Tensor = out.logits[:, -1]
        return logits

"""Quality, size and speed of a causal language model, against a reference where there is one.

perplexity      exp of the mean negative log-likelihood of each token given those before it in its
                window; windows do not overlap, so a window of T tokens gives T - 1 of them
kl              mean over the same positions of KL(reference || model), in nats
top1_agreement  fraction of them where both find the same token most likely

The figures of a broken model are figures too: a perplexity beyond float64, and a KL where the model rules
out what the reference does not, are inf; logits of NaN make NaN, and agree with nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern._dtypes import dtype_name
from llmkern._progress import Bar
from llmkern.calibrate.data import Source, load_tokens, teller
from llmkern.evaluate.speed import speeds, weight_bytes
from llmkern.models import computing_in, evaluation_mode, vocabulary_size, whole_dtypes
from llmkern.models.vocabulary import shared_vocabulary
from llmkern.reference.kd_loss import kl_rows

# Logits are turned into float32 log-probabilities this many elements at a time (64 MiB).
_CHUNK = 1 << 24
# A reference's logits take no more memory than this while other work goes on.
_KEPT = 1 << 30


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        perplexity: of the tokens that were predicted.
        kl: mean KL divergence per token from the reference, in nats; None without a reference.
        top1_agreement: fraction of tokens where the reference's most likely token is the model's;
            None without a reference.
        weight_bytes: bytes of all weights as they are held; tied weights count once.
        prefill_tokens_per_s: one window, batch 1, median; None if speed was not asked for.
        decode_tokens_per_s: greedy decoding with a cache, batch 1, median; None likewise.
        tokens: tokens that were fed in, windows * window.
        window: tokens per window.
        compute_dtype: that logits were computed in.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    weight_bytes: int
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    tokens: int
    window: int
    compute_dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, the protocol apart."""
        fields = asdict(self)
        protocol = {name: fields.pop(name) for name in ("tokens", "window", "compute_dtype")}
        return {**fields, "protocol": protocol}


def evaluate(
    model: nn.Module,
    data: Source,
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    text_field: str | None = None,
    reference: nn.Module | None = None,
    reference_tokenizer: Any = None,
    batch_size: int = 4,
    speed: bool = True,
    compute_dtype: str = "auto",
    kept: dict[bytes, Tensor] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure `model` on `data`.

    The reference's logits are computed batch by batch, and kept only where `kept` asks for it.

    Args:
        model: a causal language model, compressed or not.
        data: tokens or text, see `llmkern.calibrate.data`; of a dataset, its first 4096 windows.
        tokenizer: needed for text.
        seq_len: tokens per window; by default a tensor's own width, else 512.
        text_field: field of the data's rows that holds their text; None chooses, and says which.
        reference: the model that `model` was made from, with the same tokenizer. Where their tables of
            embeddings differ in size, the KL and the agreement are those of the tokenizer's tokens.
        reference_tokenizer: the reference's, by default the model's. If given, checked to be the same.
        batch_size: windows per forward.
        speed: measure prefill and decoding too, in the model's own dtype.
        compute_dtype: that logits are computed in; "auto": float32 where the processor multiplies the
            model's own dtype slowly and there is memory for a copy, else its own.
        kept: the reference's logits by the bytes of the tokens, read and filled as far as memory allows:
            for several models beside one reference. The caller drops it.
        progress: say on standard error how far it is.

    Raises:
        ValueError: bad data (see `llmkern.calibrate.load_tokens`), or a reference with another
            vocabulary.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    windows = load_tokens(
        data,
        model,
        tokenizer,
        seq_len=seq_len,
        text_field=text_field,
        said=teller(shown=progress),
    )
    models = [model] if reference is None else [model, reference]
    shared = _sharing(windows, (reference_tokenizer, tokenizer))
    if reference is not None:
        theirs, mine = vocabulary_size(reference), vocabulary_size(model)
        if theirs is not None and mine is not None:
            shared(theirs, mine)  # before anything is computed
    totals = torch.zeros(3, dtype=torch.float64)
    dtypes = whole_dtypes(models, compute_dtype)
    batches = torch.split(windows, batch_size)
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(models[-1]):
        with (
            computing_in(model, dtypes[0]),
            computing_in(models[-1], dtypes[-1]),
            Bar("evaluate", len(batches), "batch", shown=progress) as bar,
        ):
            for batch in batches:
                logits, other = next_token_logits(model, batch), None
                if reference is not None:
                    other = _logits_of_reference(reference, batch, len(batches), kept)
                totals += _score(logits, batch, shared, other)
                bar.update()
        rates = speeds(model, windows[:1]) if speed else (None, None)
    predicted = len(windows) * (windows.shape[1] - 1)
    nll, kl, agreed = (totals / predicted).tolist()
    return Evaluation(
        perplexity=_exp(nll),
        kl=None if reference is None else kl,
        top1_agreement=None if reference is None else agreed,
        weight_bytes=weight_bytes(model),
        prefill_tokens_per_s=rates[0],
        decode_tokens_per_s=rates[1],
        tokens=windows.numel(),
        window=windows.shape[1],
        compute_dtype=dtype_name(dtypes[0]),
    )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _sharing(windows: Tensor, tokenizers: tuple[Any, Any]) -> Callable[[int, int], int | None]:
    """From the sizes of the reference's and the model's tables to `shared_vocabulary`."""

    @functools.cache
    def shared(theirs: int, mine: int) -> int | None:
        names, argument = ("reference", "model"), "reference_tokenizer"
        vocabulary = shared_vocabulary((theirs, mine), tokenizers, names, argument)
        largest = int(windows.max())
        if vocabulary is not None and largest >= vocabulary:
            raise ValueError(
                f"data: got token {largest}, expected tokens below {vocabulary}, those of the "
                "tokenizer: what is beyond is padding of a model's table"
            )
        return vocabulary

    return shared


def _logits_of_reference(
    reference: nn.Module, batch: Tensor, batches: int, kept: dict[bytes, Tensor] | None
) -> Tensor:
    """`next_token_logits`, computed once where there is room for those of all batches."""
    if kept is None:
        return next_token_logits(reference, batch)
    key = batch.cpu().numpy().tobytes()
    if key in kept:
        return kept[key]
    logits = next_token_logits(reference, batch)
    if batches * logits.nbytes < _KEPT:
        kept[key] = logits.cpu()
    return logits


def _score(
    logits: Tensor,
    batch: Tensor,
    shared: Callable[[int, int], int | None],
    other: Tensor | None,
) -> Tensor:
    """Sums over a batch's predictions, see `score_logits`."""
    if other is None:
        return score_logits(logits, batch)
    return score_logits(logits, batch, other, shared(other.shape[-1], logits.shape[-1]))


def next_token_logits(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits [B * (T - 1), V] of every token of int64 [B, T] that has a successor in its window."""
    output = model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        kind = type(model).__name__
        raise ValueError(f"model: got {kind}, which gives no logits, expected a language model")
    return logits[:, :-1].flatten(0, 1)


def score_logits(
    logits: Tensor, batch: Tensor, reference: Tensor | None = None, vocabulary: int | None = None
) -> Tensor:
    """Sums over a batch's predictions: negative log-likelihood, KL, agreements; float64 [3].

    Args:
        logits: [B * (T - 1), V], as `next_token_logits` gives them.
        batch: int64 [B, T], the tokens.
        reference: logits of the same shape; without them, KL and agreements are 0.
        vocabulary: first tokens of which KL and agreements are, for tables that are padded; None: all.
    """
    targets = batch[:, 1:].flatten().to(logits.device)
    sums = torch.zeros(3, dtype=torch.float64)
    rows = max(1, _CHUNK // logits.shape[-1])
    for i in range(0, len(logits), rows):
        chunk = logits[i : i + rows].float().log_softmax(-1)
        sums[0] -= chunk.gather(1, targets[i : i + rows, None]).double().sum().cpu()
        if reference is not None:
            want = reference[i : i + rows, :vocabulary].to(chunk.device).float().log_softmax(-1)
            if vocabulary is not None:
                chunk = logits[i : i + rows, :vocabulary].float().log_softmax(-1)
            kl = kl_rows(want, chunk)
            agree = (want.argmax(-1) == chunk.argmax(-1)) & ~kl.isnan()
            sums[1] += kl.double().sum().cpu()
            sums[2] += agree.sum().cpu()
    return sums

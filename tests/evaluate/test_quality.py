"""Perplexity, KL and agreement against independent computations; bytes as they are held."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern import evaluate as evaluate_function
from llmkern import quantize
from llmkern._dtypes import dtype_name
from llmkern.evaluate import evaluate, quality, weight_bytes

VOCAB = 96


tiny = partial(tiny_models.tiny, initializer_range=0.2)


class Table(nn.Module):
    """A model that gives the same logits after a token, whatever stood before it."""

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.logits = nn.Embedding.from_pretrained(probabilities.log())

    def get_input_embeddings(self) -> nn.Embedding:
        return self.logits

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits(input_ids))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (5, 16))


def test_the_function_stands_at_the_top_of_the_package() -> None:
    assert evaluate_function is evaluate is llmkern.evaluate


def test_values_computed_by_hand() -> None:
    """Tokens 0 1 1: predicted 1 after 0, 1 after 1; the last token's prediction counts for nothing."""
    model = Table(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    reference = Table(torch.tensor([[0.25, 0.75], [0.25, 0.75]]))
    data = torch.tensor([[0, 1, 1]])
    result = evaluate(model, data, reference=reference, speed=False)
    assert result.perplexity == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.75)) / 2))
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert result.kl == pytest.approx(
        kl / 2
    )  # the second position has the reference's distribution
    assert result.top1_agreement == 0.5  # after 0 the model's tie goes to the first token
    assert (result.tokens, result.window) == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_and_kl_equal_an_independent_computation(
    tokens: Tensor, batch_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_CHUNK", 7 * VOCAB)  # chunks that end inside a window
    model, reference = tiny().to(dtype), tiny().to(dtype)
    own = {"compute_dtype": dtype_name(dtype)}
    result = evaluate(model, tokens, reference=reference, batch_size=batch_size, speed=False, **own)
    with torch.no_grad():
        p, q = (m(input_ids=tokens).logits[:, :-1].double() for m in (reference, model))
    nll = F.cross_entropy(q.flatten(0, 1), tokens[:, 1:].flatten())
    assert math.log(result.perplexity) == pytest.approx(float(nll), rel=1e-5)
    kl = F.kl_div(
        q.log_softmax(-1).flatten(0, 1),
        p.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    assert result.kl == pytest.approx(float(kl), rel=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agreement))


def test_model_against_itself_is_no_different(tokens: Tensor) -> None:
    model = tiny()
    result = evaluate(model, tokens, reference=model, speed=False)
    assert result.kl == 0
    assert result.top1_agreement == 1


def test_without_a_reference_there_is_no_kl(tokens: Tensor) -> None:
    result = evaluate(tiny(), tokens, speed=False)
    assert result.kl is None
    assert result.top1_agreement is None
    assert result.prefill_tokens_per_s is None
    assert result.decode_tokens_per_s is None


def test_report_is_ready_for_json(tokens: Tensor) -> None:
    fields = evaluate(tiny(), tokens, speed=True).to_dict()
    assert set(fields) == {
        "perplexity",
        "kl",
        "top1_agreement",
        "weight_bytes",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "protocol",
    }
    assert fields["protocol"] == {"tokens": 80, "window": 16, "compute_dtype": "float32"}
    assert fields["prefill_tokens_per_s"] > 0
    assert fields["decode_tokens_per_s"] > 0


def test_quantized_model_decodes_with_its_cache(tokens: Tensor) -> None:
    model = tiny()
    reference = copy.deepcopy(model)
    quantize(model, "rtn", group_size=32)
    result = evaluate(model, tokens, reference=reference)
    assert result.kl is not None
    assert 0 < result.kl < 1
    assert result.decode_tokens_per_s is not None


def test_modes_are_left_as_they_were(tokens: Tensor) -> None:
    model = tiny().train()
    model.lm_head.eval()
    evaluate(model, tokens, reference=tiny(), speed=False)
    assert model.training
    assert model.model.training
    assert not model.lm_head.training


def test_bytes_of_plain_weights_count_tied_ones_once() -> None:
    for tied in (False, True):
        model = tiny(tie_word_embeddings=tied)
        embedding = VOCAB * 64
        rest = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
        rest -= 0 if tied else embedding
        assert weight_bytes(model) == 4 * (rest + (1 if tied else 2) * embedding)


@pytest.mark.parametrize("run", [False, True], ids=["as_loaded", "after_a_forward"])
def test_packed_weights_count_as_packed(tokens: Tensor, run: bool) -> None:
    # Outputs in multiples of 64, so that no kernel layout needs to pad them.
    model = tiny(tie_word_embeddings=True, num_key_value_heads=4)
    quantize(model, "rtn", group_size=32)
    if run:
        model(input_ids=tokens)
    linears = [64 * 64, 64 * 64, 64 * 64, 64 * 64, 64 * 128, 64 * 128, 128 * 64]
    packed = sum(n // 2 + n // 32 * 4 for n in linears)
    rest = 4 * (VOCAB * 64 + 64 + 2 * 2 * 64)  # embedding and norms
    # Each layer also keeps its shape, two int64.
    assert weight_bytes(model) == 2 * (packed + 7 * 16) + rest


class Broken(Table):
    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits(input_ids) * torch.nan)


HALF = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (Table(HALF), torch.ones(0, 4, dtype=torch.int64), {}, "data: got no tokens"),
        (Table(HALF), torch.full((1, 4), 2), {}, "data: got token 2, expected .* less than 2"),
        (Table(HALF), "some text", {}, "tokenizer: got None"),
        (Table(HALF), torch.ones(2, 4, dtype=torch.int64), {"batch_size": 0}, "batch_size: got 0"),
        (
            Table(HALF),
            torch.ones(2, 4, dtype=torch.int64),
            {"reference": Table(torch.full((2, 3), 0.5))},
            "reference: got a vocabulary of 3, expected the model's, 2",
        ),
    ],
    ids=["no_tokens", "vocabulary", "tokenizer", "batch_size", "reference"],
)
def test_bad_requests_are_named(
    model: nn.Module, data: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, speed=False, **options)


def test_a_broken_model_has_figures_too() -> None:
    data, good = torch.tensor([[0, 1, 1]]), Table(HALF)
    broken = evaluate(Broken(HALF), data, reference=good, speed=False)
    assert math.isnan(broken.perplexity)
    assert broken.kl is not None
    assert math.isnan(broken.kl)
    assert broken.top1_agreement == 0
    assert evaluate(Broken(HALF), data, reference=Broken(HALF), speed=False).top1_agreement == 0
    sure = Table(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    ruled_out = evaluate(sure, data, reference=good, speed=False)
    assert ruled_out.perplexity == ruled_out.kl == math.inf
    far = Table(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    far.logits.weight.data[:, 1] = -1e4  # exp overflows in float64
    assert evaluate(far, data, speed=False).perplexity == math.inf


def test_the_cache_goes_by_the_name_that_the_model_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    # Under its old name transformers takes it, too, but warns.
    model, used = tiny(), set()
    forward = model.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        used.update(kwargs)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    evaluate(model, torch.randint(0, VOCAB, (1, 48)))
    known = inspect.signature(forward).parameters
    assert ({"cache", "past_key_values"} & used) == ({"cache", "past_key_values"} & set(known))


@pytest.mark.parametrize("room", [1 << 30, 100])
def test_the_reference_runs_once_for_several_models(
    tokens: Tensor, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_KEPT", room)
    reference, calls = tiny(), []
    reference.register_forward_pre_hook(lambda *args: calls.append(1))
    model, kept = tiny(), {}
    alone = evaluate(model, tokens, reference=reference, batch_size=2, speed=False)
    calls.clear()
    for _ in range(2):
        again = evaluate(model, tokens, reference=reference, batch_size=2, speed=False, kept=kept)
        assert again == alone
    assert len(calls) == (3 if room > 100 else 6)


def test_kept_logits_are_those_of_their_tokens(tokens: Tensor) -> None:
    model, reference, kept = tiny(), tiny(), {}
    settings = {"reference": reference, "batch_size": 2, "speed": False}
    evaluate(model, tokens, kept=kept, **settings)
    other = tokens.roll(1, 0)
    assert evaluate(model, other, kept=kept, **settings) == evaluate(model, other, **settings)

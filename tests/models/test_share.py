"""What a compression leaves as it was, in one sentence."""

import torch

import llmkern
from llmkern.models import left_share
from tests.helpers.tiny_models import tiny


def test_parts_add_up_and_packed_layers_count_as_their_weights():
    model = tiny("llama", tie_word_embeddings=False)
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    report = llmkern.quantize(model, "rtn", group_size=32)
    said = report.notes[-1]
    assert said == left_share(model, [line.name for line in report.layers])
    share = (total - inside) / total
    assert said.startswith(
        f"{total - inside:,} of {total / 1e6:.1f} M parameters ({share:.1%})"
    ) or (said.startswith(f"{total - inside:,} of {total:,} parameters ({share:.1%})"))
    assert "embeddings 6,144" in said
    assert "head 6,144" in said
    assert "norms, biases and others 320" in said


def test_tied_weights_count_once_and_experts_are_named():
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True)
    report = llmkern.prune(model, "magnitude", sparsity=0.5)
    said = report.notes[-1]
    assert "experts" in said
    assert "embeddings 6,144" in said
    assert "head" not in said
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()

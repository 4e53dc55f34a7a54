"""2:4 sparse models: found by accelerate, saved as plain ones, found again with the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmkern
from llmkern import IntLinear, Sparse24Int4Linear, Sparse24Linear
from llmkern.evaluate import weight_bytes
from llmkern.hf import accelerate_sparse


def prune(model: nn.Module, skip: str = "lm_head") -> None:
    """Zero the two smallest of every 4 weights of each linear."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and skip not in name:
            groups = module.weight.data.view(len(module.weight), -1, 4)
            groups.scatter_(2, groups.abs().topk(2, 2, largest=False).indices, 0)


def kinds(model: nn.Module) -> dict[str, type]:
    return {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_model_runs_sparse_and_comes_back_bit_for_bit(llama, tokens, tmp_path, dtype):
    model = llama(dtype=dtype)
    prune(model)
    with torch.no_grad():
        dense = model(tokens).logits
    assert llmkern.accelerate(model) is model
    sparse = [name for name, kind in kinds(model).items() if kind is Sparse24Linear]
    assert len(sparse) == 14
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad():
        logits = model(tokens).logits
    assert (logits - dense).abs().max() <= 0.02 * dense.abs().max()
    llmkern.save(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert set(kinds(plain).values()) == {nn.Linear}
    assert not hasattr(plain.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, dense)
    again = llmkern.accelerate(llmkern.load(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, logits)
    assert llmkern.accelerate(again) is again


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_model_runs_sparse_and_comes_back_bit_for_bit(llama, tokens, tmp_path, symmetric):
    model = llama()
    prune(model)
    llmkern.patch(model, llmkern.QuantFormat(4, 64, symmetric))
    with torch.no_grad():
        dense = model(tokens).logits
    found = accelerate_sparse(model)
    assert len(found.codes) == 14
    assert not found.floats
    assert str(found).startswith("14 of 15 linear layers are 2:4 sparse (14 of 4-bit codes)")
    with torch.no_grad():
        logits = model(tokens).logits
    assert (logits - dense).abs().max() <= 0.02 * dense.abs().max()
    llmkern.save(model, tmp_path / "out")
    again = llmkern.load(tmp_path / "out")
    assert {kind for n, kind in kinds(again).items() if n != "lm_head"} == {IntLinear}
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, dense)
    llmkern.accelerate(again)
    assert {k for n, k in kinds(again).items() if n != "lm_head"} == {Sparse24Int4Linear}
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, logits)


def test_plain_and_shared_and_half_empty_weights_stay_dense(llama):
    model = llama(tie_word_embeddings=True)
    prune(model, skip="q_proj")
    groups = model.lm_head.weight.data.view(128, -1, 4)
    groups[..., :2] = 0
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data.fill_(1)
    mlp.up_proj.weight.data[:, ::4] = 0
    found = accelerate_sparse(model)
    assert "lm_head" not in found.floats
    assert "model.layers.0.mlp.up_proj" not in found.floats
    assert not any("q_proj" in name for name in found.floats)
    assert len(found.floats) == 11


def test_model_without_anything_to_accelerate_is_refused(llama):
    with pytest.raises(ValueError, match="or 2:4 sparse weights"):
        llmkern.accelerate(llama())


def test_patch_leaves_sparse_layers(llama):
    model = llama()
    prune(model)
    llmkern.accelerate(model)
    report = llmkern.patch(model, llmkern.QuantFormat(4, 64))
    assert not report.replaced
    assert report.left["model.layers.0.mlp.up_proj"] == "already packed"


def test_weights_in_use_take_less_than_six_tenths_of_dense_ones():
    # Wide enough for huge pages, and past the first forward pass, which repacks.
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=2688,
        num_hidden_layers=1,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    prune(model)
    dense = weight_bytes(model)
    llmkern.accelerate(model)
    with torch.no_grad():
        model(torch.arange(5)[None])
    assert weight_bytes(model) <= 0.6 * dense

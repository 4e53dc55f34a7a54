"""Each parameter and buffer keeps its own dtype and value through every verb, and in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config

import llmkern

TOKENS = torch.arange(4 * 16).view(4, 16) % 96
# One number in bfloat16.
PRECISE = torch.tensor([0.501, 0.5017, 0.5003, 0.5011])


def deepseek_v3() -> Any:
    config = DeepseekV3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.data = PRECISE.clone()
    return model


def head_in_float32() -> Any:
    """And the norm before it, so that its input is."""
    model = tiny(num_hidden_layers=4).to(torch.bfloat16)
    model.model.norm.weight.data = 1 + torch.rand(64) / 1000
    model.lm_head.float()
    return model


def with_buffers() -> Any:
    """Buffers of three dtypes in a module of a block."""
    model = tiny(num_hidden_layers=2).to(torch.bfloat16)
    mlp = model.model.layers[1].mlp
    mlp.register_buffer("steps", torch.tensor([2**24 + 1, 3]))
    mlp.register_buffer("offsets", PRECISE.clone())
    mlp.register_buffer("mask", torch.tensor([True, False]))
    return model


MODELS = {
    "deepseek_v3": deepseek_v3,
    "head_in_float32": head_in_float32,
    "buffers": with_buffers,
}


def data(**options: Any) -> dict[str, Any]:
    return {"calibration": TOKENS, "batch_size": 2, **options}


def distilled(model: Any) -> None:
    llmkern.distill(model, tiny(), data=TOKENS, steps=1, lr=1e-9, batch_size=2)


VERBS = {
    "rtn": lambda m: llmkern.quantize(m, "rtn", group_size=16),
    "gptq": lambda m: llmkern.quantize(m, "gptq", group_size=16, **data()),
    "nf4": lambda m: llmkern.quantize(m, "nf4"),
    "magnitude": lambda m: llmkern.prune(m, "magnitude", sparsity=0.5),
    "sparsegpt": lambda m: llmkern.prune(m, "sparsegpt", sparsity=0.5, **data()),
    "wanda": lambda m: llmkern.prune(m, "wanda", pattern="2:4", **data()),
    "depth": lambda m: llmkern.prune(m, "depth", blocks=1, **data()),
    "recovery": lambda m: llmkern.prune(
        m, "mlp", ratio=0.25, recovery="full", recovery_steps=1, recovery_lr=1e-9, **data()
    ),
    "lora": lambda m: llmkern.prune(
        m, "mlp", ratio=0.25, recovery="lora", recovery_steps=1, recovery_lr=1e-9, **data()
    ),
    "distill": distilled,
}
# What the model does not have, and why.
LEFT_OUT = {
    ("deepseek_v3", "depth"),  # of two blocks the first and the last stay
    ("deepseek_v3", "recovery"),  # width of experts
    ("deepseek_v3", "lora"),
    ("buffers", "depth"),
}


def fine(model: Any) -> dict[str, Tensor]:
    """The vectors in a model's file that no verb here means to change: norms, buffers, router biases."""
    return {name: t.clone() for name, t in model.state_dict().items() if t.dim() == 1}


@pytest.mark.parametrize(
    ("name", "verb"),
    [(n, v) for n in MODELS for v in VERBS if (n, v) not in LEFT_OUT],
)
def test_each_tensor_keeps_its_dtype_and_value(name: str, verb: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    before = fine(model)
    assert len({tensor.dtype for tensor in before.values()}) > 1
    VERBS[verb](model)
    check(before, fine(model))
    llmkern.save(model, tmp_path / "out")
    files = (load_file(path) for path in (tmp_path / "out").glob("*.safetensors"))
    check(before, {key: tensor for file in files for key, tensor in file.items()})
    if name == "deepseek_v3":
        check(before, fine(llmkern.load(tmp_path / "out")))


def check(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    kept = {key: tensor for key, tensor in before.items() if key in after}
    assert len(kept) >= len(before) / 2
    for key, tensor in kept.items():
        assert after[key].dtype == tensor.dtype, key
        torch.testing.assert_close(after[key], tensor, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dtype_that_is_asked_for_leaves_what_the_class_keeps_in_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = deepseek_v3().float()
    model.save_pretrained(tmp_path / "model")
    loaded = llmkern.load(tmp_path / "model", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    for (name, a), (_, b) in zip(
        (*loaded.named_parameters(), *loaded.named_buffers()),
        (*plain.named_parameters(), *plain.named_buffers()),
        strict=True,
    ):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, PRECISE)

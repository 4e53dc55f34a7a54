"""Fewer neurons and heads: what can go, the right reason why not, widths that later stages hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import llmkern
from llmkern.models import find_blocks
from llmkern.pipeline import Distill, Pipeline, Prune, Quantize, compare
from llmkern.pipeline.preflight import check

VOCAB = 96
TOKENS = torch.arange(4 * 24).view(4, 24) * 7 % 80 + 3
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = COMMON | {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]], "hidden_size": 64}
NEO |= {"vocab_size": VOCAB, "max_position_embeddings": 64}
OPT = COMMON | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
FALCON = COMMON | {"max_position_embeddings": 64}
ONE_KEY = SIZES | {"num_key_value_heads": 1}
MPT = {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}

# Hazard -> method, model type, its config, parameters named so that become smaller.
WORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2_width_unset": ("mlp", "gpt2", GPT2),
    "gpt_neo_width_unset": ("mlp", "gpt_neo", NEO),
    "gpt_neo_width_set": ("mlp", "gpt_neo", NEO | {"intermediate_size": 128}),
    "gptj": ("mlp", "gptj", GPT2 | {"rotary_dim": 8}),
    "bigcode": ("mlp", "gpt_bigcode", GPT2),
    "opt": ("mlp", "opt", OPT),
    "gpt_neox": ("mlp", "gpt_neox", {k: v for k, v in SIZES.items() if "key" not in k}),
    "phi": ("mlp", "phi", SIZES),
    "falcon": ("mlp", "falcon", FALCON),
    "starcoder2": ("mlp", "starcoder2", SIZES),
    "one_key_for_all_queries": ("heads", "llama", ONE_KEY),
    "one_key_and_a_norm_per_head": ("heads", "qwen3", ONE_KEY | {"head_dim": 16}),
    "norm_per_head": ("heads", "qwen3", SIZES | {"head_dim": 16}),
    "one_key_in_one_matrix": ("heads", "phi3", ONE_KEY),
    "gemma_one_key": ("heads", "gemma", ONE_KEY | {"head_dim": 16}),
}
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
LATENT |= {"qk_rope_head_dim": 16, "v_head_dim": 16}
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "norm_over_all_heads": ("heads", "olmo2", SIZES, "q_norm normalises all heads together"),
    "norm_of_every_head": ("heads", "cohere", SIZES | {"use_qk_norm": True}, "q_norm"),
    "norms_in_a_list": ("heads", "stablelm", SIZES | {"qk_layernorm": True}, "layernorm|q_proj"),
    "property_without_setter": ("heads", "falcon", FALCON | GROUPED, "no setter"),
    "one_key_and_no_setter": ("heads", "falcon", FALCON, "no setter"),
    "queries_in_one_matrix": ("heads", "gpt_bigcode", GPT2, "query heads.*c_attn"),
    "size_of_heads_follows": ("heads", "gpt2", GPT2, "c_attn.weight would be"),
    "latent_keys": ("heads", "minicpm3", SIZES | LATENT, "latent vector"),
    "width_not_in_the_config": ("mlp", "bloom", COMMON, "dense_h_to_4h.weight would be|no entry"),
    "experts_of_the_same_width": (
        "glu",
        "jamba",
        SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 8,
                 "attn_layer_period": 2, "attn_layer_offset": 1},
        "experts",
    ),
}  # fmt: skip


def made(model_type: str, entries: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **entries))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("hazard", WORKS)
def test_what_can_be_narrower(hazard: str, tmp_path: Path) -> None:
    method, model_type, entries = WORKS[hazard]
    model = made(model_type, entries)
    before = logits(model)
    report = llmkern.prune(model, method, ratio=0.5, calibration=TOKENS)
    assert all(line.after == line.before // 2 for line in report.widths)
    assert len(report.widths) == 2
    assert not torch.equal(logits(model), before)
    llmkern.save(model, tmp_path / "out")
    for read in (llmkern.load, type(model).from_pretrained):
        assert torch.equal(logits(read(tmp_path / "out").eval()), logits(model))


def test_query_heads_that_stay_do_what_they_did() -> None:
    model = made("llama", ONE_KEY)
    for block in find_blocks(model).modules:
        block.self_attn.o_proj.weight.data[:, 16:48] = 0  # two of four query heads do nothing
    wanted = logits(model)
    options = {"importance": "activation", "compensate": False}
    llmkern.prune(model, "heads", ratio=0.5, calibration=TOKENS, **options)
    assert model.config.num_attention_heads == 2
    assert model.config.num_key_value_heads == 1
    torch.testing.assert_close(logits(model), wanted)


@pytest.mark.parametrize("hazard", REFUSED)
def test_what_cannot_be_narrower(hazard: str) -> None:
    method, model_type, entries, reason = REFUSED[hazard]
    model = made(model_type, entries)
    before = logits(model)
    with pytest.raises(ValueError, match=f"got .*({reason})"):
        llmkern.prune(model, method, ratio=0.5, calibration=TOKENS)
    assert torch.equal(logits(model), before)


def test_a_model_that_is_another_when_read_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that reads its config in another way than it was built."""
    model = made("llama", SIZES)
    build = type(model).__init__

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        build(self, config, *args, **kwargs)
        if config.intermediate_size == 64:
            for layer in self.model.layers:
                layer.mlp.act_fn = nn.Tanh()

    monkeypatch.setattr(type(model), "__init__", init)
    with pytest.raises(ValueError, match=r"another once it is saved and read.*logits"):
        llmkern.prune(model, "glu", ratio=0.5, calibration=TOKENS)


@pytest.mark.parametrize("stages", [[("gptq", {})], [("rtn", {"group_size": 128})]], ids=str)
def test_widths_are_what_later_stages_hold_best(stages: list[Any]) -> None:
    model = made("llama", SIZES | {"hidden_size": 128, "intermediate_size": 768})
    after = [Quantize(method, **options) for method, options in stages]
    found = check(model, [Prune("glu", ratio=0.25), *after], calibration=TOKENS)
    assert not found.errors
    assert any("multiples of 128" in str(note) for note in found.notes)
    assert not any("does not divide K = 576" in str(note) for note in found.notes)
    alone = check(model, [Prune("glu", ratio=0.25)], calibration=TOKENS)
    assert any("576 of 768" in str(note) for note in alone.notes)
    asked = [Prune("glu", ratio=0.25, round_to=64), *after]
    found = check(model, asked, calibration=TOKENS)
    assert any("576 of 768" in str(note) for note in found.notes)


def test_the_pipeline_does_what_the_dry_run_says(tmp_path: Path) -> None:
    model = made("llama", SIZES | {"hidden_size": 128, "intermediate_size": 768})
    recipe = Pipeline([Prune("glu", ratio=0.25), Quantize("rtn")])
    recipe.run(
        model, tmp_path / "out", calibration=TOKENS, evaluation=TOKENS, speed=False, progress=False
    )
    assert llmkern.load(tmp_path / "out").config.intermediate_size == 640


def test_where_a_later_stage_wants_too_much_the_width_decides() -> None:
    model = made("llama", SIZES)  # 128 neurons
    found = check(model, [Prune("glu", ratio=0.25), Quantize("gptq")], calibration=TOKENS)
    assert not found.errors
    assert any("96 of 128" in str(note) for note in found.notes)
    Distill("soft")  # has no width of its own to ask for


def test_one_method_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmkern.pipeline.stages import Prune as Stage

    run = Stage.run

    def broken(self: Any, context: Any) -> Any:
        if self.method == "glu":
            raise AttributeError("property 'x' of 'Config' object has no setter")
        return run(self, context)

    monkeypatch.setattr(Stage, "run", broken)
    report = compare.compare(
        made("llama", SIZES),
        methods=["glu", "magnitude"],
        calibration=TOKENS,
        evaluation=TOKENS,
        speed=False,
    )
    assert "failed: AttributeError: property 'x'" in str(report.left_out)
    assert len(report.stages) > 1

"""patch: which layers are replaced, by which format, and that nothing is left dense in silence."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import partial

import pytest
import tiny_models
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import llmkern
from llmkern import IntLinear, QuantFormat

W4, W3 = QuantFormat(4, 32), QuantFormat(3, None, False)


llama = partial(tiny_models.tiny, intermediate_size=96, vocab_size=128)


def moe() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
    )
    return Qwen3MoeForCausalLM(config).eval()


def test_default_replaces_every_linear_but_the_head():
    model = llama()
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = llmkern.patch(model, W4)
    assert set(report.replaced) == linears - {"lm_head"}
    assert report.left == {"lm_head": "an output head, dense unless a pattern names it"}
    assert report.unexpected == []
    packed = {n for n, m in model.named_modules() if isinstance(m, IntLinear)}
    assert packed == set(report.replaced)
    tokens = torch.tensor([[1, 2, 3]])
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_values_are_those_of_round_to_nearest():
    model = llama()
    linear = model.model.layers[1].mlp.up_proj
    llmkern.patch(model, {"*": W3})
    wanted = IntLinear.from_linear(linear, 3, None, False).state_dict()
    got = model.model.layers[1].mlp.up_proj.state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_last_matching_pattern_decides():
    report = llmkern.patch(
        llama(), {"*": W4, "*.down_proj": W3, "*.1.*.down_proj": W4, "*.o_proj": None}
    )
    assert report.replaced["model.layers.0.mlp.down_proj"] == W3
    assert report.replaced["model.layers.1.mlp.down_proj"] == W4
    assert report.left["model.layers.0.self_attn.o_proj"] == "left dense by the rule"
    report = llmkern.patch(llama(), {"*.down_proj": W3, "*": W4})
    assert report.replaced["model.layers.0.mlp.down_proj"] == W4


def test_layers_that_no_pattern_matches_stay_dense():
    report = llmkern.patch(llama(), {"*.mlp.*": W4})
    assert report.left["model.layers.0.self_attn.q_proj"] == "no pattern of the rule matches"
    assert report.unexpected == []


def test_pattern_without_wildcards_reaches_the_head():
    report = llmkern.patch(llama(), {"*": W4, "lm_head": W3})
    assert report.replaced["lm_head"] == W3


def test_tied_head_is_never_touched():
    model = llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head: shares its weight with model.embed_tokens"):
        report = llmkern.patch(model, {"*": W4, "lm_head": W4})
    assert "lm_head" in report.unexpected
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_group_size_that_does_not_divide_is_listed_once():
    model = llama()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = llmkern.patch(model, QuantFormat(4, 64))
    assert report.left["model.layers.0.mlp.down_proj"] == "group_size = 64 does not divide K = 96"
    assert len(report.unexpected) == 2
    messages = [str(w.message) for w in caught if "stay dense" in str(w.message)]
    assert len(messages) == 1
    assert all(name in messages[0] for name in report.unexpected)


def test_other_classes_of_linear_are_listed():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(32, 32), Scaled(32, 32))
    with pytest.warns(UserWarning, match="1: of class Scaled"):
        llmkern.patch(model, W4)
    assert type(model[0]) is IntLinear
    assert type(model[1]) is Scaled


def test_experts_held_as_one_parameter_are_listed():
    with pytest.warns(
        UserWarning, match=r"model.layers.0.mlp.experts: .*gate_up_proj \[4, 64, 64\]"
    ):
        report = llmkern.patch(moe(), W4)
    assert report.unexpected == ["model.layers.0.mlp.experts"]
    assert "model.layers.0.self_attn.q_proj" in report.replaced


def test_experts_are_no_surprise_where_the_rule_leaves_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = llmkern.patch(moe(), {"*.self_attn.*": W4})
    assert "3-D" in report.left["model.layers.0.mlp.experts"]


def test_conv1d_of_gpt2_is_replaced():
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    dense = {n: m.weight.T @ torch.eye(m.nx) for n, m in model.named_modules() if hasattr(m, "nx")}
    report = llmkern.patch(model, W4)
    assert set(report.replaced) == set(dense)
    for name, weight in dense.items():
        packed = model.get_submodule(name)
        step = packed.weight_scale.repeat_interleave(32, 1)
        assert ((packed.dequantize() - weight).abs() <= 0.51 * step).all(), name
    assert model(tokens).logits.isfinite().all()


def test_module_reached_by_two_names_stays_one_module():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": shared})
    llmkern.patch(model, W4)
    assert model["a"] is model["b"]
    assert isinstance(model["a"], IntLinear)


def test_factory_makes_the_replacement():
    seen = []

    def factory(name, linear, fmt):
        seen.append((name, fmt))
        return IntLinear.from_linear(linear, fmt.bits, fmt.group_size, fmt.symmetric)

    report = llmkern.patch(llama(), {"*.q_proj": W3}, factory=factory)
    assert seen == list(report.replaced.items())


def test_patching_twice_changes_nothing():
    model = llama()
    first = llmkern.patch(model, W4)
    before = {n: m for n, m in model.named_modules() if isinstance(m, IntLinear)}
    second = llmkern.patch(model, W4)
    assert second.replaced == {}
    assert {second.left[name] for name in first.replaced} == {"already packed"}
    assert all(model.get_submodule(name) is module for name, module in before.items())


def test_config_describes_what_was_done():
    model = llama()
    llmkern.patch(model, {"*": W4, "*.down_proj": W3, "*.1.*.o_proj": None})
    config = model.config.quantization_config
    groups = {g["weights"]["num_bits"]: g for g in config["config_groups"].values()}
    assert groups[4]["weights"]["group_size"] == 32
    assert groups[3]["weights"]["strategy"] == "channel"
    assert groups[3]["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert config["ignore"] == ["lm_head", "model.layers.1.self_attn.o_proj"]


def test_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(
        ValueError, match=r"rule: got the pattern 'q_proj', which matches no linear"
    ):
        llmkern.patch(llama(), {"q_proj": W4})


def test_layer_with_nan_is_named():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: .*NaN"):
        llmkern.patch(model, W4)


@pytest.mark.slow
def test_import_is_light():
    code = (
        "import sys, llmkern; print({'transformers', 'triton', 'torch._dynamo'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

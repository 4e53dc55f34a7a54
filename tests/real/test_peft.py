"""Adapters of peft on packed layers: merged exactly, or refused; never dropped, never garbage."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn

import llmkern
from llmkern import LutFormat, QuantFormat
from llmkern.masks import recorded_layers
from llmkern.nn import is_packed
from llmkern.patch import expand_packed

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:weight. got a write:UserWarning")

TOKENS = torch.arange(12)[None]
SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]
FORMATS = {"int4": QuantFormat(4, 32), "int3": QuantFormat(3, 32, False), "nf4": LutFormat()}
KINDS = [*FORMATS, "sparse24", "sparse24_int4"]
kinds = pytest.mark.parametrize("kind", KINDS)


def packed(kind: str) -> Any:
    model = tiny(seed=0, std=0.1)
    if kind.startswith("sparse24"):
        llmkern.prune(model, "magnitude", pattern="2:4")
    if kind != "sparse24":
        llmkern.patch(model, FORMATS.get(kind, QuantFormat(4, 32)))
    return llmkern.accelerate(model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def adapted(model: Any, config: Any) -> tuple[Any, Tensor]:
    """The model with an adapter that is trained, as it were, and its logits."""
    before = logits(model)
    made = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    after = logits(made)
    assert (after - before).norm() > 0.03 * before.norm(), "the adapter must tell"
    return made, after


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False} | options)


def of(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, name)(**{"target_modules": SOME} | options)


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "modules_to_save": lambda: lora(target_modules=SOME, modules_to_save=["lm_head"]),
    "adalora": of("AdaLoraConfig", total_step=10, init_lora_weights=False),
    "loha": of("LoHaConfig", init_weights=False),
    "lokr": of("LoKrConfig", init_weights=False),
    "ia3": of("IA3Config", feedforward_modules=["down_proj"], init_ia3_weights=False),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], init_weights=False),
    "oft": of("OFTConfig", init_weights=False, oft_block_size=16, r=0),
    "hra": of("HRAConfig", init_weights=False),
    "shira": of("ShiraConfig", init_weights=False, r=4),
}


def check_merges(model: Any, config: Any) -> None:
    base = logits(model)
    made, wanted = adapted(model, config)
    if config.peft_type != "LORA" or config.init_lora_weights is False:  # others change the base
        with made.disable_adapter():
            close(logits(made), base)
    made.merge_adapter()
    close(logits(made), wanted)
    made.unmerge_adapter()
    close(logits(made), wanted)
    merged = made.merge_and_unload(safe_merge=True)
    close(logits(merged), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_merges_exactly_by_every_method(method: str) -> None:
    check_merges(packed("int4"), METHODS[method]())


@kinds
@pytest.mark.parametrize("safe", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merges_exactly_into_every_format(kind: str, dora: bool, safe: bool) -> None:
    model, wanted = adapted(packed(kind), lora(use_dora=dora))
    with pytest.warns(UserWarning, match="got a write, so this .* is a dense nn.Linear"):
        merged = model.merge_and_unload(safe_merge=safe)
    close(logits(merged), wanted)
    layers = merged.model.layers.modules()
    assert not any(is_packed(module) for module in layers)


@kinds
def test_unloading_leaves_the_packed_model(kind: str) -> None:
    model = packed(kind)
    before, classes = logits(model), [type(module) for module in model.modules()]
    unloaded = adapted(model, lora())[0].unload()
    assert torch.equal(logits(unloaded), before)
    assert [type(module) for module in unloaded.modules()] == classes


def test_several_adapters() -> None:
    model, wanted = adapted(packed("int4"), lora(target_modules=["q_proj", "up_proj"]))
    model.add_adapter("two", lora(target_modules=["q_proj", "down_proj"]))
    model.add_weighted_adapter(["default", "two"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    both = logits(model)
    model.merge_adapter(["both"])
    close(logits(model), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    close(logits(model), wanted)


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model, wanted = adapted(packed("nf4"), lora())
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(packed("nf4"), tmp_path).eval()), wanted)


def test_a_broken_adapter_is_refused_by_a_safe_merge() -> None:
    model, _ = adapted(packed("int4"), lora(target_modules=["q_proj"]))
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0] = (
        torch.nan
    )
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


# --- what is saved after a merge --------------------------------------------------------------------


def same(model: Any) -> Any:
    return model


def through_a_file(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@kinds
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("plain", [False, True], ids=["llmkern_save", "save_pretrained"])
def test_a_merged_model_loads_as_it_was(
    kind: str, targets: Any, plain: bool, tmp_path: Path
) -> None:
    model, wanted = adapted(packed(kind), lora(target_modules=targets))
    merged, out = model.merge_and_unload(), tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the record of pruning
        merged.save_pretrained(out) if plain else llmkern.save(merged, out)
        close(logits(llmkern.load(out)), wanted)
    entry = json.loads((out / "config.json").read_text()).get("quantization_config")
    assert (entry is None) == (targets == "all-linear" or kind == "sparse24")


@pytest.mark.parametrize("how", [same, copy.deepcopy, through_a_file], ids=lambda how: how.__name__)
def test_transformers_reads_a_partly_merged_model(
    how: Callable[[Any], Any], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    original = packed("int4")
    model, wanted = adapted(how(original), lora(target_modules=["q_proj"]))
    model.merge_and_unload().save_pretrained(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted)
    if how is not same:
        ignored = original.config.quantization_config["ignore"]
        assert not any("q_proj" in name for name in ignored), "the copy's config, not this one's"


def test_a_merged_model_is_quantized_again() -> None:
    model, wanted = adapted(packed("int4"), lora())
    merged = model.merge_and_unload()
    llmkern.quantize(merged, "rtn", bits=4, group_size=32)
    assert is_packed(merged.model.layers[0].mlp.up_proj)
    assert (logits(merged) - wanted).norm() < (logits(packed("int4")) - wanted).norm()


# --- zeros that a merge has filled ------------------------------------------------------------------

GONE = "layers that the config records as pruned have lost their zeros"


@pytest.mark.parametrize("kind", ["sparse24", "dense"])
def test_a_record_of_zeros_that_a_merge_has_filled_is_not_saved(kind: str, tmp_path: Path) -> None:
    model = packed("sparse24")
    if kind == "dense":
        expand_packed(model)
    assert len(recorded_layers(model)) == 14
    merged = adapted(model, lora(target_modules=["q_proj"]))[0].merge_and_unload()
    with pytest.warns(UserWarning, match=f"save: 2 of 14 {GONE} .*q_proj: 2:4"):
        llmkern.save(merged, tmp_path / "out")
    loaded = recorded_layers(llmkern.load(tmp_path / "out"))
    assert len(loaded) == 12
    assert not any("q_proj" in name for name in loaded)


# --- training ---------------------------------------------------------------------------------------

SETUPS = {
    "float32": (torch.float32, False, False, False),
    "bfloat16": (torch.bfloat16, False, False, False),
    "checkpointing": (torch.bfloat16, False, True, False),
    "kbit": (torch.bfloat16, True, True, False),
    "kbit_autocast": (torch.bfloat16, True, True, True),
}


@pytest.mark.parametrize("setup", SETUPS)
@kinds
def test_adapters_train(kind: str, setup: str) -> None:
    dtype, kbit, checkpointing, autocast = SETUPS[setup]
    model = packed(kind).to(dtype)
    if kbit:
        model = peft.prepare_model_for_kbit_training(model)
    elif checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(TOKENS, labels=TOKENS).loss  # type: ignore[no-any-return]

    if kind == "sparse24" and setup == "kbit":  # as an nn.Linear that is left in another dtype
        with pytest.raises(ValueError, match=r"x: got float32 .* expected the dtype of values"):
            loss()
        return
    first = loss().item()
    for _ in range(4):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first - 1

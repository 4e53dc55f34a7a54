"""Packed layers of models whose files have other names than their modules, and what other readers do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, LLAMA, TOKENS, Architecture
from architectures import row as architecture_of
from safetensors.torch import load_file, save_file

import llmkern
from llmkern import LutFormat, QuantFormat
from llmkern.nn import is_packed
from llmkern.patch import expand_packed
from llmkern.wire.conversions import module_names
from llmkern.wire.pending import Pending

RENAMED = ["Llava", "Qwen2-VL", "Gemma 3", "Mllama", "PaliGemma", "ViT"]
FORMATS = {
    "int4": QuantFormat(4, 32),
    "nf4": LutFormat("nf4", 32),
    "fp4": LutFormat("fp4", 32),
}


def patched(row: str, fmt: Any, rule: str = "*") -> tuple[Architecture, Any]:
    """The whole model packed, its vision tower too, as far as the format goes."""
    architecture = ARCHITECTURES[row]
    model = architecture.model(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llmkern.patch(model, {rule: fmt})
    return architecture, model


def logits(architecture: Architecture, model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**architecture.inputs(torch.float32)).logits
    return result


def names(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if is_packed(module)}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("row", RENAMED)
def test_what_is_saved_is_loaded(row: str, fmt: str, tmp_path: Path) -> None:
    architecture, model = patched(row, FORMATS[fmt])
    assert len(names(model)) > 8
    llmkern.save(model, tmp_path / "out")
    again = llmkern.load(tmp_path / "out", dtype=torch.float32)
    assert names(again) == names(model)
    assert torch.equal(logits(architecture, again), logits(architecture, model))
    # A second time round, and past `llmkern.save`.
    again.save_pretrained(tmp_path / "twice")
    twice = llmkern.load(tmp_path / "twice", dtype=torch.float32)
    assert torch.equal(logits(architecture, twice), logits(architecture, model))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == (
        load_file(tmp_path / "twice" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("row", ["Llava", "Mllama", "ViT", "GPT-2"])
def test_transformers_reads_it_with_bitsandbytes(row: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    architecture, model = patched(row, LutFormat("nf4", 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing against it
        llmkern.save(model, tmp_path / "out")
    kind = getattr(transformers, architecture.model_class)
    theirs = kind.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    kinds = {n for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert kinds == names(model)
    for module in theirs.modules():
        module.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(
        logits(architecture, theirs), logits(architecture, model), rtol=1e-3, atol=1e-4
    )


def test_files_of_the_time_before_the_modules_were_rearranged(tmp_path: Path) -> None:
    _, model = patched("Llava", LutFormat("nf4", 32))
    llmkern.save(model, tmp_path / "out")
    stored = "language_model.model.layers.0.mlp.down_proj"
    assert f"{stored}.weight.absmax" in load_file(tmp_path / "out" / "model.safetensors")
    here = "model.language_model.layers.0.mlp.down_proj"
    with torch.device("meta"):
        skeleton = transformers.LlavaForConditionalGeneration(model.config)
    assert module_names(skeleton, [stored, here]) == {stored: here, here: here}


def test_a_base_models_files_lack_the_prefix(tmp_path: Path) -> None:
    _, model = patched("Llama", LutFormat("nf4", 32))
    llmkern.save(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        file,
        {"format": "pt"},
    )
    again = llmkern.load(tmp_path / "out", dtype=torch.float32)
    assert names(again) == names(model)
    architecture = ARCHITECTURES["Llama"]
    assert torch.equal(logits(architecture, again), logits(architecture, model))


def test_weights_that_the_model_merges_are_refused(tmp_path: Path) -> None:
    _, model = patched("Mixtral", LutFormat("nf4", 32))
    llmkern.save(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    expert = next(name for name in tensors if name.endswith("experts.0.w1.weight"))
    packed = {n: t for n, t in tensors.items() if ".q_proj.weight" in n and "layers.0" in n}
    for name, tensor in packed.items():
        tensors[expert + name.partition("q_proj.weight")[2]] = tensor.clone()
    save_file(tensors, file, {"format": "pt"})
    text = r"experts.0.w1: got a packed weight, expected a dense one: .* holds it as a part of"
    with pytest.raises(ValueError, match=text):
        llmkern.load(tmp_path / "out")


def test_a_layer_that_the_model_lacks_is_refused_by_its_stored_name(tmp_path: Path) -> None:
    _, model = patched("Llava", LutFormat("nf4", 32))
    llmkern.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    text = r"language_model.model.layers.3.\S+: got a 4-bit weight for no module of that name"
    with pytest.raises(ValueError, match=text):
        llmkern.load(tmp_path / "out")


UNREAD = {
    ("Falcon 7B", "int4"): "is a packed FalconLinear",
    ("Falcon 7B", "nf4"): "is a packed FalconLinear",
    ("GPT-2", "int4"): "is a packed Conv1D",
    ("GPT-BigCode", "int4"): "transformer.h.0.attn is initialised anew by its model",
    ("Mamba", "int4"): "backbone.layers.0.mixer is initialised anew by its model",
    ("Mixtral", "int4"): "holds dense MoE experts",
    ("Llama 4 (text)", "int4"): "holds dense MoE experts",
    ("Llama 4 (text)", "nf4"): "holds dense MoE experts",
    ("gpt-oss", "int4"): None,
    ("Gemma 3", "int4"): None,
    ("PaliGemma", "int4"): None,
    ("ViT", "int4"): None,
    ("Llava", "int4"): None,
    ("Mixtral", "nf4"): None,
    ("GPT-BigCode", "nf4"): None,
    ("Mamba", "nf4"): None,
}


@pytest.mark.parametrize(("row", "fmt"), UNREAD, ids=["-".join(case) for case in UNREAD])
def test_what_other_readers_do_not_read_is_said(row: str, fmt: str, tmp_path: Path) -> None:
    whole = row not in ("Gemma 3", "PaliGemma")
    architecture, model = patched(row, FORMATS[fmt], "*" if whole else "*language_model*")
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        llmkern.save(model, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    wanted = UNREAD[row, fmt]
    texts = [str(warning.message) for warning in said if "save:" in str(warning.message)]
    assert len(texts) == (wanted is not None)
    assert str(wanted or "") in "".join(texts)
    again = llmkern.load(tmp_path / "out", dtype=torch.float32)
    assert names(again) == names(model)
    assert torch.equal(logits(architecture, again), logits(architecture, model))


def test_blocks_across_rows_are_said(tmp_path: Path) -> None:
    _, model = patched("ViT", LutFormat("nf4", 64), "vit.layers.*")
    with pytest.warns(UserWarning, match="has K = 32, no multiple of its blocks of 64"):
        llmkern.save(model, tmp_path / "out")


def test_a_class_that_rounds_otherwise_when_packed_does_so_at_once(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["Jamba"]
    model = architecture.model(torch.bfloat16)
    llmkern.quantize(model, "rtn")
    wanted = model(TOKENS[:2]).logits
    with pytest.warns(UserWarning, match="holds dense MoE experts"):
        llmkern.save(model, tmp_path / "out")
    assert torch.equal(llmkern.load(tmp_path / "out")(TOKENS[:2]).logits, wanted)
    expand_packed(model)
    assert not hasattr(model.config, "_is_quantized")
    assert "_is_quantized" not in (tmp_path / "out" / "config.json").read_text()


def test_nothing_pending_is_left(tmp_path: Path) -> None:
    for row in ("GPT-2", "GPT-J", "Bloom"):
        _, model = patched(row, LutFormat("nf4", 32))
        llmkern.save(model, tmp_path / row)
        again = llmkern.load(tmp_path / row)
        assert not [m for m in again.modules() if isinstance(m, Pending)]


def test_layers_that_older_names_ignore_stay_dense(tmp_path: Path) -> None:
    """compressed-tensors of older releases: the config, too, has the names of then."""
    architecture = ARCHITECTURES["Llava"]
    model = architecture.model(torch.float32)
    llmkern.quantize(model, "rtn")
    llmkern.save(model, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    entry = config["quantization_config"]
    assert any(name.startswith("model.vision_tower.") for name in entry["ignore"])
    entry["ignore"] = [name.removeprefix("model.") for name in entry["ignore"]]
    file.write_text(json.dumps(config))
    again = llmkern.load(tmp_path / "out")
    assert names(again) == names(model)
    assert torch.equal(logits(architecture, again), logits(architecture, model))
    entry["ignore"].append("re:.*down_proj")
    file.write_text(json.dumps(config))
    text = r"down_proj: got a packed weight, expected a dense one: quantization_config ignores it"
    with pytest.raises(ValueError, match=text):
        llmkern.load(tmp_path / "out")


def test_a_placeholder_that_stays_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = patched("Llama", LutFormat("nf4", 64))
    llmkern.save(model, tmp_path / "out")
    monkeypatch.setattr("llmkern.wire.bitsandbytes.fill_pending", lambda *_: None)
    with pytest.raises(ValueError, match=r"q_proj: got Pending, expected a packed layer"):
        llmkern.load(tmp_path / "out")


def test_linears_beside_a_stack_in_one_module(tmp_path: Path) -> None:
    zamba = architecture_of(
        "zamba", "ZambaForCausalLM", LLAMA, num_hidden_layers=8, mamba_d_state=8, mamba_dt_rank=16,
        n_mamba_heads=2, attn_layer_period=2, attn_layer_offset=1)  # fmt: skip
    model = zamba.model(torch.float32)
    with pytest.warns(UserWarning, match=r"layers.0.mamba: its matrices are held in 3-D"):
        report = llmkern.quantize(model, "rtn")
    assert "model.layers.0.mamba.in_proj" in {line.name for line in report.layers}
    shared = "model.layers.2.shared_transf.self_attn.q_proj"
    assert "shares its weight with" in report.dense[shared]
    llmkern.save(model, tmp_path / "out")
    again = llmkern.load(tmp_path / "out")
    assert names(again) == names(model)
    assert torch.equal(logits(zamba, again), logits(zamba, model))

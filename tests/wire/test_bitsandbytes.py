"""bitsandbytes' 4-bit checkpoints: what save writes comes back bit for bit, nested scales decoded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import llmkern
from llmkern import Lut4Linear, LutFormat

LAYER = "model.layers.0.mlp.up_proj"


def saved(path, book="nf4", **options) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attention_bias=True,
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    llmkern.patch(model, {"*": LutFormat(book), "*.o_proj": None})
    llmkern.save(model, path, **options)
    return model


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_load_reads_it_back_bit_for_bit(book, shard, tmp_path):
    model = saved(tmp_path / "model", book, max_shard_size=shard)
    loaded = llmkern.load(tmp_path / "model")
    assert isinstance(loaded.get_submodule(LAYER), Lut4Linear)
    wanted, got = model.state_dict(), loaded.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert all(got[key].dtype == wanted[key].dtype for key in wanted)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.config.quantization_config == model.config.quantization_config


def change(path, edit) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_nested_scales_are_decoded(tmp_path):
    saved(tmp_path)
    wanted = {}

    def nest(tensors):
        absmax = tensors[f"{LAYER}.weight.absmax"]
        codes = torch.randint(0, 256, absmax.shape, dtype=torch.uint8)
        book, scale = torch.linspace(-1, 1, 256), torch.tensor([0.25])
        name = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist()))
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"{LAYER}.weight.absmax"] = codes
        tensors[f"{LAYER}.weight.nested_absmax"] = scale
        tensors[f"{LAYER}.weight.nested_quant_map"] = book
        wanted["scales"] = (book[codes.int()] * 0.25 + 0.5).view(96, 1)

    change(tmp_path, nest)
    layer = llmkern.load(tmp_path).get_submodule(LAYER)
    assert torch.equal(layer.weight_scale, wanted["scales"])


def test_damage_is_named(tmp_path):
    saved(tmp_path)
    change(tmp_path, lambda t: t[f"{LAYER}.weight.absmax"].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight\.absmax: got NaN"):
        llmkern.load(tmp_path)
    change(tmp_path, lambda t: t.pop(f"{LAYER}.weight.absmax"))
    with pytest.raises(ValueError, match=rf"{LAYER}\.weight\.absmax: got none"):
        llmkern.load(tmp_path)


def loaded_by_transformers(path, **options) -> LlamaForCausalLM:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attention_bias=True,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options
    )
    return LlamaForCausalLM.from_pretrained(path, quantization_config=settings, device_map="cpu")


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_accelerate_takes_over_a_model_that_bitsandbytes_quantized(book, nested, tmp_path):
    options = {"bnb_4bit_quant_type": book, "bnb_4bit_use_double_quant": nested}
    model = loaded_by_transformers(tmp_path / "dense", **options)
    tokens = torch.tensor([[1, 2, 3, 5]])
    import bitsandbytes.functional as peer

    theirs = model.get_submodule(LAYER)
    wanted = peer.dequantize_4bit(theirs.weight, theirs.weight.quant_state)
    model(tokens)  # bitsandbytes repacks its weights in its first forward pass
    assert llmkern.accelerate(model) is model
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, Lut4Linear)
    assert torch.equal(layer.dequantize(torch.bfloat16), wanted)
    llmkern.save(model, tmp_path / "packed")
    again = llmkern.load(tmp_path / "packed")
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert llmkern.accelerate(model) is model


def test_accelerate_refuses_bitsandbytes_without_four_bits(tmp_path):
    model = loaded_by_transformers(tmp_path)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            size = module.in_features, module.out_features
            model.set_submodule(name, torch.nn.Linear(*size, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bitsandbytes without a 4-bit layer"):
        llmkern.accelerate(model)


def test_several_devices_are_refused(tmp_path, monkeypatch):
    saved(tmp_path)
    from llmkern.wire import bitsandbytes

    fill = bitsandbytes.fill_pending

    def spread(model, *args):
        model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
        fill(model, *args)

    monkeypatch.setattr(bitsandbytes, "fill_pending", spread)
    with pytest.raises(ValueError, match="device_map: got several devices, expected one"):
        llmkern.load(tmp_path)


def test_conv1d_comes_back(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128)).eval()
    llmkern.patch(model, LutFormat())
    llmkern.save(model, tmp_path / "model")
    loaded = llmkern.load(tmp_path / "model")
    assert isinstance(loaded.transformer.h[0].mlp.c_fc, Lut4Linear)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)

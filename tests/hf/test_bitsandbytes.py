"""bitsandbytes' 4-bit checkpoints: what save writes comes back bit for bit, nested scales decoded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

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

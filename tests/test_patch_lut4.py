"""patch and save with NF4 and FP4 formats: the layers, the checkpoint, and what is refused."""

from __future__ import annotations

import json
from functools import partial

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import llmkern
from llmkern import IntLinear, Lut4Linear, LutFormat, QuantFormat
from llmkern.formats.lut4 import CODEBOOKS

llama = partial(tiny_models.tiny, intermediate_size=96, vocab_size=128)


@pytest.mark.parametrize("book", CODEBOOKS)
def test_patch_makes_the_layers_of_from_linear(book: str):
    model, fmt = llama(), LutFormat(book, 64)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = llmkern.patch(model, fmt)
    assert report.replaced == dict.fromkeys(linears.keys() - {"lm_head"}, fmt)
    assert report.unexpected == []
    for name in report.replaced:
        layer = model.get_submodule(name)
        assert isinstance(layer, Lut4Linear)
        wanted = Lut4Linear.from_linear(linears[name], book, 64).state_dict()
        got = layer.state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (
        1,
        7,
    )


def test_rules_mix_kinds_and_a_second_patch_leaves_them():
    model = llama()
    rules = {"*": QuantFormat(4, 32), "*.mlp.*": LutFormat("fp4", 32), "*.o_proj": None}
    first = llmkern.patch(model, rules)
    kinds = {name: type(model.get_submodule(name)) for name in first.replaced}
    assert kinds["model.layers.0.mlp.up_proj"] is Lut4Linear
    assert kinds["model.layers.0.self_attn.q_proj"] is IntLinear
    assert not hasattr(model.config, "quantization_config")
    second = llmkern.patch(model, LutFormat())
    assert {second.left[name] for name in first.replaced} == {"already packed"}


def test_conv1d_is_packed():
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128)).eval()
    dense = model.transformer.h[0].mlp.c_fc.weight.detach().t().clone()
    llmkern.patch(model, LutFormat())
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, Lut4Linear)
    assert (layer.dequantize() - dense).norm() < 0.12 * dense.norm()


def test_rows_that_blocks_would_split_stay_dense_with_a_warning():
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.down_proj: .*K = 80.*share 16"):
        report = llmkern.patch(llama(intermediate_size=80), LutFormat())
    assert {name.rsplit(".", 1)[1] for name in report.unexpected} == {"down_proj"}


def test_nan_names_the_layer():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*NaN"):
        llmkern.patch(model, LutFormat())


@pytest.mark.parametrize("arguments", [("nf3", 64), ("nf4", 48), ("nf4", 0)])
def test_formats_bitsandbytes_lacks_are_refused(arguments: tuple[str, int]):
    with pytest.raises(ValueError, match=r"(codebook|block_size): got"):
        LutFormat(*arguments)


def test_quantize_refuses_the_format_in_its_rules():
    with pytest.raises(ValueError, match=r"rules: got LutFormat.*expected a QuantFormat"):
        llmkern.quantize(llama(), "rtn", group_size=32, rules={"*.mlp.*": LutFormat()})


@pytest.mark.parametrize("book", CODEBOOKS)
def test_save_writes_a_bitsandbytes_checkpoint(book: str, tmp_path):
    model = llama().to(torch.bfloat16)
    llmkern.patch(model, {"*": LutFormat(book), "*.o_proj": None})
    model(torch.tensor([[1, 2, 3]]))  # repacks; the file's form comes back
    llmkern.save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    dense = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert config == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": book,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *dense],
    }
    tensors = load_file(tmp_path / "model/model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert {key.removeprefix(name) for key in tensors if key.startswith(name)} == {
        ".weight",
        ".weight.absmax",
        ".weight.quant_map",
        f".weight.quant_state.bitsandbytes__{book}",
    }
    assert tensors[f"{name}.weight"].dtype == torch.uint8
    assert list(tensors[f"{name}.weight"].shape) == [96 * 64 // 2, 1]
    wanted = model.get_submodule(name).state_dict()
    assert all(torch.equal(tensors[f"{name}.{key}"], wanted[key]) for key in wanted)


def own_book(model: nn.Module) -> None:
    layer = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Lut4Linear.from_linear(layer, torch.linspace(-1, 1, 16))


REFUSED = {
    "int4 beside NF4": (
        lambda m: llmkern.patch(m, {"*": LutFormat(), "*.mlp.*": QuantFormat(4, 32)}),
        r"IntLinear.*beside.*Lut4Linear.*patch the model",
    ),
    "NF4 beside FP4": (
        lambda m: llmkern.patch(m, {"*": LutFormat(), "*.mlp.*": LutFormat("fp4")}),
        r"in nf4 beside .* in fp4.*patch the model",
    ),
    "own book": (own_book, r"up_proj: got a book of its own.*torch\.save"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_save_refuses_what_no_checkpoint_holds(case: str, tmp_path):
    model = llama()
    change, message = REFUSED[case]
    change(model)
    with pytest.raises(ValueError, match=message):
        llmkern.save(model, tmp_path / "model")
    assert not any(tmp_path.iterdir())

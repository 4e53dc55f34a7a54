"""accelerate: compressed-tensors' own checkpoints run packed, nothing is expanded, nothing is lost."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import llmkern
from llmkern import IntLinear

pytest.importorskip("compressed_tensors")

SCHEMES = {
    "group_128": (4, 128, True),
    "group_32": (4, 32, True),
    "per_channel": (4, None, True),
    "zero_points": (4, 64, False),
    "zero_points_per_channel": (4, None, False),
    "three_bits": (3, 128, True),
    "two_bits_zero_points": (2, 32, False),
}
SYMMETRIC = {name: s for name, s in SCHEMES.items() if s[2]}


def weight_bytes(model: nn.Module) -> int:
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def assert_same_logits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to the rounding of bfloat16 weights and activations."""
    scale = wanted.float().abs().max()
    assert (got.float() - wanted.float()).abs().max() <= 0.02 * scale


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_packed_model_equals_the_expanded_one(scheme, llama, ct_compress, tokens):
    model = ct_compress(llama(), {"Linear": scheme})
    before = weight_bytes(model)
    quantized = {n for n, m in model.named_modules() if hasattr(m, "weight_packed")}
    packed = {n: p.clone() for n, p in model.state_dict().items()}
    fast = llmkern.accelerate(model)
    assert fast is model
    assert {n for n, m in model.named_modules() if isinstance(m, IntLinear)} == quantized
    with torch.no_grad():
        got = fast(tokens).logits
    assert not any(n.removesuffix(".weight") in quantized for n, _ in model.named_parameters())
    # A narrower weight is widened to 4 bits where it runs.
    assert weight_bytes(model) <= before * (1.02 if scheme[0] == 4 else 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, packed[name]), name
    for name in quantized:
        model.set_submodule(name, model.get_submodule(name).to_linear())
    with torch.no_grad():
        assert_same_logits(got, model(tokens).logits)


@pytest.mark.parametrize("scheme", SYMMETRIC.values(), ids=SYMMETRIC)
def test_checkpoint_runs_packed_and_saves_the_same_bytes(
    scheme, llama, ct_directory, tokens, tmp_path
):
    directory = ct_directory(llama(), {"Linear": scheme})
    with torch.no_grad():
        expanded = AutoModelForCausalLM.from_pretrained(directory)(tokens).logits
        model = llmkern.accelerate(AutoModelForCausalLM.from_pretrained(directory))
        got = model(tokens).logits
    assert_same_logits(got, expanded)
    model.save_pretrained(tmp_path / "plain")
    llmkern.save(model, tmp_path / "ours")
    wanted = load_file(directory / "model.safetensors")
    for path in ("plain", "ours"):
        saved = load_file(tmp_path / path / "model.safetensors")
        assert saved.keys() == wanted.keys()
        assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(tokens).logits
        assert torch.equal(again, expanded)
        assert torch.equal(llmkern.load(tmp_path / "plain")(tokens).logits, got)


def test_several_formats_in_one_model(llama, ct_directory, tokens, tmp_path):
    directory = ct_directory(llama(), {"re:.*down_proj": (4, 64, True), "Linear": (3, None, True)})
    model = llmkern.accelerate(AutoModelForCausalLM.from_pretrained(directory))
    assert model.model.layers[0].mlp.down_proj.group_size == 64
    assert model.model.layers[0].mlp.up_proj.bits == 3
    y = model(tokens).logits
    llmkern.save(model, tmp_path / "again")
    assert torch.equal(llmkern.load(tmp_path / "again")(tokens).logits, y)


def test_other_bit_widths_are_listed_and_still_run(llama, ct_directory, tokens, tmp_path):
    directory = ct_directory(llama(), {"re:.*down_proj": (8, 128, True), "Linear": (4, 32, True)})
    expanded = AutoModelForCausalLM.from_pretrained(directory)(tokens).logits
    model = AutoModelForCausalLM.from_pretrained(directory)
    with pytest.warns(UserWarning, match=r"2 modules stay dense:\n.*down_proj: num_bits: got 8"):
        llmkern.accelerate(model)
    llmkern.save(model, tmp_path / "again")
    saved, wanted = (load_file(d / "model.safetensors") for d in (tmp_path / "again", directory))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    for _ in range(2):
        assert_same_logits(model(tokens).logits, expanded)
    with pytest.raises(ValueError, match="down_proj: got a weight that its first forward pass"):
        llmkern.save(model, tmp_path / "expanded")
    assert isinstance(model.model.layers[0].mlp.up_proj, IntLinear)
    assert not isinstance(model.model.layers[0].mlp.down_proj, IntLinear)


def test_expanded_layers_are_not_saved_as_if_packed(llama, ct_directory, tokens, tmp_path):
    directory = ct_directory(llama(), {"Linear": (4, 32, True)})
    model = AutoModelForCausalLM.from_pretrained(directory)
    model(tokens)
    with pytest.raises(ValueError, match=r"q_proj: got a weight that its first forward pass"):
        llmkern.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_used_model_is_refused(llama, ct_compress, tokens):
    model = ct_compress(llama(), {"Linear": (4, 32, True)})
    model(tokens)
    with pytest.raises(ValueError, match="already expanded by a first forward pass"):
        llmkern.accelerate(model)


def test_dense_model_is_refused(llama):
    with pytest.raises(ValueError, match="got no packed layer in it"):
        llmkern.accelerate(llama())


def test_accelerating_twice_changes_nothing(llama, ct_compress, tokens):
    model = llmkern.accelerate(ct_compress(llama(), {"Linear": (4, 32, True)}))
    y = model(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llmkern.accelerate(model) is model
    assert torch.equal(model(tokens).logits, y)


def test_packed_experts_that_transformers_expands_are_listed(moe, ct_directory, tokens):
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    directory = ct_directory(moe(), {"Linear": (4, 32, True)})
    weights = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if "experts." in n]:
        w = tensors.pop(name)
        scale = w.view(len(w), -1, 32).abs().amax(-1) / 7.5
        packed = PackedQuantizationCompressor.compress({"weight": w, "weight_scale": scale}, scheme)
        tensors |= {f"{name.removesuffix('weight')}{key}": t for key, t in packed.items()}
    save_file(tensors, file, {"format": "pt"})

    model = AutoModelForCausalLM.from_pretrained(directory)
    with pytest.warns(UserWarning, match=r"mlp.experts: .*3-D parameters \(gate_up_proj"):
        llmkern.accelerate(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, IntLinear)
    assert model(tokens).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"experts.0.down_proj: .* a part of .*mlp.experts"):
        llmkern.load(directory)


def test_generates_and_compiles(llama, ct_compress, tokens):
    model = llmkern.accelerate(ct_compress(llama(), {"Linear": (4, 32, True)}))
    out = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 10)
    with torch.no_grad():
        compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
        x = torch.randn(1, 3, 128, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), model.model.layers[0].mlp(x))

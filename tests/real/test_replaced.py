"""What is put in the place of a linear is the same to the model around it, and to its files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, TOKENS
from tiny_models import tiny
from torch import Tensor, nn

import llmkern
from llmkern import LutFormat, QuantFormat
from llmkern.nn import IntLinear, is_packed
from llmkern.patch import expand_packed


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(quantize|prune|patch|save|weight):")
        yield


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


# --- hooks ------------------------------------------------------------------------------------------

GPTQ = {"method": "gptq", "calibration": TOKENS}
VERBS = {
    "patch": lambda m: llmkern.patch(m, QuantFormat(4, 32)),
    "nf4 patch": lambda m: llmkern.patch(m, LutFormat()),
    "rtn": lambda m: llmkern.quantize(m, "rtn"),
    "gptq": lambda m: llmkern.quantize(m, **GPTQ),
    "gptq in turn": lambda m: llmkern.quantize(m, **GPTQ, true_sequential=True),
}
NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("verb", VERBS)
def test_hooks_stay_and_handles_remove_them(verb: str) -> None:
    model = tiny(hidden_size=64, intermediate_size=128)
    linear = model.get_submodule(NAME)
    linear.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
    handle = linear.register_forward_hook(lambda module, args, out: 2.0 * out)
    VERBS[verb](model)
    packed = model.get_submodule(NAME)
    assert is_packed(packed)
    x = torch.randn(3, packed.in_features)
    torch.testing.assert_close(packed(x), 2.0 * packed.forward(x + 1.0))
    handle.remove()
    torch.testing.assert_close(packed(x), packed.forward(x + 1.0))


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_hook_is_called_as_often_as_before(in_turn: bool) -> None:
    counts = []
    for hooked in (False, True):
        model, calls = tiny(hidden_size=64, intermediate_size=128), [0]

        def count(module: nn.Module, args: Any, calls: list[int] = calls) -> None:
            calls[0] += 1

        block = model.model.layers[1]
        (block.mlp.down_proj if hooked else block.mlp).register_forward_pre_hook(count)
        llmkern.quantize(model, **GPTQ, true_sequential=in_turn)
        counts.append(calls[0])
    assert counts[0] > 0
    assert counts[1] == counts[0]


def test_hooks_of_accelerate_stay() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny(hidden_size=64, intermediate_size=128)
    hooks.attach_align_device_hook(model, execution_device="cpu")
    llmkern.quantize(model, **GPTQ)
    layer = model.get_submodule(NAME)
    assert is_packed(layer)
    assert hasattr(layer, "_hf_hook")
    dense = copy.deepcopy(model)
    assert NAME in expand_packed(dense)
    torch.testing.assert_close(logits(dense), logits(model), atol=1e-3, rtol=1e-3)


def test_a_resumed_run_keeps_them(tmp_path: Path) -> None:
    model = tiny(hidden_size=64, intermediate_size=128)
    model.get_submodule(NAME).register_forward_hook(lambda module, args, out: 2.0 * out)
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    llmkern.quantize(whole, **GPTQ)
    llmkern.quantize(model, **GPTQ, checkpoint=tmp_path / "state")
    llmkern.quantize(again, **GPTQ, checkpoint=tmp_path / "state", resume=True)
    assert torch.equal(logits(again), logits(whole))


# --- what models read of a linear -------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [QuantFormat(4, 32), LutFormat()], ids=["int4", "nf4"])
def test_attributes(fmt: Any) -> None:
    model = tiny(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    dense = copy.deepcopy(model)
    llmkern.patch(model, fmt)
    packed = {name: module for name, module in model.named_modules() if is_packed(module)}
    assert packed
    for name, module in packed.items():
        old: Any = dense.get_submodule(name)
        assert isinstance(module, nn.Linear)
        for key in ("in_features", "out_features", "training"):
            assert getattr(module, key) == getattr(old, key)
        for key in ("dtype", "device", "shape"):
            assert getattr(module.weight, key) == getattr(old.weight, key)
        assert (module.bias is None) == (old.bias is None)


# --- Conv1D, whose weight files hold transposed ------------------------------------------------------

SQUARE = "transformer.h.0.attn.c_proj"  # nothing but its values tells


def readers(directory: Path) -> Iterator[nn.Module]:
    yield llmkern.load(directory)
    yield transformers.GPT2LMHeadModel.from_pretrained(directory)


@pytest.mark.parametrize("fmt", [QuantFormat(4, 32), LutFormat()], ids=["int4", "nf4"])
@pytest.mark.parametrize("how", ["expanded", "written to"])
def test_dense_again_in_the_place_of_a_conv1d(fmt: Any, how: str, tmp_path: Path) -> None:
    model = ARCHITECTURES["GPT-2"].model()
    llmkern.patch(model, fmt)
    if how == "expanded":
        assert SQUARE in expand_packed(model)
        assert type(model.get_submodule(SQUARE)).__name__ == "Conv1D"
    else:
        for module in [module for module in model.modules() if is_packed(module)]:
            module.weight.mul_(1.5)
    wanted = logits(model)
    llmkern.save(model, tmp_path / "out")
    assert torch.equal(logits(model), wanted)
    for again in readers(tmp_path / "out"):
        torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)


def test_sparse_layers_in_the_place_of_a_conv1d(tmp_path: Path) -> None:
    model = ARCHITECTURES["GPT-2"].model()
    llmkern.prune(model, "wanda", pattern="2:4", calibration=TOKENS)
    wanted = logits(model)
    llmkern.accelerate(model)
    assert is_packed(model.get_submodule(SQUARE))
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    llmkern.save(model, tmp_path / "out")
    assert is_packed(model.get_submodule(SQUARE))
    for again in readers(tmp_path / "out"):
        torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-5)


def test_pruned_after_it_was_packed(tmp_path: Path) -> None:
    model = ARCHITECTURES["GPT-2"].model()
    llmkern.quantize(model, "rtn")
    expand_packed(model)
    llmkern.prune(model, "depth", ratio=0.5, calibration=TOKENS)
    llmkern.save(model, tmp_path / "out")
    for again in readers(tmp_path / "out"):
        torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)


# --- one module in two places ------------------------------------------------------------------------


def test_a_module_that_is_used_twice_is_left_by_drivers_and_packed_once_by_patch() -> None:
    model = tiny(hidden_size=64, intermediate_size=128)
    blocks = model.model.layers
    blocks[1].mlp.down_proj = blocks[0].mlp.down_proj
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"the same module as model.layers.1.mlp.down_proj"):
        report = llmkern.quantize(model, "rtn")
    assert "the same module as model.layers.0" in report.dense["model.layers.1.mlp.down_proj"]
    assert blocks[0].mlp.down_proj is blocks[1].mlp.down_proj
    assert not is_packed(blocks[0].mlp.down_proj)
    llmkern.patch(twin, QuantFormat(4, 32))
    layers = twin.model.layers
    assert isinstance(layers[0].mlp.down_proj, IntLinear)
    assert layers[0].mlp.down_proj is layers[1].mlp.down_proj


def test_blocks_that_are_all_one_are_refused() -> None:
    model = tiny(hidden_size=64, intermediate_size=128)
    model.model.layers[1] = model.model.layers[0]
    for verb in (
        lambda: llmkern.quantize(model, "rtn"),
        lambda: llmkern.prune(model, "magnitude", sparsity=0.5),
    ):
        with pytest.raises(ValueError, match=r"got no layer to .* the same module as"):
            verb()


# --- widths that a format cannot hold ----------------------------------------------------------------


def test_what_no_block_size_fits_is_left_where_it_was_left_to_us() -> None:
    model = ARCHITECTURES["Gemma 4 (text)"].model()
    name = "model.layers.0.per_layer_projection"
    with pytest.warns(UserWarning, match=rf"{name}: group_size 64 splits 32 columns .* K = 16"):
        report = llmkern.quantize(model, "nf4")
    assert "splits 32 columns" in report.dense[name]
    assert report.layers
    with pytest.raises(ValueError, match="group_size: got 64, which splits 32 columns"):
        llmkern.quantize(ARCHITECTURES["Gemma 4 (text)"].model(), "nf4", group_size=64)

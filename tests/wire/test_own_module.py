"""A packed module of another package's own, with the format that writes and reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import llmkern
from llmkern import QuantFormat
from llmkern.nn import PackedLinear
from llmkern.wire import WIRES, Wire
from llmkern.wire.checkpoint_files import CheckpointFiles

LAYERS = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


class RowLinear(PackedLinear):
    """8 bits and one scale per row, multiplied dense."""

    _FILE_BUFFERS = _REPACKED_BUFFERS = ("codes", "scales")
    _KERNEL_BUFFERS = ()

    def __init__(self, codes: Tensor, scales: Tensor, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self._dtype, self._layout = scales.dtype, None
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.codes * self.scales[:, None]).to(dtype or self._dtype)

    def _multiply(self, x: Tensor, bias: Tensor | None, layout: str) -> Tensor:
        return nn.functional.linear(x, self.dequantize(x.dtype), bias)

    def _wanted_layout(self) -> str | None:
        return None

    def _file_tensors(self) -> dict[str, Tensor | None]:
        return {name: self._buffers[name] for name in self._FILE_BUFFERS}


def packed(linear: nn.Module) -> RowLinear:
    scales = linear.weight.detach().abs().amax(1) / 127
    codes = (linear.weight.detach() / scales[:, None]).round().to(torch.int8)
    return RowLinear(codes, scales, linear.bias).train(linear.training)


class Rows(Wire):
    """The module's own tensors, which transformers itself loads into it."""

    name = "rows"

    def reader(self, files: CheckpointFiles) -> RowsReader:
        return RowsReader(files)

    def holds(self, layer: PackedLinear) -> bool:
        return isinstance(layer, RowLinear)

    def describe(
        self, layers: Mapping[str, PackedLinear], dense: Sequence[str], stacks: Sequence[str]
    ) -> dict[str, Any]:
        return {"quant_method": self.name, "dense": sorted(dense)}


class RowsReader:
    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files

    def prepare(self, model: PreTrainedModel) -> None:
        for name, module in list(model.named_modules()):
            if f"{name}.codes" in self.files.tensors:
                codes = torch.empty_like(module.weight, dtype=torch.int8)
                scales = torch.empty_like(module.weight[:, 0])
                model.set_submodule(name, RowLinear(codes, scales, module.bias))

    def explain(self, unexpected: Sequence[str]) -> str | None:
        lost = [name for name in unexpected if name.endswith(".codes")]
        return f"{lost[0]}: got codes that no layer takes" if lost else None

    def fill(self, model: PreTrainedModel) -> None:
        for name, layer in model.named_modules():
            if isinstance(layer, RowLinear) and not bool(layer.scales.isfinite().all()):
                raise ValueError(f"{name}.scales: got NaN or Inf, expected finite numbers")


@pytest.fixture
def rows() -> Iterator[Rows]:
    WIRES.append(wire := Rows())
    yield wire
    WIRES.remove(wire)


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for name in LAYERS:
        model.set_submodule(name, packed(model.get_submodule(name)))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3, 5]])).logits


def test_a_model_of_it_is_saved_and_loaded(
    rows: Rows, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    llmkern.save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "rows"
    assert "lm_head" in config["dense"]
    tensors = load_file(tmp_path / "model/model.safetensors")
    kinds = {"codes": torch.int8, "scales": torch.bfloat16, "bias": torch.bfloat16}
    found = {k.removeprefix(f"{LAYERS[0]}."): t.dtype for k, t in tensors.items() if LAYERS[0] in k}
    assert found == kinds
    loaded = llmkern.load(tmp_path / "model")
    assert isinstance(loaded.get_submodule(LAYERS[1]), RowLinear)
    assert torch.equal(logits(loaded), logits(model))
    llmkern.save(loaded, tmp_path / "again")
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("model", "again")]
    assert files[0] == files[1]


def test_what_its_reader_finds_is_raised(
    rows: Rows, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.get_submodule(LAYERS[0]).scales[3] = torch.nan
    llmkern.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match=rf"{LAYERS[0]}\.scales: got NaN"):
        llmkern.load(tmp_path / "model")


def test_without_its_format_it_is_not_saved(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{LAYERS[0]}: got RowLinear, which .* does not hold"):
        llmkern.save(model, tmp_path / "model")


def test_beside_another_kind_it_is_refused(
    rows: Rows, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    llmkern.patch(model, {"*.q_proj": QuantFormat(4, 32)})
    with pytest.raises(ValueError, match=r"q_proj \(IntLinear\) beside .* \(RowLinear\)"):
        llmkern.save(model, tmp_path / "model")

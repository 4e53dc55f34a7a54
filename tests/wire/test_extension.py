"""A checkpoint format that one entry of `WIRES` adds: all that reads and writes models uses it."""

from __future__ import annotations

import copy
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
from llmkern import IntLinear, Lut4Linear, LutFormat, QuantFormat
from llmkern.formats.int4 import pack_codes, unpack_codes
from llmkern.nn import PackedLinear
from llmkern.pipeline import Pipeline, Quantize
from llmkern.wire import WIRES, TakenOver, Wire, fill_pending, leave_pending, like
from llmkern.wire.checkpoint_files import CheckpointFiles

NAMES = ["codes", "book", "steps"]
LAYER = "model.layers.0.mlp.up_proj"


class Foreign(nn.Linear):
    """A layer of another package, as transformers would have loaded it."""

    parts: dict[str, Tensor]


class Books(Wire):
    """Codes one to a byte, a book of any 16 values and its scales, each by a name of its own."""

    name = "books"
    takes = "a model of books"

    def reader(self, files: CheckpointFiles) -> BooksReader:
        return BooksReader(files)

    def holds(self, layer: PackedLinear) -> bool:
        return isinstance(layer, Lut4Linear)

    def refuse(self, layers: Mapping[str, PackedLinear]) -> str | None:
        bare = [name for name, layer in layers.items() if not layer.scaled]
        return f"{bare[0]}: got no scales, expected some: books have no others" if bare else None

    def describe(
        self, layers: Mapping[str, PackedLinear], dense: Sequence[str], stacks: Sequence[str]
    ) -> dict[str, Any]:
        return {"quant_method": self.name, "layers": list(layers)}

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        own = layer._file_tensors()
        codes = unpack_codes(own["weight_packed"], 4, layer.in_features)
        return {"codes": codes, "book": own["weight_codebook"], "steps": own["weight_scale"]}

    def canonical(self, layer: PackedLinear, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if "codes" not in tensors:
            raise ValueError("codes: got none, expected some")
        return {
            "weight_packed": pack_codes(tensors["codes"], 4),
            "weight_codebook": tensors["book"],
            "weight_scale": tensors["steps"],
            **({"bias": tensors["bias"]} if "bias" in tensors else {}),
        }

    def take_over(self, model: nn.Module) -> TakenOver | None:
        found = {n: m for n, m in model.named_modules() if isinstance(m, Foreign)}
        for name, module in found.items():
            model.set_submodule(name, like(module, made(module.parts, module.bias)))
        return TakenOver({}, True) if found else None


class BooksReader:
    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files

    def prepare(self, model: PreTrainedModel) -> None:
        layers = self.files.config["quantization_config"]["layers"]
        leave_pending(model, layers, NAMES, "codes")

    def explain(self, unexpected: Sequence[str]) -> str | None:
        return None

    def fill(self, model: PreTrainedModel) -> None:
        fill_pending(model, self.files, NAMES, made)


def made(tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> Lut4Linear:
    codes, book, steps = (tensors[name] for name in NAMES)
    size = codes.shape[1] // steps.shape[1]
    return Lut4Linear.from_parts(codes, book, steps, bias, group_size=size, dtype=torch.bfloat16)


@pytest.fixture(params=["first", "last"])
def books(request: pytest.FixtureRequest) -> Iterator[Books]:
    wire = Books()
    WIRES.insert(0 if request.param == "first" else len(WIRES), wire)
    yield wire
    WIRES.remove(wire)


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attention_bias=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def with_a_book_of_its_own(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model in NF4, but for one layer, which bitsandbytes does not hold."""
    book = torch.linspace(-1, 1, 16)
    made = Lut4Linear.from_linear(model.get_submodule(LAYER), book)
    llmkern.patch(model, {"*": LutFormat(), LAYER: None})
    model.set_submodule(LAYER, made)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3, 5]])).logits


def method(directory: Path) -> str:
    config = json.loads((directory / "config.json").read_text())
    return config["quantization_config"]["quant_method"]


@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_save_and_load_use_it(
    books: Books, model: LlamaForCausalLM, shard: str, tmp_path: Path
) -> None:
    with_a_book_of_its_own(model)
    wanted = logits(model)
    llmkern.save(model, tmp_path / "ours", max_shard_size=shard)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    for directory in (tmp_path / "ours", tmp_path / "theirs"):
        assert method(directory) == "books"
        loaded = llmkern.load(directory)
        assert isinstance(loaded.get_submodule(LAYER), Lut4Linear)
        assert torch.equal(logits(loaded), wanted)
        assert loaded.config.quantization_config == model.config.quantization_config
    if shard == "5GB":
        tensors = load_file(tmp_path / "ours/model.safetensors")
        assert {k for k in tensors if k.startswith(LAYER)} == {f"{LAYER}.{n}" for n in NAMES}
        assert tensors[f"{LAYER}.codes"].dtype == torch.uint8


def test_state_dict_goes_by_the_format_and_back(books: Books, model: LlamaForCausalLM) -> None:
    llmkern.wire.record_formats(with_a_book_of_its_own(model))
    held, wanted = model.state_dict(), logits(model)
    assert f"{LAYER}.steps" in held
    twin = copy.deepcopy(model)
    for layer in llmkern.wire.packed_layers(twin).values():
        layer.weight_scale.zero_()
    assert not torch.equal(logits(twin), wanted)
    twin.load_state_dict(held)
    assert torch.equal(logits(twin), wanted)
    held.pop(f"{LAYER}.codes")
    with pytest.raises(RuntimeError, match=rf"{LAYER}\.codes: got none"):
        twin.load_state_dict(held)


def test_its_place_in_the_list_decides(
    books: Books, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    llmkern.patch(model, LutFormat())
    first = WIRES[0] is books
    assert model.config.quantization_config["quant_method"] == (
        "books" if first else "bitsandbytes"
    )
    for name in ("bitsandbytes", "books", "bitsandbytes"):
        llmkern.save(model, tmp_path / "named", format=name, overwrite=True)
        assert method(tmp_path / "named") == name
        assert torch.equal(logits(llmkern.load(tmp_path / "named")), logits(model))
    with pytest.raises(ValueError, match=r"format: got 'cards', expected one of .*books"):
        llmkern.save(model, tmp_path / "other", format="cards")
    with pytest.raises(ValueError, match=r"proj: got Lut4Linear, which compressed-tensors does"):
        llmkern.save(model, tmp_path / "other", format="compressed-tensors")
    assert not (tmp_path / "other").exists()


def test_a_format_is_named_for_packed_layers_only(
    books: Books, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"format: got 'books', expected None .*is packed"):
        llmkern.save(model, tmp_path / "model", format="books")
    llmkern.wire.record_formats(model)
    assert not hasattr(model.config, "quantization_config")


def test_accelerate_uses_it(books: Books, model: LlamaForCausalLM, tmp_path: Path) -> None:
    wanted = logits(with_a_book_of_its_own(model))
    for name, layer in llmkern.wire.packed_layers(model).items():
        foreign = Foreign(layer.in_features, layer.out_features, device="meta")
        foreign.parts, foreign.bias = books.tensors(layer), layer.bias
        model.set_submodule(name, foreign)
    assert llmkern.accelerate(model) is model
    assert torch.equal(logits(model), wanted)
    llmkern.save(model, tmp_path / "model")
    assert method(tmp_path / "model") == "books"


def test_what_it_takes_is_named(books: Books, model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"no packed layer in it, expected .*a model of books"):
        llmkern.accelerate(model)


def test_pipeline_uses_it(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "dense")
    WIRES.insert(0, books := Books())
    try:
        tokens = torch.arange(64).view(4, 16)
        Pipeline([Quantize("nf4")]).run(
            tmp_path / "dense",
            tmp_path / "out",
            calibration=tokens,
            evaluation=tokens,
            speed=False,
        )
        assert method(tmp_path / "out") == "books"
        loaded = llmkern.load(tmp_path / "out")
        assert isinstance(loaded.get_submodule(LAYER), Lut4Linear)
    finally:
        WIRES.remove(books)


def test_kinds_that_no_format_holds_together_are_refused(
    books: Books, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    llmkern.patch(model, {"*": LutFormat(), "*.mlp.*": QuantFormat(4, 32)})
    assert not hasattr(model.config, "quantization_config")
    message = r"\(IntLinear\) beside .* \(Lut4Linear\)|\(Lut4Linear\) beside .* \(IntLinear\)"
    with pytest.raises(ValueError, match=message):
        llmkern.save(model, tmp_path / "model")
    assert isinstance(model.get_submodule(LAYER), IntLinear)


def test_its_refusals_are_heard(books: Books, model: LlamaForCausalLM, tmp_path: Path) -> None:
    codes = torch.zeros(96, 64, dtype=torch.uint8)
    book = torch.linspace(-1, 1, 16)
    model.set_submodule(LAYER, Lut4Linear.from_parts(codes, book, group_size=64))
    with pytest.raises(ValueError, match=rf"{LAYER}: got (no scales|a book of its own)"):
        llmkern.save(model, tmp_path / "model")

"""What people's model directories hold: read as transformers reads it, or refused with the way out."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import llmkern
from llmkern.pipeline._fingerprint import of_model
from llmkern.pipeline._shapes import read_shapes
from llmkern.pipeline.measure import file_bytes

TOKENS = torch.arange(2 * 16).view(2, 16) % 96


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file, and the same in shards."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny(seed=0, std=0.1)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    return folder


@pytest.fixture
def whole(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "whole", tmp_path / "model"))


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "shards", tmp_path / "model"))


def configure(directory: Path, **entries: Any) -> None:
    """Set entries of config.json; None takes one out."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    file = directory / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    change(content["weight_map"])
    file.write_text(json.dumps(content))


def last_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[-1]


def add(directory: Path, name: str, content: str = "{}") -> None:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(content)


def foreign_weights(directory: Path) -> None:
    """What authors put beside the weights that transformers reads."""
    tensors = {"layers.0.weight": torch.zeros(400, 400)}
    save_file(tensors, directory / "consolidated.safetensors")
    save_file(tensors, directory / "consolidated-00001-of-00001.safetensors")
    save_file(tensors, directory / "model.fp16.safetensors")
    add(directory, "consolidated.safetensors.index.json")
    add(directory, "params.json")
    add(directory, "original/consolidated.00.pth", "x" * 1000)
    add(directory, "onnx/model.onnx", "x" * 1000)


BESIDE: dict[str, Callable[[Path], Any]] = {
    "other_formats": foreign_weights,
    "an_extra_shard": lambda d: shutil.copy(last_shard(d), d / "model-00009-of-00009.safetensors"),
    "pickles": lambda d: add(d, "pytorch_model.bin"),
    "the_trainers_state": lambda d: (add(d, "optimizer.pt"), add(d, "trainer_state.json")),
    "a_partial_download": lambda d: add(d, "model-00001-of-00002.safetensors.incomplete"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_only_files_that_are_read_count(what: str, shards: Path) -> None:
    wanted, size, name = logits(llmkern.load(shards)), file_bytes(shards), of_model(shards)
    assert read_shapes(shards).stored == size
    BESIDE[what](shards)
    assert file_bytes(shards) == size == read_shapes(shards).stored
    assert of_model(shards) == name
    assert torch.equal(logits(llmkern.load(shards)), wanted)


def test_the_whole_file_goes_before_an_old_index(whole: Path, made: Path) -> None:
    wanted, size = logits(llmkern.load(whole)), file_bytes(whole)
    for file in (made / "shards").glob("model*"):
        shutil.copy(file, whole)
        if file.suffix == ".safetensors":
            old = {name: tensor + 1 for name, tensor in load_file(file).items()}
            save_file(old, whole / file.name, {"format": "pt"})
    with pytest.warns(
        UserWarning, match=r"model.safetensors and model.safetensors.index.json: the f"
    ):
        loaded = llmkern.load(whole)
    assert torch.equal(logits(loaded), wanted)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(whole).eval()), wanted)
    assert file_bytes(whole) == size


def test_packed_tensors_too_come_from_the_whole_file(tmp_path: Path) -> None:
    """They are read by name, not by transformers."""
    model = tiny(seed=0)
    llmkern.quantize(model, "nf4")
    llmkern.save(model, tmp_path / "model")
    add(
        tmp_path / "model",
        "model.safetensors.index.json",
        '{"weight_map": {"a": "gone.safetensors"}}',
    )
    with pytest.warns(UserWarning, match="the former is read"):
        loaded = llmkern.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))


def renamed(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    configure(directory, transformers_weights="other.safetensors")


READ: dict[str, Callable[[Path], Any]] = {
    "no_architectures": lambda d: configure(d, architectures=None),
    "empty_architectures": lambda d: configure(d, architectures=[]),
    "one_architecture_as_text": lambda d: configure(d, architectures="LlamaForCausalLM"),
    "no_model_type": lambda d: configure(d, model_type=None),
    "old_dtype_entry": lambda d: configure(d, dtype=None, torch_dtype="float32"),
    "no_dtype": lambda d: configure(d, dtype=None),
    "code_that_nobody_needs": lambda d: (
        configure(d, auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
        add(d, "modeling_x.py", "raise SystemExit('ran')"),
    ),
    "weights_by_another_name": renamed,
}


@pytest.mark.parametrize("what", READ)
def test_odd_configs_are_read(what: str, whole: Path) -> None:
    wanted, size = logits(llmkern.load(whole)), file_bytes(whole)
    READ[what](whole)
    loaded = llmkern.load(whole, dtype="auto")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert isinstance(loaded, nn.Module)
    assert torch.equal(logits(loaded), wanted)
    shapes = read_shapes(whole)
    assert shapes.stored == size == file_bytes(whole)
    assert shapes.dtype == torch.float32


def only(directory: Path, name: str) -> None:
    """The weights in another format, or under another name."""
    for file in directory.glob("model*"):
        file.unlink()
    (directory / name).write_bytes(b"GGUF")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def long_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    file.write_bytes(data)


def duplicate(directory: Path) -> None:
    first, *_, last = sorted(directory.glob("model-*.safetensors"))
    tensors = load_file(last)
    name = next(iter(load_file(first)))
    save_file({**tensors, name: torch.zeros(1)}, last, {"format": "pt"})


def quantized(method: str) -> Callable[[Path], Any]:
    return lambda d: configure(d, quantization_config={"quant_method": method, "bits": 4})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing_shard": (
        lambda d: last_shard(d).unlink(),
        "got no such file, but model.safetensors.index",
    ),
    "half_a_shard": (lambda d: cut(last_shard(d)), "got a damaged safetensors file"),
    "header_beyond_the_end": (
        lambda d: long_header(last_shard(d)),
        "got a damaged safetensors file",
    ),
    "dangling_link": (
        lambda d: (shard := last_shard(d)).unlink() or shard.symlink_to("../blobs/gone"),
        "got no such file",
    ),
    "tensor_twice": (
        duplicate,
        r"in this file, and by the index in model-00001-.*, expected in one",
    ),
    "tensor_not_in_index": (
        lambda d: index(d, lambda m: m.pop(next(iter(m)))),
        "in the file, but not in the index",
    ),
    "index_of_nothing": (
        lambda d: add(d, "model.safetensors.index.json", '{"metadata": {}}'),
        "got no weight_map",
    ),
    "index_of_numbers": (
        lambda d: index(d, lambda m: m.update({"a": 3})),
        "got the shard 3, expected a plain file name",
    ),
    "no_index": (
        lambda d: (d / "model.safetensors.index.json").unlink(),
        r"got model-00001-of-.*more without model.safetensors.index.json",
    ),
    "pickles": (lambda d: only(d, "pytorch_model.bin"), "pickled weights.*save_pretrained writes"),
    "gguf_beside_a_config": (lambda d: only(d, "x.gguf"), r"got only x.gguf.*gguf_file='x.gguf'"),
    "gguf_alone": (
        lambda d: (only(d, "x.gguf"), (d / "config.json").unlink()),
        r"got no config.json.*gguf_file='x.gguf'",
    ),
    "only_the_authors_format": (
        lambda d: only(d, "consolidated.safetensors"),
        "got consolidated.safetensors without",
    ),
    "adapter": (
        lambda d: add(d, "adapter_config.json", '{"base_model_name_or_path": "some/base"}'),
        "an adapter of some/base and no model: merge it",
    ),
    "adapter_alone": (
        lambda d: (add(d, "adapter_config.json"), (d / "config.json").unlink()),
        "an adapter and no model: merge it",
    ),
    "remote_code": (
        lambda d: configure(d, architectures=["XForCausalLM"], auto_map={"AutoConfig": "x.X"}),
        "got 'XForCausalLM', which transformers lacks: its code is in the directory .auto_map.",
    ),
    "remote_config": (
        lambda d: configure(d, model_type="x", auto_map={"AutoConfig": "x.X"}),
        "model_type: got 'x', which transformers lacks: its code is in the directory",
    ),
    "newer_model": (
        lambda d: configure(d, model_type="llama9"),
        "llama9.*a newer transformers may",
    ),
    "no_class_at_all": (
        lambda d: configure(d, architectures=["torch"]),
        "architectures: got 'torch', which transformers lacks",
    ),
    "no_type_and_no_class": (
        lambda d: configure(d, architectures=None, model_type=None),
        "model_type: got None",
    ),
    "config_of_no_language_model": (
        lambda d: configure(d, architectures=None, model_type="clip_vision_model"),
        "architectures: got none .* clip_vision_model is no language model",
    ),
    "dtype_of_torch": (
        lambda d: configure(d, dtype="torch.float32"),
        "config.json: .*torch.float32",
    ),
    "nonsense_in_the_config": (lambda d: configure(d, hidden_size="wide"), "config.json: "),
    "config_is_a_list": (
        lambda d: add(d, "config.json", "[]"),
        "got a list, expected a JSON object",
    ),
    "weights_of_another_name": (
        lambda d: configure(d, transformers_weights="gone.safetensors"),
        "gone.safetensors: got no such file, but config.json names it",
    ),
    "weights_elsewhere": (
        lambda d: configure(d, transformers_weights="../x.safetensors"),
        "transformers_weights: got '../x.safetensors', expected the name",
    ),
    "gptq": (quantized("gptq"), "quant_method: got 'gptq'.*give the model that it was made from"),
    "awq": (quantized("awq"), "got 'awq'.*give the model that it was made from"),
    "fp8": (quantized("fp8"), r"got 'fp8'.*dequantize=True"),
    "mxfp4": (quantized("mxfp4"), r"got 'mxfp4'.*dequantize=True"),
    "no_quant_method": (lambda d: configure(d, quantization_config={}), "quant_method: got None"),
    "odd_quantization": (
        lambda d: configure(d, quantization_config="int4"),
        "quantization_config: got 'int4', expected an object",
    ),
    "quantized_decoder": (
        lambda d: configure(d, text_config={"quantization_config": {"quant_method": "fp8"}}),
        "text_config.quantization_config: got 'fp8'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("reader", [llmkern.load, read_shapes], ids=["load", "preflight"])
def test_what_cannot_be_read_is_refused(reader: Any, what: str, shards: Path) -> None:
    change, message = REFUSED[what]
    change(shards)
    with pytest.raises(ValueError, match=message) as refused:
        reader(shards)
    assert "\n" not in str(refused.value)


def test_paths(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = logits(llmkern.load(whole))
    odd = whole.with_name("a model – ü 模型")
    whole.rename(odd)
    monkeypatch.setenv("HOME", str(odd.parent))
    monkeypatch.chdir(odd.parent)
    for path in (odd, str(odd) + "/", f"~/{odd.name}", odd.name, f"./{odd.name}/."):
        assert torch.equal(logits(llmkern.load(path)), wanted)


WRONG_PATHS = {
    "gguf": ("x.gguf", r"got a GGUF file.*gguf_file='x.gguf'"),
    "weights": (
        "model/model.safetensors",
        "got a file, expected the model directory that it is in",
    ),
    "hub": ("some-org/Some-Model-7B", "`hf download some-org/Some-Model-7B` prints one"),
    "nowhere": ("/nowhere/at/all", "got no directory, expected a model directory$"),
    "above": (".", "got no config.json in it, expected a model directory, such as model"),
}


@pytest.mark.parametrize("what", WRONG_PATHS)
def test_wrong_paths_say_which_is_right(
    what: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, message = WRONG_PATHS[what]
    monkeypatch.chdir(whole.parent)
    if path.endswith(".gguf"):
        Path(path).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=message):
        llmkern.load(path)


def test_the_hubs_cache(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are links to blobs, named by what they hold."""
    wanted = logits(llmkern.load(whole))
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(whole.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    add(repository, "refs/main", "0123")
    assert torch.equal(logits(llmkern.load(snapshot)), wanted)
    with pytest.raises(ValueError, match=r"expected a model directory, such as .*snapshots/0123"):
        llmkern.load(repository)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"has been downloaded to .*snapshots/0123"):
        llmkern.load("org/name")


def test_models_without_a_head_keep_their_class(tmp_path: Path) -> None:
    """Also those of sentence-transformers, whose directory says so in files of its own."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=96, intermediate_size=64, **sizes)).eval()
    model.save_pretrained(tmp_path)
    add(
        tmp_path,
        "modules.json",
        '[{"path": "", "type": "sentence_transformers.models.Transformer"}]',
    )
    loaded = llmkern.load(tmp_path)
    assert type(loaded) is BertModel
    with torch.no_grad():
        wanted = model(TOKENS).last_hidden_state
        assert torch.equal(loaded(TOKENS).last_hidden_state, wanted)


def test_nothing_is_said_of_plain_directories(shards: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llmkern.load(shards)

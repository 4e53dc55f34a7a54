"""What preflight finds: each refusal and warning, and shapes and bytes as the drivers leave them."""

from __future__ import annotations

import copy
import io
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForMaskedLM, T5Config

import llmkern
from llmkern.distill import make_student
from llmkern.drive import Findings, Tokens
from llmkern.evaluate import weight_bytes
from llmkern.models.linears import find_linears
from llmkern.pipeline import preflight
from llmkern.pipeline._shapes import read_shapes
from llmkern.pipeline.preflight import Preflight, check
from llmkern.pipeline.stages import Distill, Prune, Quantize, Stage
from llmkern.testing import TensorPeak

VOCAB = 96
SHAPE = {"intermediate_size": 256, "num_hidden_layers": 4, "pad_token_id": 0}
config = partial(tiny_models.tiny_config, **SHAPE)
tiny = partial(tiny_models.tiny, seed=0, std=0.1, **SHAPE)


TOKENS = torch.randint(3, VOCAB, (40, 32), generator=torch.Generator().manual_seed(0))


def found(model: Any, *stages: Stage, **options: Any) -> Preflight:
    return check(model, stages, **{"calibration": TOKENS, **options})


def only_error(result: Preflight) -> str:
    assert len(result.errors) == 1, result.errors
    with pytest.raises(ValueError, match=r"^\w"):
        result.refuse()
    return str(result.errors[0])


# --- shapes ---------------------------------------------------------------------------------------

STAGES = [
    Prune("glu", ratio=0.25),
    Prune("mlp", ratio=0.5),
    Prune("heads", ratio=0.5),
    Prune("taylor", ratio=0.5),
    Prune("glu", target_params=200_000),
    Prune("depth", blocks=2),
    Prune("sparsegpt", pattern="2:4"),
    Quantize("gptq", bits=3, group_size=64),
    Quantize("rtn", symmetric=False, group_size=32, rules={"*.down_proj": None}),
    Quantize("nf4"),
]


def driven(stage: Stage, model: nn.Module) -> nn.Module:
    """The model that the driver itself makes."""
    data = {"calibration": TOKENS} if stage.needs_calibration else {}
    options = dict(stage.options)
    if isinstance(stage, Quantize):
        options["rules"] = stage._formats()
        llmkern.quantize(model, stage.method, **options, **data)
    else:
        llmkern.prune(model, stage.method, **options, **data)
    return model


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.label)
def test_shapes_are_those_that_the_driver_leaves(stage: Stage, tmp_path: Path) -> None:
    before, findings = read_shapes(config()), Findings()
    after = stage.plan(before, before, findings)
    assert not findings.errors
    real = driven(stage, tiny())
    packed = {n for n, m in find_linears(real).items() if isinstance(m, llmkern.IntLinear)}
    packed |= {n for n, m in find_linears(real).items() if isinstance(m, llmkern.Lut4Linear)}
    assert set(after.formats) == packed
    shapes = {n: p.shape for n, p in after.model.named_parameters()}
    for name, parameter in real.named_parameters():
        assert shapes.pop(name) == parameter.shape
    assert {name.removesuffix(".weight") for name in shapes} == packed
    assert all(p.is_meta for p in after.model.parameters())

    llmkern.save(real, tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert after.on_disk() == pytest.approx(written - header, rel=0.03)
    real(input_ids=TOKENS[:1])  # into the kernels' layout
    assert after.weights() == pytest.approx(weight_bytes(real), rel=0.05)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [("gpt2", "mlp"), ("phi3", "glu"), ("phi3", "heads"), ("qwen2", "glu")],
)
def test_other_architectures(model_type: str, method: str) -> None:
    options = {} if method == "heads" else {"round_to": 32}
    stage = Prune(method, ratio=0.5, **options)
    before, findings = read_shapes(config(model_type)), Findings()
    after = stage.plan(before, before, findings)
    assert not findings.errors + findings.warnings
    real = driven(stage, tiny(model_type))
    assert {n: p.shape for n, p in after.model.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }


def test_shapes_of_a_student() -> None:
    before = read_shapes(config())
    stage = Distill("soft", student={"layers": [0, 3], "width": 0.5})
    after = stage.plan(before, before, Findings())
    real = make_student(tiny(), [0, 3], width=0.5)
    assert {n: p.shape for n, p in after.model.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }


def test_model_is_only_read(tmp_path: Path) -> None:
    model = tiny()
    state, settings = copy.deepcopy(model.state_dict()), model.config.to_dict()
    result = found(model, Prune("heads", ratio=0.5), Quantize("gptq", group_size=32))
    assert not result.errors
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert model.config.to_dict() == settings
    model.save_pretrained(tmp_path)
    of_directory = found(tmp_path, Prune("heads", ratio=0.5), Quantize("gptq", group_size=32))
    assert of_directory.figures == result.figures
    of_config = found(model.config, Prune("heads", ratio=0.5), Quantize("gptq", group_size=32))
    assert of_config.figures == result.figures


# --- what is refused --------------------------------------------------------------------------------


def test_group_size_of_a_width_that_pruning_leaves() -> None:
    assert not found(tiny(), Quantize("gptq", group_size=64)).errors
    result = found(tiny(), Prune("glu", ratio=0.25, round_to=32), Quantize("gptq", group_size=64))
    assert not result.errors
    result = found(tiny(), Prune("glu", ratio=0.1, round_to=32), Quantize("gptq", group_size=64))
    text = only_error(result)
    assert text.startswith("2-quantize: group_size: got 64, which does not divide K = 224 of ")
    assert "model.layers.0.mlp.down_proj and 3 more layers" in text


def test_pattern_that_does_not_divide_a_layer() -> None:
    result = found(tiny(intermediate_size=130), Prune("sparsegpt", pattern="2:4"))
    assert "1-prune: pattern: got 2:4, which does not divide K = 130 of" in only_error(result)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Prune("glu", ratio=0.001), "ratio: got 0.001, which rounds to nothing"),
        (Prune("depth", blocks=3), "blocks: got 3, expected at most 2 blocks"),
        (Prune("glu", target_params=10), "target_params: got 10, expected at least"),
        (Quantize("rtn", rules={"*.nothing": {"bits": 3}}, group_size=32), "'*.nothing'"),
        (Distill("soft", student={"layers": 9}), "layers: got 9, expected a fraction"),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_what_a_driver_refuses(stage: Stage, message: str) -> None:
    assert message in only_error(found(tiny(), stage))


def test_method_that_does_not_fit_the_architecture() -> None:
    assert "expected gate, up and down" in only_error(
        found(config("gpt2"), Prune("glu", ratio=0.5))
    )


def test_missing_calibration() -> None:
    stages = [Prune("magnitude", sparsity=0.5), Quantize("gptq", group_size=32)]
    text = only_error(found(tiny(), *stages, calibration=None))
    assert text.startswith("2-quantize: calibration: got none for quantize gptq")


def test_windows_longer_than_the_context() -> None:
    text = only_error(found(tiny(), Prune("sparsegpt", sparsity=0.5, seq_len=128)))
    assert "seq_len: got 128, expected at most the model's context of 64" in text


def test_too_little_data() -> None:
    text = only_error(found(tiny(), Prune("wanda", sparsity=0.5), calibration=TOKENS[0, :20]))
    assert "got 20 tokens, expected at least one window of 64" in text
    text = only_error(found(tiny(), Prune("wanda", sparsity=0.5), calibration="a text"))
    assert "tokenizer: got None" in text
    text = only_error(found(tiny(), Prune("wanda", sparsity=0.5), calibration=TOKENS + VOCAB))
    assert "expected tokens of at least 0 and less than 96" in text


def test_packed_student(tmp_path: Path) -> None:
    model = tiny()
    llmkern.quantize(model, "rtn", group_size=32)
    llmkern.save(model, tmp_path / "packed")
    text = only_error(found(tiny(), Distill("soft", student=str(tmp_path / "packed"))))
    assert "which holds packed layers, expected dense weights" in text


def test_student_with_another_vocabulary(tmp_path: Path) -> None:
    tiny(vocab_size=80).save_pretrained(tmp_path / "student")
    stage = Distill("soft", student=str(tmp_path / "student"))
    text = only_error(found(tiny(), stage, calibration=TOKENS % 80))
    assert "vocabulary of 80, expected the teacher's, 96" in text


def test_encoder_decoder(tmp_path: Path) -> None:
    text = only_error(found(T5Config(), Prune("magnitude", sparsity=0.5)))
    assert text.startswith("model: got the encoder-decoder T5Config")


def test_model_whose_perplexity_means_nothing() -> None:
    bert = AutoModelForMaskedLM.from_config(tiny_models.tiny_config("bert"))
    text = only_error(found(bert, Quantize("rtn")))
    assert text.startswith("model: got BertForMaskedLM, which does not generate text")


def test_no_model(tmp_path: Path) -> None:
    assert "expected a model directory" in only_error(found(tmp_path, Quantize("rtn")))
    assert "it has no config" in only_error(found(nn.Linear(2, 2), Quantize("rtn")))


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    need = found(tiny(), Quantize("rtn", group_size=32)).figures[0].memory_bytes
    monkeypatch.setattr(preflight, "_resident", lambda: 1000)
    monkeypatch.setattr(preflight, "_memory", lambda device: (need + 999, need - 1))
    text = only_error(found(tiny(), Quantize("rtn", group_size=32)))
    assert "memory: needs about" in text
    assert "beside the 1 KiB in use by this process" in text
    monkeypatch.setattr(preflight, "_memory", lambda device: (need + 1000, need - 1))
    result = found(tiny(), Quantize("rtn", group_size=32))
    assert not result.errors
    assert "are free now" in str(result.warnings[0])


def test_memory_of_this_machine_is_known() -> None:
    result = found(tiny(), Quantize("rtn", group_size=32))
    assert result.memory_total >= result.memory_available > 0


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages = [Prune("glu", ratio=0.5), Quantize("gptq", group_size=32)]
    need = found(tiny(), *stages, output=tmp_path / "a" / "b").disk_bytes
    assert need > sum(row.weight_bytes for row in found(tiny(), *stages).figures)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=need - 1))
    text = only_error(found(tiny(), *stages, output=tmp_path / "a" / "b"))
    assert text.startswith("output: disk: ")
    assert str(tmp_path) in text


# --- what is said -----------------------------------------------------------------------------------


def test_few_windows(tmp_path: Path) -> None:
    result = found(tiny(), Prune("wanda", sparsity=0.5), calibration=TOKENS.flatten())
    assert "has 20 that do not overlap" in str(result.warnings[0])
    result = found(tiny(), Prune("wanda", sparsity=0.5, samples=64))
    assert "the data has 40 windows: all of them" in str(result.warnings[0])
    assert not found(tiny(), Prune("wanda", sparsity=0.5, samples=40)).warnings
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    result = found(
        tiny(), Prune("wanda", sparsity=0.5), calibration=tmp_path / "tokens.safetensors"
    )
    assert not result.warnings


def test_tied_embeddings() -> None:
    tied = found(tiny(tie_word_embeddings=True), Quantize("rtn", group_size=32))
    assert "one matrix of 96 x 64 embeds the tokens and gives the logits" in str(tied.notes[0])
    apart = found(tiny(tie_word_embeddings=False), Quantize("rtn", group_size=32))
    (note,) = map(str, apart.notes)
    assert note.startswith("1-quantize: lm_head (")
    assert "an output head" in note or "outside the decoder blocks" in note


def test_packed_layers_are_expanded(tmp_path: Path) -> None:
    model = tiny()
    llmkern.quantize(model, "rtn", group_size=32)
    llmkern.save(model, tmp_path / "packed")
    for source in (model, tmp_path / "packed"):
        result = found(source, Prune("glu", ratio=0.5))
        assert not result.errors
        assert "its packed layers are expanded" in str(result.notes[0])
        assert not found(source, Distill("soft", student={"layers": 2})).notes
    again = found(tiny(), Quantize("rtn", group_size=32), Quantize("nf4"))
    assert any(str(n).startswith("2-quantize: its packed") for n in again.notes)


def test_experts_are_left_alone() -> None:
    model = config("mixtral", num_local_experts=2, num_experts_per_tok=1)
    result = found(model, Quantize("rtn", group_size=32))
    (warning,) = [str(w) for w in result.warnings]
    assert "experts and 3 more (" in warning
    assert "% of the weights) left as it is: its matrices are held in 3-D parameters" in warning


def test_widths_that_formats_do_not_fit() -> None:
    result = found(tiny(), Prune("glu", ratio=0.25, round_to=32))
    assert not result.warnings
    assert "int4 groups of 128 and llama.cpp's K-quants do not fit" in str(result.notes[0])
    uneven = Prune("glu", ratio=0.25, round_to=32, allow_uneven=True)
    result = found(tiny(), uneven, Quantize("gptq", group_size=64))
    assert not result.errors
    (warning,) = [str(w) for w in result.warnings]
    assert warning.startswith("2-quantize: an uneven pruning before it may leave widths")
    fitting = Prune("glu", ratio=0.25, round_to=64, allow_uneven=True)
    assert not found(tiny(), fitting, Quantize("gptq", group_size=64)).warnings


def test_dataset_is_not_touched() -> None:
    result = found(tiny(), Quantize("gptq", group_size=32), calibration="wikitext:raw:train")
    assert not result.errors
    assert "looked at when the stage begins" in str(result.notes[0])


def test_table_shows_everything() -> None:
    result = found(tiny(), Prune("glu", ratio=0.1), Quantize("gptq", group_size=64))
    console = Console(width=200, file=io.StringIO())
    console.print(result.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for row in result.figures:
        assert row.name in text
        assert row.label in text
    for finding in (*result.errors, *result.warnings, *result.notes):
        assert str(finding)[:60] in text


# --- estimates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage",
    [
        Quantize("gptq", group_size=64),
        Quantize("rtn", group_size=64),
        Prune("sparsegpt", pattern="2:4"),
        Prune("wanda", sparsity=0.5),
        Prune("glu", ratio=0.25),
    ],
    ids=lambda stage: stage.label,
)
def test_memory_is_about_what_tensors_take(stage: Stage, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}
    model, before = tiny(**shape), read_shapes(config(**shape))
    after = stage.plan(before, before, Findings())
    want = stage.memory(before, after, before, Tokens(*TOKENS.shape))
    with TensorPeak(model) as watch:
        driven(stage, model)
    got = watch.most + weight_bytes(tiny(**shape))
    assert 0.6 * got < want < 2 * got

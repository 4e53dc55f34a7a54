"""What cannot be written is refused before any model is read, and what is written is whole."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny, words

import llmkern
from llmkern import _files
from llmkern.hf.save import write_tokenizer
from llmkern.pipeline import Pipeline, Prune, Quantize

Run = Callable[..., tuple[int, str, str]]

TOKENS = torch.arange(8 * 16).view(8, 16) % 16
BESIDE = {
    "LICENSE": "MIT",
    "NOTICE.txt": "of others",
    "USE_POLICY.md": "be good",
    "README.md": "---\nlicense: mit\n---\n# A model",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "chat_template.json": '{"chat_template": "x"}',
    "tokenizer.model": "sentencepiece",
    "qwen.tiktoken": "IQ== 0",
    "added_tokens.json": "{}",
    "special_tokens_map.json": "{}",
    "additional_chat_templates/rag.jinja": "x",
    "modules.json": '[{"path": ""}, {"path": "1_Pooling"}]',
    "1_Pooling/config.json": "{}",
}
LEFT = {
    "consolidated.safetensors": "x",
    "consolidated.safetensors.index.json": "{}",
    "params.json": "{}",
    "pytorch_model.bin": "x",
    "pytorch_model.bin.index.json": "{}",
    "model.gguf": "GGUF",
    "model.onnx": "x",
    "onnx/config.json": "{}",
    "original/tokenizer.model": "x",
    "modeling_x.py": "raise SystemExit",
    "trainer_state.json": "{}",
    "quantize_config.json": "{}",
    "llmkern_report.json": '{"old": 1}',
    ".gitattributes": "x",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer and all that people publish with one."""
    folder = tmp_path_factory.mktemp("made") / "model"
    tiny(seed=0, std=0.1, vocab_size=16).save_pretrained(folder)
    words(template="{{ messages }}").save_pretrained(folder)
    for name, text in (BESIDE | LEFT).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


VERBS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "quantize": lambda m, t: ["quantize", m, "--method", "rtn", "--group-size", "32"],
    "prune": lambda m, t: ["prune", m, "--method", "magnitude", "--sparsity", "0.5"],
    "distill": lambda m, t: [
        *("distill", m, "--data", t, "--steps", "1", "--batch-size", "2", "--student-layers", "0.5")
    ],
    "compress": lambda m, t: [
        *(
            "compress",
            m,
            "--recipe",
            recipe(t),
            "--evaluation",
            t,
            "--no-speed",
            "--no-sensitivity",
        ),
        *("--evaluation-windows", "2"),
    ],
}


def recipe(tokens: Path) -> Path:
    path = tokens.with_name("recipe.yaml")
    path.write_text("- quantize: {method: rtn, group_size: 32}\n")
    return path


def no_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was read")

    for module in ("llmkern.pipeline._origin", "llmkern.pipeline.run"):
        monkeypatch.setattr(f"{module}.load", fail)
    monkeypatch.setattr(llmkern, "load", fail)


def spoil_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no vocabulary file")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)


def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)


def file_there(path: Path) -> Path:
    path.write_text("x")
    return path


def full(path: Path) -> Path:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")
    return path


UNWRITABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a_file": (lambda d: file_there(d / "f"), "got a file"),
    "below_a_file": (lambda d: file_there(d / "f") / "out", "f is no directory"),
    "below_below_a_file": (lambda d: file_there(d / "f") / "a" / "out", "f is no directory"),
    "below_a_device": (lambda d: Path("/dev/full/out"), "/dev/full is no directory"),
    "a_device": (lambda d: Path("/dev/null"), "got a file"),
    "no_real_file_system": (lambda d: Path("/proc/out"), "nothing can be written in /proc"),
    "a_long_name": (lambda d: d / ("n" * 254), "nothing can be written in"),
    "other_files": (lambda d: full(d / "thesis"), "with other files in it"),
    "the_model_itself": (lambda d: d / "model", "model"),
    "above_the_model": (lambda d: d, "model|other files"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and /dev/full")
@pytest.mark.parametrize("where", UNWRITABLE)
@pytest.mark.parametrize("verb", VERBS)
def test_no_model_is_read_for_an_output_that_cannot_be_written(
    verb: str, where: str, model: Path, tokens: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, message = UNWRITABLE[where]
    arguments = VERBS[verb](model, tokens)
    output = place(model.parent)
    before = sorted(model.parent.rglob("*"))
    no_model_is_read(monkeypatch)
    for more in ([], ["--overwrite"]):
        code, _, err = run(*arguments, "-o", output, *more)
        assert code == 1
        (line,) = [line for line in err.splitlines() if "error" in line]
        assert message.split("|")[0] in line or message.split("|")[-1] in line
    assert sorted(model.parent.rglob("*")) == before


CIRCUMSTANCES = {
    "tokenizer": (spoil_tokenizer, "tokenizer: got one that cannot be saved: no vocabulary file"),
    "small_disk": (small_disk, "free space"),
    "read_only": (read_only, "Read-only file system"),
}


@pytest.mark.parametrize("what", CIRCUMSTANCES)
@pytest.mark.parametrize("verb", VERBS)
def test_nor_where_saving_would_fail(
    verb: str, what: str, model: Path, tokens: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = CIRCUMSTANCES[what]
    arguments = VERBS[verb](model, tokens)
    with monkeypatch.context() as patched:
        no_model_is_read(patched)
        change(patched)
        code, _, err = run(*arguments, "-o", model.parent / "out")
    assert code == 1
    assert message in err
    assert not (model.parent / "out").exists()


def test_a_mount_point_is_not_replaced(
    model: Path, tokens: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume of a container is: what is written beside it is on another disk."""
    out = model.parent / "out"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    code, _, err = run(*VERBS["quantize"](model, tokens), "-o", out)
    assert (code, "got a mount point" in err, "out/model" in err) == (1, True, True)
    number = out.stat().st_ino
    code, _, err = run(*VERBS["compress"](model, tokens), "-o", out)
    assert code == 0, err
    assert out.stat().st_ino == number


PLACES = {
    "checkpoint": ["quantize", "--method", "gptq", "--checkpoint"],
    "training": ["distill", "--checkpoint"],
    "log": ["distill", "--log-dir"],
}


@pytest.mark.parametrize("what", PLACES)
def test_places_inside_the_output_are_refused(
    what: str, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_model_is_read(monkeypatch)
    verb, *options = PLACES[what]
    out = model.parent / "out"
    code, _, err = run(verb, model, "-o", out, *options, out / "state")
    assert (code, "expected a place outside OUTPUT" in err) == (1, True)
    code, _, err = run(verb, model, "-o", out, *options, file_there(model.parent / "f") / "x")
    assert (code, "is no directory" in err) == (1, True)


def test_drivers_look_at_their_checkpoint_first(model: Path, tmp_path: Path) -> None:
    place = file_there(tmp_path / "f") / "state"
    loaded = llmkern.load(model)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    calls: list[Callable[[], Any]] = [
        lambda: llmkern.quantize(loaded, group_size=32, calibration=TOKENS, checkpoint=place),
        lambda: llmkern.prune(loaded, sparsity=0.5, calibration=TOKENS, checkpoint=place),
        lambda: llmkern.distill(loaded, loaded, data=TOKENS, checkpoint=place),
    ]
    for call in calls:
        with pytest.raises(OSError, match=r"checkpoint: got .*f is no directory"):
            call()
    assert all(torch.equal(loaded.state_dict()[name], before[name]) for name in before)


def test_eval_and_compare_look_at_theirs(
    model: Path, tokens: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_there(model.parent / "f")
    with monkeypatch.context() as patched:
        no_model_is_read(patched)
        for place in (file / "x.json", model.parent):
            code, _, err = run("eval", model, "--tokens", tokens, "--json", place)
            assert code == 1
            assert "--json" in err
        for place in (file, file / "x"):
            code, _, err = run("compare", model, "-o", place)
            assert code == 1
            assert "--output" in err
    code, _, err = run("eval", model, "--tokens", tokens, "--json", model.parent / "new" / "x.json")
    assert code == 0, err
    assert "kl" in json.loads((model.parent / "new" / "x.json").read_text())


@pytest.mark.parametrize("verb", VERBS)
def test_what_belongs_to_a_model_goes_with_it(
    verb: str, model: Path, tokens: Path, run: Run
) -> None:
    out = model.parent / "out"
    code, _, err = run(*VERBS[verb](model, tokens), "-o", out)
    assert code == 0, err
    places = [out, out / "stages" / "1-quantize"] if verb == "compress" else [out]
    for place in places:
        for name, text in BESIDE.items():
            # The tokenizer's own files are written anew.
            wanted = (place / name).read_text() if name.startswith(("added", "special")) else text
            assert (place / name).read_text() == wanted, name
        for name in LEFT:
            assert name == "llmkern_report.json" or not (place / name).exists(), name
        report = place / "llmkern_report.json"
        assert verb == "compress" or '"old"' not in report.read_text()
        assert "auto_map" not in json.loads((place / "config.json").read_text())
        assert (place / "chat_template.jinja").read_text() == "{{ messages }}"
    assert llmkern.load(out) is not None


def test_stages_pass_it_on(model: Path, tokens: Path) -> None:
    stages = [Prune("magnitude", sparsity=0.5), Quantize("rtn", group_size=32)]
    out = model.parent / "out"
    Pipeline(stages).run(model, out, evaluation=TOKENS, speed=False, sensitivity=False)
    for place in (out, out / "stages" / "1-prune", out / "stages" / "2-quantize"):
        assert all((place / name).is_file() for name in BESIDE)


def test_another_tokenizer_does_not_get_the_files_of_the_first(model: Path, tmp_path: Path) -> None:
    other = words("only", "these")
    llmkern.save(llmkern.load(model), tmp_path / "out", other, source=model)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "preprocessor_config.json", "tokenizer.json"} <= names
    assert not {"tokenizer.model", "qwen.tiktoken", "added_tokens.json"} & names


def test_an_unreadable_licence_does_not_cost_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.warns(UserWarning, match=r"not carried over from .*LICENSE .Permission denied"):
        llmkern.save(llmkern.load(model), tmp_path / "out", source=model)
    assert llmkern.load(tmp_path / "out") is not None


SETTINGS: dict[str, dict[str, Any]] = {
    "temperature_without_sampling": {"do_sample": False, "temperature": 0.6},
    "as_llama_2": {"temperature": 0.9, "top_p": 0.6},
    "top_k_and_min_p": {"do_sample": False, "top_k": 20, "min_p": 0.1},
    "penalty_without_beams": {"length_penalty": 2.0, "early_stopping": True},
    "negative_padding": {"pad_token_id": -1},
}


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize("verb", ["quantize", "prune", "distill"])
def test_odd_generation_configs_do_not_keep_a_model_from_being_written(
    verb: str, what: str, model: Path, tokens: Path, run: Run
) -> None:
    (model / "generation_config.json").write_text(json.dumps(SETTINGS[what]))
    code, _, err = run(*VERBS[verb](model, tokens), "-o", model.parent / "out")
    assert code == 0, err
    assert llmkern.load(model.parent / "out").generation_config is not None


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_count_for_nothing_are_left_out(
    what: str, model: Path, tmp_path: Path
) -> None:
    """Where they were set on the model, transformers refuses to write them."""
    loaded = llmkern.load(model)
    for name, value in SETTINGS[what].items():
        setattr(loaded.generation_config, name, value)
    with pytest.warns(UserWarning, match=r"generation_config: .*=.* left out"):
        llmkern.save(loaded, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not SETTINGS[what].keys() & written.keys() - {"do_sample"}


def test_settings_without_a_meaning_are_refused_at_once(model: Path, tmp_path: Path) -> None:
    loaded = llmkern.load(model)
    loaded.generation_config.max_new_tokens = -3
    with pytest.raises(ValueError, match=r"generation_config: .*max_new_tokens"):
        llmkern.save(loaded, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    pipeline = Pipeline([Quantize("rtn", group_size=32)])
    with pytest.raises(ValueError, match=r"generation_config: .*max_new_tokens"):
        pipeline.run(loaded, tmp_path / "out", evaluation=TOKENS)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("spoilt", ["html", "markdown"])
def test_a_report_that_fails_leaves_the_models(
    spoilt: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(report: object) -> str:
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(f"llmkern.report.write.{spoilt}", fail)
    out = model.parent / "out"
    with pytest.warns(
        UserWarning, match=r"not all of it was written \(ImportError: numpy.*are whole"
    ):
        Pipeline([Quantize("rtn", group_size=32)]).run(
            model, out, evaluation=TOKENS, speed=False, sensitivity=False
        )
    assert llmkern.load(out) is not None
    assert (out / "report.json").is_file()


def test_a_drivers_report_that_fails_leaves_the_model(
    model: Path, tokens: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmkern.cli._shared.write_json", fail)
    code, _, err = run(*VERBS["quantize"](model, tokens), "-o", model.parent / "out")
    assert code == 0
    assert "llmkern_report.json: not written" in err
    assert llmkern.load(model.parent / "out") is not None


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupted_command_says_what_is_left(
    verb: str, model: Path, tokens: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", stop)
    out = model.parent / "out"
    code, _, err = run(*VERBS[verb](model, tokens), "-o", out)
    assert code == 130
    assert "interrupted: " in err
    assert "--resume goes on" in err if verb == "compress" else f"{out} is as it was" in err
    assert not (out / "config.json").exists()
    assert not list(model.parent.rglob("*.partial-*"))


def test_the_home_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    llmkern.save(llmkern.load("~/model"), "~/out", source="~/model")
    assert (model.parent / "out" / "LICENSE").is_file()
    Pipeline([Quantize("rtn", group_size=32)]).run(
        "~/model", "~/run", evaluation=TOKENS, speed=False, sensitivity=False
    )
    assert (model.parent / "run" / "LICENSE").is_file()


def test_nothing_is_left_of_a_look_at_a_place(tmp_path: Path) -> None:
    _files.check_writable(tmp_path / "a" / "b" / "c")
    with pytest.raises(OSError, match="nothing can be written"):
        _files.check_writable(tmp_path / "a" / ("b" * 300) / "c")
    assert not list(tmp_path.iterdir())


def test_no_tokenizer_is_no_error(tmp_path: Path) -> None:
    write_tokenizer(None, tmp_path)

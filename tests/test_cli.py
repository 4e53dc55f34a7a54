"""The command line: a model in, a smaller one out; and every mistake answered with one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import llmkern
from llmkern import assets, ops

MODEL = str(assets.bundled_model_dir())
CALIBRATION = ["--calibration", str(assets.calibration_text()), "--samples", "4", "--seq-len", "64"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.pt"
    torch.save(torch.randint(3, 2000, (4, 64)), path)
    return path


def test_quantize_eval_generate(run: Run, tmp_path: Path, tokens: Path) -> None:
    out, result = tmp_path / "out", tmp_path / "result.json"
    code, _, err = run("quantize", MODEL, "-o", out, "--bits", "4", *CALIBRATION)
    assert code == 0, err
    command = ["eval", out, "--tokens", tokens, "--seq-len", "64", "--reference", MODEL]
    code, _, err = run(*command, "--json", result)
    assert code == 0, err
    values = json.loads(result.read_text())
    wanted = {"perplexity", "kl", "top1_agreement", "weight_bytes"}
    wanted |= {"prefill_tokens_per_s", "decode_tokens_per_s", "protocol"}
    assert wanted <= values.keys()
    dtype = values["protocol"].pop("compute_dtype")
    assert dtype in ("bfloat16", "float32")  # as the processor is
    assert values["protocol"] == {"tokens": 256, "window": 64}
    assert 0 < values["kl"] < 1
    assert values["top1_agreement"] > 0.5
    code, text, err = run("generate", out, "--prompt", "def main():", "--max-new-tokens", "8")
    assert code == 0, err
    assert text.startswith("def main():")
    assert len(text) > len("def main():\n")


def test_rules_choose_bits_per_layer(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rules = ["--rule", "*.mlp.*=3:64", "--rule", "*.o_proj=dense"]
    code, _, err = run("quantize", MODEL, "-o", out, "--method", "rtn", *rules)
    assert code == 0, err
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    formats = {(g["weights"]["num_bits"], g["weights"].get("group_size")) for g in groups.values()}
    assert formats == {(3, 64), (4, 128)}
    report = json.loads((out / "llmkern_report.json").read_text())
    assert any(name.endswith("o_proj") for name in report["dense"])


def test_prune_writes_a_plain_model(run: Run, tmp_path: Path, tokens: Path) -> None:
    out, result = tmp_path / "out", tmp_path / "result.json"
    rules = ["--rule", "*.o_proj=dense", "--rule", "*.down_proj=0.25"]
    command = ["prune", MODEL, "-o", out, "--method", "sparsegpt", "--pattern", "2:4", *rules]
    code, text, err = run(*command, *CALIBRATION)
    assert code == 0, err
    assert "layers pruned" in text
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    report = json.loads((out / "llmkern_report.json").read_text())
    assert report["amount"] == {"pattern": "2:4"}
    assert {layer["pattern"] for layer in report["layers"]} == {"2:4", None}
    assert any(name.endswith("o_proj") for name in report["kept"])
    weight = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert bool((weight.unflatten(1, (-1, 4)).count_nonzero(2) == 2).all())
    command = ["eval", out, "--tokens", tokens, "--seq-len", "64", "--reference", MODEL]
    code, _, err = run(*command, "--json", result)
    assert code == 0, err
    assert 0 < json.loads(result.read_text())["kl"] < 5


def test_env_lists_every_op_and_backend(run: Run) -> None:
    code, text, _ = run("env")
    assert code == 0
    for word in (*ops.OPS, "triton", "reference", "torch"):
        assert word in text


def bad_tokens(folder: Path) -> Path:
    save_file({"tokens": torch.full((2, 64), 5000)}, folder / "tokens.safetensors")
    return folder / "tokens.safetensors"


def truncated_model(folder: Path) -> Path:
    for file in Path(MODEL).iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(
            data[: len(data) // 2 if "safetensors" in file.name else None]
        )
    return folder


def empty_file(folder: Path) -> Path:
    (folder / "empty.txt").write_text("")
    return folder / "empty.txt"


MISTAKES = {
    "not_a_model": (lambda d: ["quantize", d, "-o", d / "o"], "config.json"),
    "truncated_weights": (lambda d: ["quantize", truncated_model(d), "-o", d / "o"], "safetensors"),
    "empty_calibration": (
        lambda d: ["quantize", MODEL, "-o", d / "o", "--calibration", empty_file(d)],
        "empty",
    ),
    "missing_calibration": (
        lambda d: ["quantize", MODEL, "-o", d / "o", "--calibration", d / "none.txt"],
        "none.txt",
    ),
    "tokens_outside_vocabulary": (
        lambda d: ["eval", MODEL, "--tokens", bad_tokens(d), "--seq-len", "64"],
        "5000",
    ),
    "group_size": (
        lambda d: ["quantize", MODEL, "-o", d / "o", "--group-size", "100"],
        "group_size",
    ),
    "bits": (lambda d: ["quantize", MODEL, "-o", d / "o", "--bits", "5"], "bits"),
    "method": (lambda d: ["quantize", MODEL, "-o", d / "o", "--method", "awk"], "method"),
    "rule": (lambda d: ["quantize", MODEL, "-o", d / "o", "--rule", "mlp"], "--rule"),
    "prune_method": (
        lambda d: ["prune", MODEL, "-o", d / "o", "--method", "snip", "--sparsity", "0.5"],
        "method: got 'snip'",
    ),
    "prune_amount": (lambda d: ["prune", MODEL, "-o", d / "o"], "sparsity, pattern: got none"),
    "prune_pattern": (
        lambda d: ["prune", MODEL, "-o", d / "o", "--pattern", "4:2"],
        "pattern: got '4:2'",
    ),
    "prune_rule": (
        lambda d: ["prune", MODEL, "-o", d / "o", "--sparsity", "0.5", "--rule", "*=half"],
        "--rule: got '*=half'",
    ),
    "prune_ignored_option": (
        lambda d: [
            *("prune", MODEL, "-o", d / "o", "--method", "magnitude", "--sparsity", "0.5"),
            *("--damp", "0.1"),
        ],
        "--damp: got 0.1, expected nothing: --method magnitude has no such option",
    ),
    "prune_ignored_data": (
        lambda d: [
            *("prune", MODEL, "-o", d / "o", "--method", "magnitude", "--sparsity", "0.5"),
            *("--samples", "64"),
        ],
        "samples: got 64, expected no data options",
    ),
    "dtype": (lambda d: ["eval", MODEL, "--tokens", d / "t.pt", "--dtype", "int8"], "--dtype"),
    "text_and_tokens": (lambda d: ["eval", MODEL], "--text, --tokens"),
    "window_beyond_context": (
        lambda d: ["eval", MODEL, "--text", assets.evaluation_text(), "--seq-len", "9999"],
        "9999",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_that_says_what_was_wrong(
    run: Run, tmp_path: Path, mistake: str
) -> None:
    arguments, fragment = MISTAKES[mistake]
    code, _, err = run(*arguments(tmp_path))
    lines = [line for line in err.splitlines() if line.startswith("llmkern: error:")]
    assert code == 1
    assert len(lines) == 1
    assert fragment in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_output_that_holds_a_model_is_kept(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["quantize", MODEL, "-o", out, "--method", "rtn"]
    assert run(*command)[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, err = run(*command, "--bits", "3")
    assert code == 1
    assert "overwrite" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(*command, "--bits", "3", "--overwrite")[0] == 0
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]


@pytest.mark.parametrize(
    "option",
    [
        ("--calibration", "text.txt"),
        ("--samples", "128"),
        ("--seq-len", "64"),
        ("--seed", "1"),
        ("--batch-size", "4"),
    ],
    ids=lambda option: option[0],
)
@pytest.mark.parametrize("method", ["rtn", "nf4"])
def test_methods_without_data_refuse_what_they_would_ignore(
    run: Run, tmp_path: Path, method: str, option: tuple[str, ...]
) -> None:
    code, _, err = run("quantize", MODEL, "-o", tmp_path / "out", "--method", method, *option)
    assert code == 1
    assert f"{option[0]}: got" in err
    assert f"--method {method} does not calibrate" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--damp", "0.1"),
        ("--act-order",),
        ("--group-scales", "static"),
        ("--true-sequential",),
        ("--keep-zeros",),
    ],
    ids=lambda option: option[0],
)
@pytest.mark.parametrize("method", ["rtn", "nf4"])
def test_options_of_other_methods_are_refused(
    run: Run, tmp_path: Path, method: str, option: tuple[str, ...]
) -> None:
    code, _, err = run("quantize", MODEL, "-o", tmp_path / "out", "--method", method, *option)
    value = option[1] if len(option) > 1 else True
    assert code == 1
    assert f"{option[0]}: got {value}, expected nothing: --method {method} has no such" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_tables_are_saved_for_bitsandbytes(run: Run, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    rules = ("--rule", "*.o_proj=dense", "--rule", "*.up_proj=4:32")
    code, _, err = run("quantize", MODEL, "-o", out, "--method", method, *rules)
    assert code == 0, err
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["bnb_4bit_quant_type"] == method
    model = llmkern.load(out)
    block = model.model.layers[0]
    assert block.mlp.up_proj.block_size == 32
    assert block.mlp.gate_proj.block_size == 64
    assert type(block.self_attn.o_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "3"), "bits: got 3, expected 4 for method 'nf4'"),
        (("--asymmetric",), "symmetric: got False, expected True for method 'nf4'"),
        (("--group-size", "-1"), "group_size: got None, expected a block size"),
        (("--group-size", "48"), "block_size: got 48, expected one of"),
        (("--clip-search",), "--clip-search: got True, expected nothing: --method nf4"),
        (("--rule", "*=3:32"), "--rule: got '*=3:32', expected PATTERN=4:BLOCK or PATTERN=dense"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else value[0],
)
def test_tables_refuse_what_they_cannot_be(
    run: Run, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, _, err = run("quantize", MODEL, "-o", tmp_path / "out", "--method", "nf4", *options)
    assert code == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_sparse_weights_run_sparse_and_say_so(run: Run, tmp_path: Path, tokens: Path) -> None:
    model = llmkern.load(MODEL)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            groups = module.weight.data.view(len(module.weight), -1, 4)
            groups.scatter_(2, groups.abs().topk(2, 2, largest=False).indices, 0)
    llmkern.save(model, tmp_path / "sparse", AutoTokenizer.from_pretrained(MODEL))
    results = {}
    for option in ("--dense", None):
        extra = () if option is None else (option,)
        file = tmp_path / "result.json"
        args = ("eval", tmp_path / "sparse", "--tokens", tokens, "--json", file)
        code, _, err = run(*args, *extra)
        assert code == 0
        assert ("linear layers are 2:4 sparse" in err) == (option is None)
        results[option] = json.loads(file.read_text())
    assert results[None]["weight_bytes"] < 0.7 * results["--dense"]["weight_bytes"]
    assert abs(results[None]["perplexity"] / results["--dense"]["perplexity"] - 1) < 1e-2
    code, out, err = run(
        "generate", tmp_path / "sparse", "--prompt", "def", "--max-new-tokens", "2"
    )
    assert code == 0, err
    assert "--dense turns this off" in err
    assert "sparse" not in out

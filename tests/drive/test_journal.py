"""Runs that are interrupted and go on from their journal: the same bits, and what is refused."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from typer.testing import CliRunner

import llmkern
from llmkern.calibrate import HiddenStates
from llmkern.cli import build_app
from llmkern.drive.journal import Journal, discard
from llmkern.train import _loop

VOCAB, LAYERS = 96, 3


tiny = partial(tiny_models.tiny, seed=0, std=0.1, num_hidden_layers=LAYERS)


def half_zero(**changes: Any) -> nn.Module:
    model = tiny(**changes)
    llmkern.prune(model, "magnitude", pattern="2:4")
    return model


def partly_packed() -> nn.Module:
    model = tiny("opt")
    llmkern.patch(model, {"*.0.fc1": llmkern.QuantFormat(4, 32)})
    return model


Case = tuple[Callable[[], nn.Module], Callable[..., Any], dict[str, Any]]
GLU = {"method": "glu", "ratio": 0.25, "round_to": 16}
CASES: dict[str, Case] = {
    "gptq": (tiny, llmkern.quantize, {"group_size": 32}),
    "gptq_16_bit_rows": (
        lambda: tiny("opt").bfloat16(),
        llmkern.quantize,
        {"bits": 3, "group_size": None, "symmetric": False},
    ),
    "gptq_beside_packed": (partly_packed, llmkern.quantize, {"group_size": 32}),
    "gptq_conv1d": (lambda: tiny("gpt2"), llmkern.quantize, {"group_size": 32}),
    "rtn": (tiny, llmkern.quantize, {"method": "rtn", "group_size": 64}),
    "nf4": (lambda: tiny("opt"), llmkern.quantize, {"method": "nf4", "group_size": 64}),
    "sparsegpt": (tiny, llmkern.prune, {"method": "sparsegpt", "pattern": "2:4"}),
    "wanda_owl_bias": (
        lambda: tiny("opt"),
        llmkern.prune,
        {"method": "wanda", "sparsity": 0.5, "allocation": "owl", "owl_threshold": 2.0},
    ),
    "magnitude": (tiny, llmkern.prune, {"method": "magnitude", "sparsity": 0.5}),
    "glu": (tiny, llmkern.prune, GLU),
    "glu_uneven": (tiny, llmkern.prune, GLU | {"allow_uneven": True, "keep_last": 0}),
    "glu_of_pruned": (half_zero, llmkern.prune, GLU),
    "glu_by_weights": (
        tiny,
        llmkern.prune,
        GLU | {"importance": "magnitude", "compensate": False},
    ),
    "mlp_conv1d": (lambda: tiny("gpt2"), llmkern.prune, GLU | {"method": "mlp"}),
    "heads": (tiny, llmkern.prune, {"method": "heads", "ratio": 0.5}),
    "taylor": (tiny, llmkern.prune, {"method": "taylor", "ratio": 0.5, "round_to": 16}),
    "glu_recovery": (tiny, llmkern.prune, GLU | {"recovery": "full", "recovery_steps": 4}),
    "depth_recovery": (
        tiny,
        llmkern.prune,
        {"method": "depth", "blocks": 1, "recovery": "full", "recovery_steps": 4},
    ),
}
NO_DATA = ("rtn", "nf4", "magnitude", "glu_by_weights")


def run(case: str, **more: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a case leaves, and its report without what a clock said."""
    make, driver, options = CASES[case]
    model = make()
    if case not in NO_DATA:
        tokens = torch.randint(3, VOCAB, (10, 24), generator=torch.Generator().manual_seed(1))
        more = {"calibration": tokens, "batch_size": 4, **more}
    return model, without_seconds(driver(model, **options, **more).to_dict())


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def settings(model: nn.Module) -> list[Any]:
    """Class, mode, sizes of every module, and whether it reads the model's own config."""
    return [
        (
            name,
            type(module),
            module.training,
            {k: v for k, v in vars(module).items() if type(v) is int},
            getattr(module, "config", model.config) is model.config,
        )
        for name, module in model.named_modules()
    ]


def assert_same(
    got: tuple[nn.Module, dict[str, Any]], wanted: tuple[nn.Module, dict[str, Any]]
) -> None:
    assert got[1] == wanted[1]
    assert settings(got[0]) == settings(wanted[0])
    assert got[0].config.to_dict() == wanted[0].config.to_dict()
    mine, theirs = got[0].state_dict(), wanted[0].state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(got[0](input_ids=tokens).logits, wanted[0](input_ids=tokens).logits)


class Interrupted(Exception):
    pass


@contextmanager
def interrupted(owner: type, name: str, index: int, *, after: bool = False) -> Iterator[None]:
    """Its method of that name raises when it is called for the block `index`, and ends the block."""
    original = getattr(owner, name)

    def replaced(self: Any, number: int, *args: Any) -> Any:
        if number == index and not after:
            raise Interrupted
        result = original(self, number, *args)
        if number == index:
            raise Interrupted
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, replaced)
        try:
            yield
        except Interrupted:
            return
    pytest.fail("not interrupted")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("depth")])
def test_goes_on_with_the_same_bits(case: str, tmp_path: Path) -> None:
    wanted = run(case)
    place = tmp_path / "state"
    for index, after in ((0, False), (0, True), (1, False), (LAYERS - 1, True)):
        with interrupted(Journal, "commit", index, after=after):
            run(case, checkpoint=place, resume=True)
    assert len(list(place.glob("block-*"))) == LAYERS
    assert not list(place.glob("*/hidden.safetensors"))
    assert_same(run(case, checkpoint=place, resume=True), wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_interruption_inside_a_block_loses_only_that_block(tmp_path: Path) -> None:
    wanted = run("gptq")
    with interrupted(HiddenStates, "advance", 1):
        run("gptq", checkpoint=tmp_path)
    assert [p.parent.name for p in tmp_path.glob("*/hidden.safetensors")] == ["block-00000"]
    committed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = Journal.commit

        def commit(self: Journal, index: int, *args: Any) -> None:
            committed.append(index)
            original(self, index, *args)

        patch.setattr(Journal, "commit", commit)
        assert_same(run("gptq", checkpoint=tmp_path, resume=True), wanted)
    assert committed == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["glu_recovery", "depth_recovery"])
def test_recovery_goes_on_from_its_own_checkpoint(case: str, tmp_path: Path) -> None:
    wanted = run(case)
    with interrupted(_loop._Run, "step", 2):
        run(case, checkpoint=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        done: list[int] = []
        original = _loop._Run.step

        def count(self: Any, *args: Any) -> Any:
            done.append(args[0])
            return original(self, *args)

        patch.setattr(_loop._Run, "step", count)
        assert_same(run(case, checkpoint=tmp_path, resume=True), wanted)
    assert done == [2, 3]


def test_finished_run_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run("sparsegpt", checkpoint=tmp_path)
    monkeypatch.setattr(HiddenStates, "run", lambda *args: pytest.fail("a block was run"))
    assert_same(run("sparsegpt", checkpoint=tmp_path, resume=True), wanted)


def test_seconds_of_the_earlier_run_count(tmp_path: Path) -> None:
    run("magnitude", checkpoint=tmp_path)
    last = tmp_path / f"block-{LAYERS - 1:05d}" / "block.json"
    state = json.loads(last.read_text())
    last.write_text(json.dumps(state | {"seconds": 1000.0}))
    report = llmkern.prune(tiny(), "magnitude", sparsity=0.5, checkpoint=tmp_path, resume=True)
    assert 1000 < report.seconds < 1100


def test_journal_changes_no_bit(tmp_path: Path) -> None:
    assert_same(run("gptq", checkpoint=tmp_path), run("gptq"))
    assert_same(run("glu", checkpoint=tmp_path / "other"), run("glu"))


# --- killed processes -----------------------------------------------------------------------------

# Forks before anything has been computed: each life is a process of its own, without the seconds that
# an import takes. It dies by SIGKILL in the middle of a call into the system, or at a random time.
LIVES = """
import importlib.util, os, random, signal, sys, threading
sys.path.append(sys.argv.pop())
spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
import torch
import llmkern._files, llmkern.drive.journal
case, place, out, seed = sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(owner, name, count):
    original = getattr(owner, name)
    def call(*args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0:
            die()
        return original(*args, **kwargs)
    setattr(owner, name, call)

def life(number):
    rng = random.Random(seed * 1000 + number)
    if number < 6:
        owner, name = [
            (os, "replace"), (os, "fsync"), (llmkern.drive.journal, "save_file"), (os, "unlink"),
            (llmkern.drive.journal, "sync_entry"), (os, "replace"),
        ][number]
        deadly(owner, name, rng.randint(1, 3))
    elif number < 10:
        threading.Timer(rng.uniform(0.05, 1.0), die).start()
    model, report = cases.run(case, checkpoint=place, resume=True)
    torch.save({"state": dict(model.state_dict()), "report": report,
                "config": model.config.to_dict()}, out)
    os._exit(0)

deaths = 0
for number in range(20):
    child = os.fork()
    if child == 0:
        try:
            life(number)
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        deaths += 1
    elif os.waitstatus_to_exitcode(status) != 0:
        sys.exit("a life ended by an error")
    elif deaths >= 3:
        break
print(deaths)
"""


# Packed layers and smaller ones: what the journal puts back is of these two kinds.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["gptq", "glu_uneven"])
def test_killed_at_random_points(case: str, tmp_path: Path) -> None:
    script, out = tmp_path / "lives.py", tmp_path / "out.pt"
    script.write_text(LIVES)
    seed = random.randrange(1000)
    command = [sys.executable, script, __file__, case, tmp_path / "state", out, str(seed)]
    command.append(Path(tiny_models.__file__).parent)
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"seed {seed}: {result.stderr[-2000:]}"
    assert int(result.stdout) >= 3, f"seed {seed}"
    got = torch.load(out, weights_only=True)
    model, report = run(case)
    assert got["report"] == report
    assert got["config"] == model.config.to_dict()
    assert all(torch.equal(got["state"][k], t) for k, t in model.state_dict().items())


# --- refusals ---------------------------------------------------------------------------------------


def test_state_without_resume_is_refused(tmp_path: Path) -> None:
    run("magnitude", checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint: got .*resume to go on from there"):
        run("magnitude", checkpoint=tmp_path)


def test_resume_needs_a_checkpoint() -> None:
    for case in ("magnitude", "gptq", "depth_recovery"):
        with pytest.raises(ValueError, match="checkpoint: got None with resume"):
            run(case, resume=True)


@pytest.mark.parametrize("case", ["gptq", "magnitude"])
def test_resume_of_an_empty_directory_starts(case: str, tmp_path: Path) -> None:
    assert_same(run(case, checkpoint=tmp_path / "new", resume=True), run(case))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="with other files in it"):
        run("magnitude", checkpoint=tmp_path)
    with pytest.raises(ValueError, match="got the file"):
        run("magnitude", checkpoint=tmp_path / "thesis.tex")
    discard(tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


def changed_weight(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damp": 0.02}, r"options\.damp: 0\.01 there, 0\.02 now"),
        ({"bits": 3}, r"formats.*bits=4.* there, .*bits=3.* now.*more"),
        ({"rules": {"*.k_proj": None}}, r"formats\..*k_proj: .* there, nothing now"),
        ({"method": "rtn"}, r'method: "gptq" there, "rtn" now'),
        ({"calibration": torch.ones(4, 24, dtype=torch.int64)}, "10 windows .* there, .*4 windows"),
        ({"batch_size": 2}, "batch_size: 4 there, 2 now"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    run("gptq", checkpoint=tmp_path)
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(3, VOCAB, (10, 24), generator=torch.Generator().manual_seed(1))
    asked = {"group_size": 32, "calibration": tokens, "batch_size": 4} | change
    if change.get("method") == "rtn":
        asked = {"group_size": 32, "method": "rtn"}
    with pytest.raises(ValueError, match=message):
        llmkern.quantize(model, checkpoint=tmp_path, resume=True, **asked)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_another_amount_is_refused(tmp_path: Path) -> None:
    llmkern.prune(tiny(), "magnitude", sparsity=0.5, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"amount\.sparsity: 0\.5 there, 0\.6 now"):
        llmkern.prune(tiny(), "magnitude", sparsity=0.6, checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r'driver: "prune" there, "quantize" now'):
        llmkern.quantize(tiny(), "rtn", group_size=32, checkpoint=tmp_path, resume=True)


def test_another_model_is_refused(tmp_path: Path) -> None:
    llmkern.prune(tiny(), "magnitude", sparsity=0.5, checkpoint=tmp_path)
    model = tiny()
    changed_weight(model)
    with pytest.raises(ValueError, match=r'weights: "sha256 .*" there, "sha256 .*" now'):
        llmkern.prune(model, "magnitude", sparsity=0.5, checkpoint=tmp_path, resume=True)
    wider = tiny(intermediate_size=160)
    with pytest.raises(ValueError, match=r"config\.intermediate_size: 128 there, 160 now"):
        llmkern.prune(wider, "magnitude", sparsity=0.5, checkpoint=tmp_path, resume=True)


def test_fingerprint_of_a_packed_model_does_not_depend_on_its_use(tmp_path: Path) -> None:
    """A first forward pass repacks the weights; the model is the same."""
    model = partly_packed()
    options = {"method": "magnitude", "sparsity": 0.5, "bias_compensation": False}
    llmkern.prune(copy.deepcopy(model), checkpoint=tmp_path, **options)
    model(input_ids=torch.arange(8)[None])
    llmkern.prune(model, checkpoint=tmp_path, resume=True, **options)


@pytest.mark.parametrize("name", ["block.json", "block.safetensors", "hidden.safetensors"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_damaged_state_is_named(name: str, tmp_path: Path) -> None:
    with interrupted(Journal, "commit", 1, after=True):
        run("gptq", checkpoint=tmp_path)
    path = tmp_path / "block-00001" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"{name}: got a damaged file"):
        run("gptq", checkpoint=tmp_path, resume=True)


# --- commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "--group-size", "32", "--method", "gptq"),
        ("quantize", "--group-size", "32", "--method", "rtn"),
        ("prune", "--method", "sparsegpt", "--pattern", "2:4"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_commands_resume_and_clean_up(command: tuple[str, ...], tmp_path: Path) -> None:
    verb, *options = command
    source, tokens = tmp_path / "model", tmp_path / "tokens.pt"
    tiny().save_pretrained(source)
    torch.save(torch.randint(3, VOCAB, (8, 16)), tokens)
    if "rtn" not in options:
        options += ["--calibration", str(tokens)]
    place = tmp_path / "state"

    def call(out: str, *more: str) -> int:
        arguments = [verb, str(source), "-o", str(tmp_path / out), *options, *more]
        result = CliRunner().invoke(build_app(), arguments)
        if isinstance(result.exception, Interrupted):
            raise result.exception
        return result.exit_code

    assert call("whole") == 0
    with interrupted(Journal, "commit", 1, after=True):
        call("out", "--checkpoint", str(place))
    assert place.is_dir()
    assert call("out", "--checkpoint", str(place)) != 0
    assert call("out", "--checkpoint", str(place), "--resume") == 0
    assert not place.exists()
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "whole")]
    assert weights[0] == weights[1]

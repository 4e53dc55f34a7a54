"""Every flag that scripts use, and the options that follow the methods."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llmkern import assets
from llmkern.cli import build_app
from llmkern.distill import METHODS as DISTILL
from llmkern.prune import METHODS
from llmkern.prune._method import PruneJob, PruneMethod, PruneWork
from llmkern.quantize import METHODS as QUANTIZE

MODEL = str(assets.bundled_model_dir())

# What a release has accepted stays accepted; "=" takes a value. Never take a line away here.
FLAGS = {
    "compare": """
        --methods= -o= --output= --calibration= --evaluation= --samples= --text-field= --seq-len=
        --windows= --steps= --seed= --prompt= --speed --no-speed --dtype= --device=
    """,
    "compress": """
        -o= --output= --recipe= --calibration= --evaluation= --evaluation-windows= --text-field=
        --prompt= --speed --no-speed --sensitivity --no-sensitivity --resume --no-resume --overwrite
        --no-overwrite --dry-run --dtype= --device=
    """,
    "demo": """
        -o= --output=
    """,
    "distill": """
        -o= --output= --method= --student= --student-layers= --student-width= --data= --samples=
        --text-field= --seq-len= --alpha= --temperature= --divergence= --beta= --hidden-weight=
        --attention-weight= --prompts= --answers= --answers-per-prompt= --answer-batch=
        --max-new-tokens= --sample-temperature= --top-p= --stop= --answer-pattern= --chat-template
        --demonstrations= --shots= --demonstration= --template= --prompt-len= --on-policy=
        --teacher-mix= --importance= --max-weight= --length-norm --no-length-norm --lm-weight=
        --refresh= --steps= --lr= --batch-size= --accumulate= --warmup= --weight-decay= --optimizer=
        --mixed-precision= --seed= --checkpoint= --checkpoint-every= --resume --no-resume --log-dir=
        --dtype= --device= --overwrite --no-overwrite
    """,
    "eval": """
        --text= --text-field= --tokens= --seq-len= --reference= --dtype= --device= --dense --json=
        --tasks= --limit= --num-fewshot= --batch-size= --include-path=
    """,
    "generate": """
        --prompt= --max-new-tokens= --temperature= --seed= --dtype= --device= --dense
    """,
    "prune": """
        -o= --output= --method= --sparsity= --pattern= --ratio= --calibration= --text-field=
        --samples= --seq-len= --seed= --scope= --allocation= --owl-threshold= --owl-lambda= --damp=
        --act-order --no-act-order --bias-compensation --no-bias-compensation --true-sequential
        --no-true-sequential --target-params= --importance= --compensate --no-compensate --round-to=
        --allow-uneven --no-allow-uneven --keep-first= --keep-last= --blocks= --criterion=
        --iterative --no-iterative --taylor= --parts= --gradient-samples= --recovery=
        --recovery-steps= --recovery-lr= --recovery-rank= --rule= --checkpoint= --resume --no-resume
        --dtype= --device= --overwrite --no-overwrite
    """,
    "quantize": """
        -o= --output= --method= --bits= --group-size= --asymmetric --no-asymmetric --calibration=
        --text-field= --samples= --seq-len= --seed= --damp= --act-order --no-act-order
        --group-scales= --clip-search --no-clip-search --true-sequential --no-true-sequential
        --keep-zeros --no-keep-zeros --rule= --checkpoint= --resume --no-resume --dtype= --device=
        --overwrite --no-overwrite
    """,
}


def parameters(command: str) -> dict[str, Any]:
    """The options of a command, by flag."""
    group: Any = typer.main.get_command(build_app())
    found = {}
    for parameter in group.commands[command].params:
        flags = [*parameter.opts, *getattr(parameter, "secondary_opts", [])]
        found |= dict.fromkeys(flags, parameter)
    return found


@pytest.mark.parametrize("command", FLAGS)
def test_flags_of_before_are_accepted(command: str) -> None:
    known = parameters(command)
    for word in FLAGS[command].split():
        flag = word.rstrip("=")
        assert flag in known, f"{command} {flag}"
        assert known[flag].is_flag == (flag == word), f"{command} {flag}"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("quantize", {"--batch-size"}),
        ("prune", {"--batch-size"}),
        ("distill", {"--layers", "--clip", "--keep-zeros", "--no-keep-zeros"}),
    ],
)
def test_every_option_of_a_driver_has_a_flag(command: str, flags: set[str]) -> None:
    assert flags <= parameters(command).keys()


@pytest.mark.parametrize(
    ("command", "methods"), [("quantize", QUANTIZE), ("prune", METHODS), ("distill", DISTILL)]
)
def test_every_option_of_every_method_has_a_flag_and_a_text(command: str, methods: Any) -> None:
    known = parameters(command)
    for method in methods:
        for field in dataclasses.fields(method.options):
            flag = "--" + field.name.replace("_", "-")
            assert flag in known
            assert len(known[flag].help) > 8, flag


def run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), list(map(str, arguments)))


def help_of(command: str) -> str:
    result = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(
        build_app(), [command, "--help"]
    )
    assert result.exit_code == 0
    return re.sub(r"[ │]+", " ", result.output)


def test_help_shows_each_methods_own_default_and_its_group() -> None:
    text = help_of("distill")
    assert "[default: 0.5; in_context: 0]" in text
    assert "[default: 2; gkd, in_context: 1]" in text
    assert "[default: on; rtn: off]" in help_of("quantize")
    assert "Methods gptq, rtn ─" in help_of("quantize")
    assert "Calibration data ─" in help_of("prune")
    assert "in [0, 1)" in help_of("prune")  # brackets are no markup


@dataclass(frozen=True)
class CoinOptions:
    """Options of `coin`.

    Attributes:
        bias: share of the weights that go.
        sides: names of the sides.
    """

    bias: float = 0.5
    sides: tuple[str, ...] | None = None


class Tossing(PruneWork):
    """Takes note of what it was asked for."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def run(self, job: PruneJob) -> None:
        self.seen.append(job.options)


def test_a_method_that_is_added_is_offered_and_runs(
    tmp_path: Path,
) -> None:
    work = Tossing()
    coin = PruneMethod(
        name="coin",
        about="what chance decides",
        options=CoinOptions,
        amounts=(),
        work=work,
        needs_amount=False,
    )
    METHODS.append(coin)
    try:
        text = help_of("prune")
        assert "coin: what chance decides" in text
        assert "Method coin ─" in text
        assert "Share of the weights that go. [default: 0.5]" in text
        given = ("--bias", 0.25, "--sides", "heads", "--sides", "tails")
        result = run("prune", MODEL, "-o", tmp_path / "out", "--method", "coin", *given)
        assert result.exit_code == 0, result.output
        assert work.seen == [CoinOptions(0.25, ("heads", "tails"))]
        result = run("prune", MODEL, "-o", tmp_path / "o", "--method", "wanda", "--bias", 0.25)
        assert str(result.exception) == (
            "--bias: got 0.25, expected nothing: --method wanda has no such option"
        )
    finally:
        METHODS.remove(coin)

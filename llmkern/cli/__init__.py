"""The llmkern command. Every error a user can cause is one line on stderr and a non-zero exit."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from llmkern._progress import STDERR, note
from llmkern.cli import (
    compare,
    compress,
    demo,
    distill,
    env,
    evaluate,
    generate,
    prune,
    quantize,
)

__all__ = ["build_app", "main"]

# As a shell reports a program that SIGINT has ended.
_INTERRUPTED = 130
RUN = "llmkern_run.json"


def build_app() -> typer.Typer:
    """The application, with an option for everything that the methods of this moment take."""
    app = typer.Typer(
        name="llmkern",
        help="Smaller, faster language models on hand-written kernels.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    for name, command in (
        ("compare", compare.command()),
        ("compress", compress.command()),
        ("demo", demo.demo),
        ("distill", distill.command()),
        ("env", env.env),
        ("eval", evaluate.command()),
        ("generate", generate.generate),
        ("prune", prune.command()),
        ("quantize", quantize.command()),
    ):
        app.command(name)(_interruptible(command))
    return app


def main() -> NoReturn:
    """Entry point: run the command, and turn errors into one line (LLMKERN_LOG=debug shows all)."""
    level = os.environ.get("LLMKERN_LOG", "warning").upper()
    _quieten_others()
    logging.basicConfig(level=getattr(logging, level, logging.WARNING))
    try:
        build_app()()
    except Exception as error:
        if level == "DEBUG":
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        note(f"llmkern: error: {text}")
        sys.exit(1)
    finally:
        _flush()
    sys.exit(0)


def _interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which says after Ctrl-C what is left of its work."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            note(f"llmkern: interrupted: {_left(kwargs)}")
            raise typer.Exit(_INTERRUPTED) from None

    return run


def _left(given: dict[str, Any]) -> str:
    """What is left of a command's work, by its options."""
    output, checkpoint = given.get("output"), given.get("checkpoint")
    if output is None:
        return "nothing was written"
    if (output / RUN).is_file():
        return f"finished stages are in {output}; the same command with --resume goes on"
    if checkpoint is not None and checkpoint.is_dir():
        return (
            f"{output} is as it was; what is finished is in {checkpoint}, and the same command with "
            "--resume goes on"
        )
    return f"{output} is as it was"


def _quieten_others() -> None:
    """No bars of other packages where standard error is no terminal: each redraws its line."""
    if not STDERR.isatty():
        for name in (
            "TQDM_DISABLE",
            "HF_HUB_DISABLE_PROGRESS_BARS",
            "HF_DATASETS_DISABLE_PROGRESS_BARS",
        ):
            os.environ.setdefault(name, "1")


def _flush() -> None:
    """Write what is left; if nobody reads it, let the interpreter not complain of that at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

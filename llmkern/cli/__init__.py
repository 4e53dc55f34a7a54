"""The llmkern command. Every error a user can cause is one line on stderr and a non-zero exit."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

import typer

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
        app.command(name)(command)
    return app


def main() -> NoReturn:
    """Entry point: run the command, and turn errors into one line (LLMKERN_LOG=debug shows all)."""
    level = os.environ.get("LLMKERN_LOG", "warning").upper()
    logging.basicConfig(level=getattr(logging, level, logging.WARNING))
    try:
        build_app()()
    except Exception as error:
        if level == "DEBUG":
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"llmkern: error: {text}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)

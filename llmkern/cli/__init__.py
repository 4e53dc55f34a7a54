"""The llmkern command. Every error a user can cause is one line on stderr and a non-zero exit."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

# Importing a command's module registers it.
from llmkern.cli import (  # noqa: F401
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
from llmkern.cli.app import app


def main() -> NoReturn:
    """Entry point: run the command, and turn errors into one line (LLMKERN_LOG=debug shows all)."""
    level = os.environ.get("LLMKERN_LOG", "warning").upper()
    logging.basicConfig(level=getattr(logging, level, logging.WARNING))
    try:
        app()
    except Exception as error:
        if level == "DEBUG":
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"llmkern: error: {text}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)

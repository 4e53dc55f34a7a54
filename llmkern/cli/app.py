"""What the commands share: the application, its argument types, opening a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    name="llmkern",
    help="Smaller, faster language models on hand-written kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
notes = Console(stderr=True, soft_wrap=True)

Model = Annotated[
    str, typer.Argument(metavar="MODEL_DIR", help="Directory of a Hugging Face model.")
]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens per window; by default a token tensor's width, else 512.")
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; a GPU if there is one by default.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="Directory for the state of unfinished work, deleted once OUTPUT is written."
    ),
]
Resume = Annotated[bool, typer.Option(help="Go on from the checkpoint of the same command.")]
Dense = Annotated[
    bool, typer.Option("--dense", help="Leave 2:4 sparse weights to the dense kernels.")
]


def open_model(
    model_dir: str, dtype: str | None, device: str | None, *, sparse: bool = False
) -> Any:
    """The model in `model_dir`, dense or compressed, on the device asked for.

    With `sparse`, layers with 2:4 sparse weights run on the sparse kernels, and one line says so.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    import llmkern

    disable_progress_bar()  # type: ignore[no-untyped-call]  # the command shows its own
    model: Any = llmkern.load(model_dir, dtype=parse_dtype(dtype) or "auto")
    if sparse:
        from llmkern.hf import accelerate_sparse

        found = accelerate_sparse(model)
        if found:
            notes.print(f"{model_dir}: {found}; --dense turns this off", highlight=False)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that --dtype names, or None where it is not given."""
    from llmkern._dtypes import FLOATS_BY_NAME

    if name is not None and name not in FLOATS_BY_NAME:
        raise ValueError(f"--dtype: got {name!r}, expected one of {', '.join(FLOATS_BY_NAME)}")
    return FLOATS_BY_NAME[name] if name else None


def open_tokenizer(model_dir: str) -> Any:
    """The tokenizer beside the model, or None where there is none."""
    from llmkern.hf import load_tokenizer

    return load_tokenizer(model_dir)


def given_options(context: typer.Context, own: Sequence[str]) -> dict[str, Any]:
    """The options that were written on the command line, without those in `own`."""
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name not in own and source is not None and source.name != "DEFAULT":
            given[name] = value
    return given

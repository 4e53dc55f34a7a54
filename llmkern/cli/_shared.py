"""What the commands share: argument types, opening a model, writing what was made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Protocol, cast

import typer
from rich.console import Console

from llmkern._progress import STDERR, STDOUT

if TYPE_CHECKING:
    import torch

console = Console(file=cast("IO[str]", STDOUT))
notes = Console(file=cast("IO[str]", STDERR), soft_wrap=True)

Model = Annotated[
    str, typer.Argument(metavar="MODEL_DIR", help="Directory of a Hugging Face model.")
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")]
Overwrite = Annotated[
    bool, typer.Option(help="Replace a model that OUTPUT already holds.", show_default=False)
]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens per window; by default a token tensor's width, else 512.")
]
DType = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; a GPU if there is one by default.")]
Dense = Annotated[
    bool, typer.Option("--dense", help="Leave 2:4 sparse weights to the dense kernels.")
]

# Panel and texts of options that mean more or less on a command line than in Python.
DATA = "Calibration data"
SOURCE = {
    "help": "Text, rows (.jsonl, .csv, .parquet) or tokens (.pt, .safetensors), a directory or a "
    "dataset's name; built-in text by default."
}
CHECKPOINT = {"help": "Directory for the state of unfinished work, deleted once OUTPUT is written."}
RESUME = {"help": "Go on from the checkpoint of the same command."}
EVALUATION = {"help": "The same, held out, to measure on; by default a bundled text."}
PROMPT = {
    "flags": ("--prompt",),
    "help": "To continue in the report; from the evaluation by default.",
}


class Report(Protocol):
    """Of a driver."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""


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


def write_model(
    model: Any,
    output: Path,
    tokenizer: Any,
    report: Report,
    *,
    overwrite: bool,
    finished: Path | None = None,
) -> None:
    """Save what a driver has made, with the driver's report beside it.

    Args:
        model, tokenizer: to be saved.
        output: the directory.
        report: for llmkern_report.json.
        overwrite: replace a model that is there.
        finished: the driver's checkpoint, of no use once the model is saved: deleted.
    """
    import llmkern
    from llmkern.drive import discard

    llmkern.save(model, output, tokenizer, overwrite=overwrite)
    if finished is not None:
        discard(finished)
    (output / "llmkern_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")

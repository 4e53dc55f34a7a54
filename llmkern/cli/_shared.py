"""What the commands share: argument types, opening a model, writing what was made of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Annotated, Any, Protocol, cast

import typer
from rich.console import Console

from llmkern._progress import STDERR, STDOUT, note
from llmkern.cli._options import flag

if TYPE_CHECKING:
    import torch

    from llmkern.pipeline import Stage

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


# Options that name a place in which a driver writes while it works.
_DIRECTORIES = ("checkpoint", "log_dir")
_PLACES = (*_DIRECTORIES, "answers")


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
        from llmkern.models import left_share

        found = accelerate_sparse(model)
        if found:
            notes.print(f"{model_dir}: {found}; --dense turns this off", highlight=False)
            notes.print(f"{model_dir}: {left_share(model, ())}", highlight=False)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that --dtype names, or None where it is not given."""
    from llmkern._dtypes import FLOATS_BY_NAME

    if name is not None and name not in FLOATS_BY_NAME:
        raise ValueError(f"--dtype: got {name!r}, expected one of {', '.join(FLOATS_BY_NAME)}")
    return FLOATS_BY_NAME[name] if name else None


def open_tokenizer(model_dir: str) -> Any:
    """The tokenizer beside the model, which can be saved; None where there is none."""
    from llmkern.hf import load_tokenizer
    from llmkern.hf.save import write_tokenizer

    tokenizer = load_tokenizer(model_dir)
    with TemporaryDirectory() as folder:
        write_tokenizer(tokenizer, Path(folder))
    return tokenizer


def check_output(
    output: Path, overwrite: bool, models: Sequence[str | None], places: Mapping[str, Any]
) -> None:
    """Refuse, before any model is read, what could not be written after all the work.

    Args:
        output: the directory to write.
        overwrite: replace a model that is there.
        models: directories that are read.
        places: options of the command; those that name a place to write in are looked at.

    Raises:
        OSError: the output is something that stays, or cannot be made.
        ValueError: the output would replace a model that is read; a place lies inside the output.
    """
    from llmkern._files import check_writable
    from llmkern.hf.save import check_target

    target = output.resolve()
    for directory in models:
        if directory is not None and Path(directory).resolve().is_relative_to(target):
            raise ValueError(
                f"--output: got {output}, expected a directory that holds no model read"
            )
    check_target(target, overwrite)
    for name in _PLACES:
        place = places.get(name)
        if place is not None and Path(place).resolve().is_relative_to(target):
            raise ValueError(
                f"{flag(name)}: got {place}, expected a place outside OUTPUT, which is made as a whole"
            )
        if place is not None:
            inside = name in _DIRECTORIES and Path(place).is_dir()
            check_writable(Path(place) / "new" if inside else Path(place), flag(name))


def data_options() -> tuple[str, ...]:
    """Names of the options that say what is calibrated on, and how."""
    from llmkern.drive import DataOptions

    return ("calibration", *(field.name for field in fields(DataOptions)))


def shaping(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a driver's options that may say something about the shapes that it leaves."""
    others = (*data_options(), "checkpoint", "resume")
    return {name: value for name, value in options.items() if name not in others}


def check_size(
    stage: Stage[Any], model_dir: str, original: str | None, dtype: str | None, output: Path
) -> None:
    """Refuse, before the model is read, what the driver will refuse of its shapes, and a full disk.

    Args:
        stage: what will be done, without data.
        model_dir: what it will be done to.
        original: the teacher's directory, where there is one.
        dtype: as given.
        output: the directory to write.

    Raises:
        OSError: the disk has no room for what will be written.
        ValueError, NotImplementedError: see `Stage.plan`.
    """
    from llmkern._files import check_space
    from llmkern.drive import Findings
    from llmkern.pipeline._shapes import read_shapes

    before = read_shapes(model_dir, parse_dtype(dtype))
    teacher = read_shapes(original, parse_dtype(dtype)) if original else before
    after = before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the driver says it again
        try:
            after = stage.plan(before, teacher, Findings())
        except NotImplementedError as error:
            if str(error):
                raise
            # The method does not say what it leaves; as a rule, no more than there was.
    check_space(output, after.on_disk())


def check_head(model_dir: str | None) -> None:
    """Refuse, before it is read, a model that gives no logits.

    Raises:
        ValueError: it has no head, or is none that can be read.
    """
    import transformers

    from llmkern.hf import find_model_class, read_config
    from llmkern.wire.checkpoint_files import read_checkpoint

    if model_dir is None:
        return
    files = read_checkpoint(model_dir)
    config = read_config(files)
    kind = find_model_class(files, config)
    headless: Any = transformers.MODEL_MAPPING
    if type(config) in headless and headless[type(config)] is kind:
        raise ValueError(
            f"{model_dir}: got {kind.__name__}, which has no head, expected a model that gives logits"
        )


def check_file(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        OSError: it is a directory, or nothing can be written there.
    """
    from llmkern._files import check_writable

    if path is not None and path.is_dir():
        raise IsADirectoryError(f"{option}: got the directory {path}, expected a file to write")
    if path is not None and not path.exists():
        check_writable(path, option)


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, in a directory that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    from llmkern._json import to_json

    path.write_text(to_json(value, indent=2, default=str) + "\n", encoding="utf-8")


def write_model(
    model: Any,
    output: Path,
    tokenizer: Any,
    report: Report,
    *,
    source: str | None,
    overwrite: bool,
    finished: Path | None = None,
) -> None:
    """Save what a driver has made, with the driver's report beside it.

    Args:
        model, tokenizer: to be saved.
        output: the directory.
        report: for llmkern_report.json.
        source: directory of the model, for the files that go with it.
        overwrite: replace a model that is there.
        finished: the driver's checkpoint, of no use once the model is saved: deleted.
    """
    import llmkern
    from llmkern.drive import discard

    llmkern.save(model, output, tokenizer, overwrite=overwrite, source=source)
    if finished is not None:
        discard(finished)
    path = output / "llmkern_report.json"
    try:
        write_json(path, report.to_dict())
    except (OSError, TypeError, ValueError) as error:  # the model is there
        note(f"{path}: not written ({error}); the model in {output} is whole")

"""Write a model with packed layers as a checkpoint that the field's tools read, all or nothing."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from llmkern._files import check_space, check_writable, sync_entry, sync_tree
from llmkern.hf._beside import carry_over
from llmkern.hf._foreign import release_dense
from llmkern.masks import forget_filled
from llmkern.models.conv1d import as_conv1d, conv1d_places
from llmkern.nn import PackedLinear, is_packed
from llmkern.wire import WIRES, packed_layers, use_wire, writing_wire
from llmkern.wire.checkpoint_files import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings of a generation_config that count only where do_sample is set, or num_beams.
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
_BEAMS = ("early_stopping", "length_penalty")


def save(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    source: str | Path | None = None,
    format: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Save a model and all that loading it needs.

    `IntLinear` layers are written in compressed-tensors' `pack-quantized` format: `llmkern.load` and
    `llmkern.accelerate` run them packed, transformers with compressed-tensors, vLLM and others read
    them as they are. `Lut4Linear` layers of NF4 or FP4 are written as bitsandbytes' 4-bit layers, for
    transformers with bitsandbytes. 2:4 sparse layers are written as the dense or int4 layers that they
    stand for, whose zeros are the pattern: `llmkern.accelerate` finds them again.

    Everything is written into a new directory beside the target, named `<directory>.partial-…`, and
    renamed when complete: a process that is killed leaves the target as it was.

    Args:
        model: a transformers model.
        directory: to be made; an empty one may exist.
        tokenizer: anything with `save_pretrained`, written beside the model.
        overwrite: replace the model that `directory` holds, all its files with it.
        source: directory of the model that this one was made from: chat templates, processors, licences,
            the model card and other files that go with a model are carried over from there.
        format: name of the checkpoint format for packed layers, "compressed-tensors" or "bitsandbytes";
            None is the first that holds them all.
        max_shard_size: split the weights into files of at most this size.

    Raises:
        FileExistsError: `directory` holds a model and `overwrite` is not set, or holds other files.
        OSError: it could not be written (full disk, no permission); the target is as it was.
        ValueError: not a transformers model, a layer's packed weight has been expanded, no
            checkpoint format (not `format`) holds the model's layers (int4 beside NF4, another book),
            or a generation_config or tokenizer that cannot be written.

    Warns:
        UserWarning: settings of the generation_config that count for nothing and keep it from being
            written are left out; files that could not be carried over.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: got {type(model).__name__}, expected a transformers model")
    target = Path(directory).expanduser().resolve()
    check_target(target, overwrite)
    release_dense(model)
    for spoilt in (wire.spoilt(model) for wire in WIRES):
        if spoilt is not None:
            raise ValueError(spoilt)
    forget_filled(model, "save")
    layers = packed_layers(model)
    if layers or format is not None:
        _choose_form(model, layers, format)
    elif getattr(model, "hf_quantizer", None) is None:
        use_wire(model, None)  # no layer is packed any more
    with ExitStack() as stack, replacing(target) as partial:
        stack.enter_context(_as_built(model))
        for layer in layers.values():
            # The tensors to be written take the kernel layout's place instead of lying beside it.
            stack.enter_context(layer.canonical())
        check_space(partial, _written_bytes(model))
        write_generation(model, partial)
        if not model.is_remote_code():
            # Code that was not run and does not go along: the config must not ask for it.
            vars(model.config).pop("auto_map", None)
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        write_tokenizer(tokenizer, partial)
        if source is not None:
            carry_over(Path(source).expanduser(), partial, tokenizer)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a directory that may not be replaced or cannot be made; nothing is changed.

    Raises:
        FileExistsError: see `check_content`.
        OSError: nothing can be written beside it, or it is a mount point.
    """
    check_content(target, overwrite)
    if os.path.ismount(target):
        raise OSError(
            f"{target}: got a mount point, which cannot be replaced as a whole; expected a directory "
            f"such as {target / 'model'}"
        )
    check_writable(target)


def check_content(target: Path, overwrite: bool) -> None:
    """Refuse a path with something that stays.

    Raises:
        FileExistsError: a file, files other than a model's, or a model and `overwrite` is not set.
    """
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: got a file, expected a directory to be made")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not (target / CONFIG).is_file():
        raise FileExistsError(
            f"{target}: got a directory with other files in it, expected a new or empty one"
        )
    if not overwrite:
        raise FileExistsError(
            f"{target}: got a directory that already holds a model, expected a new one, or overwrite"
        )


def _choose_form(
    model: PreTrainedModel, layers: Mapping[str, PackedLinear], format: str | None
) -> None:
    """Give the model the names and the config of the format that it will be written in."""
    foreign = getattr(model, "hf_quantizer", None) is not None
    if format is not None and (foreign or not layers):
        why = "transformers' quantizer writes it" if foreign else "no layer of it is packed"
        raise ValueError(f"format: got {format!r}, expected None for this model: {why}")
    wire = writing_wire(layers, format)
    unread = wire.unread(model, layers)
    if unread is not None:
        # Silence would mean random weights there.
        warnings.warn(f"save: {unread}: the directory loads with llmkern.load", stacklevel=3)
    # Where transformers holds on to layers, the config is that of the package that loaded them.
    if not foreign:
        use_wire(model, wire)


def write_generation(model: Any, directory: Path) -> None:
    """Write the generation_config, without what keeps transformers from writing it.

    Raises:
        ValueError: it cannot be written; names the setting.
    """
    if not model.can_generate():
        return
    settings = model.generation_config
    try:
        settings.save_pretrained(directory)
    except ValueError:
        dropped = _drop_unused(settings)
        try:
            settings.save_pretrained(directory)
        except ValueError as error:
            raise ValueError(f"generation_config: {' '.join(str(error).split())}") from error
        warnings.warn(
            f"save: generation_config: {', '.join(dropped)} left out, which counted for nothing without "
            "do_sample or num_beams",
            stacklevel=3,
        )


def _drop_unused(settings: Any) -> list[str]:
    """Put settings that others make meaningless back to their defaults; which, as "top_p=0.9"."""
    names: tuple[str, ...] = ()
    if settings.do_sample is not True:
        names += _SAMPLING
    if settings.num_beams in (None, 1):
        names += _BEAMS
    if settings.pad_token_id is not None and settings.pad_token_id < 0:
        names += ("pad_token_id",)
    usual = type(settings)()
    dropped = []
    for name in names:
        value, default = getattr(settings, name, None), getattr(usual, name, None)
        if value != default:
            dropped.append(f"{name}={value}")
            setattr(settings, name, default)
    return dropped


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the tokenizer, if there is one.

    Raises:
        ValueError: it cannot be saved.
    """
    if tokenizer is None:
        return
    try:
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # whatever the code of a tokenizer raises
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"tokenizer: got one that cannot be saved: {text}") from error


@contextmanager
def _as_built(model: PreTrainedModel) -> Iterator[None]:
    """Dense linears in the place of a Conv1D, whose weights files hold transposed, as one meanwhile."""
    held = {}
    for name, kind in conv1d_places(model).items():
        layer = model.get_submodule(name)
        if is_packed(layer) and not layer.WRITTEN_DENSE:
            continue
        held[name] = layer
        model.set_submodule(name, as_conv1d(layer.to_linear() if is_packed(layer) else layer, kind))
    try:
        yield
    finally:
        for name, layer in held.items():
            model.set_submodule(name, layer)


def _written_bytes(model: nn.Module) -> int:
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    whole = [m for m in model.modules() if is_packed(m) and m.WRITTEN_DENSE]
    dense = sum(m.in_features * m.out_features * m.dtype.itemsize for m in whole)
    return sum(tensors.values()) + dense


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory that becomes `target` when the block ends well and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(target, "partial")
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        _swap_in(partial, target)
    except SafetensorError as error:
        # safetensors reports a full disk as an error of its own.
        raise OSError(f"{target}: could not be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap_in(partial: Path, target: Path) -> None:
    replaced = None
    if target.is_dir() and any(target.iterdir()):
        replaced = _beside(target, "replaced")
        os.replace(target, replaced)
    try:
        os.replace(partial, target)
    except OSError:
        if replaced is not None:
            os.replace(replaced, target)
        raise
    sync_entry(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f"{target.name}.{what}-{secrets.token_hex(4)}")

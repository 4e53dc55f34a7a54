"""Load a checkpoint directory with its quantized layers running packed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkern.hf._architecture import find_model_class, read_config
from llmkern.hf._foreign import forget_quantizer
from llmkern.masks import forget_filled
from llmkern.models.resize import ENTRY, class_with_widths
from llmkern.nn import prepare
from llmkern.wire import Reader, reading_wire, record_formats
from llmkern.wire.checkpoint_files import CheckpointFiles, read_checkpoint
from llmkern.wire.pending import Pending

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Files that only a tokenizer has; those of older ones have no "tokenizer" in their names.
_TOKENIZERS = (
    *("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "tekken.json", "*.tiktoken"),
    *("sentencepiece*.model",),
)


def load(directory: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a model directory; layers in compressed-tensors' `pack-quantized` format stay packed.

    So do those of bitsandbytes' 4-bit checkpoints (NF4, FP4; one device), as `Lut4Linear`. Models that
    were pruned to a width of its own in each block load here only.

    Needs neither compressed-tensors nor memory for any dense copy of a packed layer. A directory
    without a `quantization_config` loads as the plain model that it is.

    Args:
        directory: holds config.json and safetensors weights, whoever wrote them.
        kwargs: go to transformers' `from_pretrained`: `dtype`, `device_map`, `attn_implementation` ...

    Returns:
        The model in eval mode, its quantized linears `IntLinear` modules.

    Raises:
        ValueError: not a model directory; damaged, missing, unexpected or misshapen tensors (named);
            scales with NaN or Inf (named); a quantization scheme that llmkern does not read (named);
            weights or code that would have to be executed.
    """
    if kwargs.get("trust_remote_code"):
        raise ValueError("trust_remote_code: got True, expected no remote code: it is never run")
    files = read_checkpoint(directory)
    wire = reading_wire(files)
    reader = None if wire is None else wire.reader(files)
    config = read_config(files)
    if reader is not None:
        from llmkern.wire._hook import METHOD

        config.quantization_config = {"quant_method": METHOD, "reader": reader}
    model_class = find_model_class(files, config)
    try:
        model, info = _with_widths(model_class, files, config).from_pretrained(
            files.directory,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed by name below, instead of in a log
            **kwargs,
        )
    except RuntimeError as error:
        raise ValueError(f"{files.directory}: {str(error).splitlines()[0]}") from error
    model.__class__ = model_class
    _check_loading(files, info, reader)
    if reader is not None:
        forget_quantizer(model)
        reader.fill(model)
        _check_filled(files, model)
        record_formats(model)
    forget_filled(model, "load")
    return prepare(model)  # type: ignore[no-any-return]


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer beside a model, or None where there is none.

    Raises:
        ValueError: there is one that cannot be read, for want of a package or of code that would have
            to be executed.
    """
    from transformers import AutoTokenizer

    path = Path(directory).expanduser()
    if not any(found for pattern in _TOKENIZERS for found in path.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever the code of a tokenizer raises
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: got a tokenizer that cannot be read: {text}") from error


def _with_widths(model_class: Any, files: CheckpointFiles, config: Any) -> Any:
    """The class itself, or one that builds each block in its own width where the config says so."""
    entry = files.config.get(ENTRY)
    if entry is None:
        return model_class
    layers = entry.get("layers") if isinstance(entry, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(o, dict) for o in layers.values()):
        raise ValueError(
            f"{files.directory}: {ENTRY}: got {entry!r}, expected the config entries of each block under "
            "layers"
        )
    return class_with_widths(model_class, config)


def _check_loading(files: CheckpointFiles, info: dict[str, Any], reader: Reader | None) -> None:
    why = None if reader is None else reader.explain(info["unexpected_keys"])
    if why is not None:
        raise ValueError(f"{files.directory}: {why}")
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape than the model's": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{files.directory}: tensors {what}: {', '.join(names[:3])}{more}")
    if info.get("error_msgs"):
        raise ValueError(f"{files.directory}: {info['error_msgs'][0]}")


def _check_filled(files: CheckpointFiles, model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Pending):
            raise ValueError(
                f"{files.directory}: {name}: got {type(module).__name__}, expected a packed layer: its "
                "reader has not filled it"
            )

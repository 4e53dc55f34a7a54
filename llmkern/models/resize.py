"""Models of another width or depth: the config that describes them, and the blocks that fit it.

The model class itself says what a config means: it is built on the meta device from the changed
config, and its parameters' shapes are compared with those that are wanted. So no table of
architectures is needed, and a change that the class cannot express is found before anything is done.

Widths that differ from block to block are written into the config as an entry of llmkern's own,

    "llmkern": {"layers": {"3": {"intermediate_size": 448}}}

which says from what config each block is built. Only `llmkern.load` reads it; transformers itself
refuses the sizes of the tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.models.blocks import find_blocks, text_config
from llmkern.models.linears import keep_columns, keep_rows
from llmkern.models.units import Units

ENTRY = "llmkern"
# Config entries that may be unset and then follow from the hidden size (GPT-2, GPT-Neo, Falcon).
_UNSET_WIDTHS = ("n_inner", "intermediate_size", "ffn_hidden_size")
# What configs call the number of key/value heads.
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")

# Attributes of modules that are no part of the function; types of those that are; names of those that
# number blocks.
_STATES = ("training", "gradient_checkpointing")
_CONSTANTS = (bool, int, float, str, type(None))
_NUMBERS = ("layer", "idx", "index", "block")

Overrides = Mapping[str, Any]


def changed_config(config: Any, overrides: Overrides) -> Any:
    """A copy of a transformers config with entries of its text part replaced.

    It describes dense weights: a `quantization_config` is left out.

    Raises:
        ValueError: the config class does not accept them.
    """
    changed = copy.deepcopy(config)
    vars(changed).pop("quantization_config", None)
    text = changed.get_text_config()
    try:
        for name, value in overrides.items():
            setattr(text, name, value)
        # As reading the file will do; not every class checks what is set later.
        again = type(text).from_dict(text.to_dict())
    except (
        Exception
    ) as error:  # config classes raise what they like, and have properties without setters
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(text).__name__} refuses {dict(overrides)}: {reason}") from error
    for name, value in overrides.items():
        if getattr(again, name, value) != value:
            raise ValueError(
                f"{type(text).__name__} reads {name} = {getattr(again, name)} from a file with {value}"
            )
    return changed


def resize_blocks(model: nn.Module, model_class: type[nn.Module], config: Any) -> None:
    """Replace the blocks of a new model by those of their own widths, where `config` says so.

    Under `torch.device("meta")`, as when a checkpoint is loaded, nothing is allocated.

    Raises:
        ValueError: the config's entry names a block that is not there, or sizes that the class refuses.
    """
    layers = (getattr(config, ENTRY, None) or {}).get("layers", {})
    blocks = find_blocks(model).modules
    built: dict[tuple[tuple[str, Any], ...], nn.ModuleList] = {}
    for index, overrides in layers.items():
        if not str(index).isdigit() or int(index) >= len(blocks):
            raise ValueError(
                f"config: {ENTRY}.layers: got block {index!r}, expected one of the {len(blocks)} blocks"
            )
        key = tuple(sorted(overrides.items()))
        if key not in built:
            variant = changed_config(config, overrides)
            delattr(variant, ENTRY)
            built[key] = find_blocks(model_class(variant)).modules
        blocks[int(index)] = built[key][int(index)]


def class_with_widths(model_class: Any, config: Any) -> Any:
    """The class itself, or one that builds each block in its own width where `config` says so."""
    if getattr(config, ENTRY, None) is None:
        return model_class

    def init(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        resize_blocks(self, model_class, config)

    # transformers goes by a class's name and module, too.
    names = {"__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), {**names, "__init__": init})


def skeleton(model: nn.Module, config: Any) -> nn.Module:
    """A model of `model`'s class and of `config`, without data.

    Raises:
        ValueError: the class cannot be built from it.
    """
    try:
        with torch.device("meta"):
            made = type(model)(config)
            resize_blocks(made, type(model), config)
    except Exception as error:  # model classes raise what they like
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(model).__name__} cannot be built: {reason}") from error
    return made


def empty_like(model: nn.Module) -> Any:
    """A dense model of the same class and config, without data."""
    return skeleton(model, changed_config(model.config, {}))


def unit_overrides(
    model: nn.Module, units: Units, count: int, *, name: str = "", index: int = 0
) -> dict[str, Any]:
    """The config entries with which the model class builds blocks of `count` such units.

    Args:
        model: the model as it is.
        units: units of its block `index`.
        count: how many are to be left.
        name: what to call the layer in messages.

    Raises:
        ValueError: the class cannot build it, as where the size of a head follows from the number of
            heads; says why.
    """
    block = find_blocks(model).modules[index]
    wanted = dict(shapes_in(block)) | wanted_shapes(block, units, count)
    reasons = []
    for overrides in _guesses(model, units, count):
        try:
            config = changed_config(model.config, overrides)
            built = skeleton(model, config)
        except ValueError as error:
            reasons.append(str(error))
            continue
        got = dict(shapes_in(find_blocks(built).modules[index]))
        odd = next((n for n in wanted if got.get(n) != wanted[n]), None)
        if odd is None:
            return overrides
        reasons.append(f"{odd} would be {got.get(odd)}, not {wanted[odd]}")
    why = reasons[-1] if reasons else f"no entry of its config says how many {units.what} there are"
    raise ValueError(
        f"{name or units.consumer}: got {count} of {len(units)} {units.what} to stay, expected a number "
        f"that {type(model).__name__} can be built with: {why}"
    )


def head_counts(model: nn.Module, units: Units, name: str = "") -> list[int]:
    """Numbers of heads that may be left, from one to all, that the model's config class accepts.

    Some classes want the number of query heads to divide the hidden size.

    Raises:
        ValueError: it accepts no other number than the present; says why.
    """
    counts = []
    reason: ValueError | None = None
    for count in range(1, len(units)):
        try:
            changed_config(model.config, next(_guesses(model, units, count)))
        except ValueError as error:
            reason = error
        else:
            counts.append(count)
    if reason is not None and not counts:
        raise ValueError(
            f"{name or units.consumer}: got {len(units)} {units.what}, expected some that can be fewer: "
            f"{reason}"
        )
    return [*counts, len(units)]


def _guesses(model: nn.Module, units: Units, count: int) -> Iterator[dict[str, Any]]:
    text = text_config(model)
    if units.kind == "attention":
        entries: dict[str, Any] = {"num_attention_heads": count * units.heads}
        for name in _KEY_HEADS if not units.one_key else ():
            if getattr(text, name, None) is not None:
                entries[name] = count
        # Without it, most classes divide the hidden size by the number of heads.
        yield entries | {"head_dim": units.head_dim}
        return
    for name, value in text.to_dict().items():
        if value == len(units) and type(value) is int:
            yield {name: count}
        # As a multiple of the hidden size.
        elif type(value) is int and value * text.hidden_size == len(units):
            yield {name: count // text.hidden_size} if count % text.hidden_size == 0 else {}
    for name in _UNSET_WIDTHS:
        if getattr(text, name, 0) is None:
            yield {name: count}


def wanted_shapes(block: nn.Module, units: Units, count: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that change when `count` of the block's units are left, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    kept = torch.arange(count)
    for name in (*units.producers, units.consumer):
        twin = _meta_copy(block.get_submodule(name))
        if name == units.consumer:
            keep_columns(twin, units.columns[kept].flatten())
        else:
            keep_rows(twin, units.rows(name, kept))
        shapes |= {f"{name}.{key}": tuple(p.shape) for key, p in twin.named_parameters()}
    return shapes


def keep_units(block: nn.Module, units: Units, kept: Tensor) -> None:
    """Leave only the units `kept` (int64) in the weights of a block.

    The rows and columns that stay keep their order, and what they hold. The modules' settings are
    those of the old width until `adopt_settings`.
    """
    for name in units.producers:
        keep_rows(block.get_submodule(name), units.rows(name, kept.cpu()))
    columns = units.columns[kept.cpu()].flatten().sort().values
    keep_columns(block.get_submodule(units.consumer), columns)


def other_setting(module: nn.Module, twin: nn.Module, *, sizes: bool) -> str | None:
    """The first constant of the modules below `module` that is another below `twin`, for people.

    Numbers of blocks may differ, and so may other whole numbers unless `sizes` are to be the same.
    """
    for name, own in module.named_modules():
        other = vars(twin.get_submodule(name))
        for key, value in vars(own).items():
            if key.startswith("_") or key in _STATES or key not in other:
                continue
            if (
                not all(isinstance(v, _CONSTANTS) for v in (value, other[key]))
                or value == other[key]
            ):
                continue
            whole = type(value) is int and type(other[key]) is int
            if not whole or (sizes and not any(word in key for word in _NUMBERS)):
                return f"{name}.{key} would be {other[key]}, not {value}".removeprefix(".")
    return None


def adopt_settings(module: nn.Module, twin: nn.Module) -> None:
    """Give the modules below `module` the counts, sizes and the config of those below `twin`.

    Args:
        module: a block, or a model.
        twin: the same in a model of another width or depth, as its class builds it (`skeleton`).
    """
    for name, own in module.named_modules():
        other = vars(twin.get_submodule(name))
        for key in vars(own).keys() & other.keys():
            if type(other[key]) is int or key == "config":
                setattr(own, key, other[key])


def set_width(model: nn.Module, overrides: Overrides) -> None:
    """Write a width that all blocks now have into the model's own config."""
    text = text_config(model)
    for name, value in overrides.items():
        setattr(text, name, value)
    share_config(model)


def set_widths(model: nn.Module, overrides: Sequence[Overrides]) -> None:
    """Write one width per block into the model's config: only `llmkern.load` reads the result."""
    write_widths(model.config, overrides)
    share_config(model, {index for index, entries in enumerate(overrides) if entries})


def write_widths(config: Any, overrides: Sequence[Overrides]) -> None:
    """Give `config` llmkern's entry for the config entries of each block."""
    layers = {str(index): dict(entries) for index, entries in enumerate(overrides) if entries}
    setattr(config, ENTRY, {"layers": layers})


def share_config(model: nn.Module, apart: frozenset[int] | set[int] = frozenset()) -> None:
    """Let the modules of the blocks read the model's own config, but for the blocks `apart`."""
    text = text_config(model)
    for index, block in enumerate(find_blocks(model).modules):
        for module in block.modules() if index not in apart else ():
            if type(getattr(module, "config", None)) is type(text):
                module.config = text  # type: ignore[assignment]


def shapes_in(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


def _meta_copy(linear: nn.Module) -> nn.Module:
    twin = copy.copy(linear)
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for name, p in linear._parameters.items()
    }
    return twin

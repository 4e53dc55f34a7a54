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
# Config entries that may be unset and then follow from the hidden size (GPT-2).
_UNSET_WIDTHS = ("n_inner",)

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
    for name, value in overrides.items():
        setattr(text, name, value)
    try:
        # As reading the file will do; not every class checks what is set later.
        type(text).from_dict(text.to_dict())
    except Exception as error:  # config classes raise what they like
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(text).__name__} refuses {dict(overrides)}: {reason}") from error
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


def skeleton(model: nn.Module, config: Any) -> nn.Module:
    """A model of `model`'s class and of `config`, without data."""
    with torch.device("meta"):
        made = type(model)(config)
        resize_blocks(made, type(model), config)
    return made


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
    wanted = dict(_shapes(block)) | wanted_shapes(block, units, count)
    reasons = []
    for overrides in _guesses(model, units, count):
        try:
            config = changed_config(model.config, overrides)
            built = skeleton(model, config)
        except ValueError as error:
            reasons.append(str(error))
            continue
        got = dict(_shapes(find_blocks(built).modules[index]))
        odd = next((n for n in wanted if got.get(n) != wanted[n]), None)
        if odd is None:
            return overrides
        reasons.append(f"{odd} would be {got.get(odd)}, not {wanted[odd]}")
    what = "key/value heads" if units.kind == "attention" else "neurons"
    raise ValueError(
        f"{name or units.consumer}: got {type(model).__name__}, which cannot be built with {count} of "
        f"{len(units)} {what}{f' ({reasons[-1]})' if reasons else ''}, expected a class that can"
    )


def head_counts(model: nn.Module, units: Units) -> list[int]:
    """Numbers of key/value heads, from one to all, that the model's config class accepts.

    Some classes want the number of query heads to divide the hidden size.
    """
    counts = []
    for count in range(1, len(units) + 1):
        try:
            changed_config(model.config, next(_guesses(model, units, count)))
        except ValueError:
            continue
        counts.append(count)
    return counts


def _guesses(model: nn.Module, units: Units, count: int) -> Iterator[dict[str, Any]]:
    text = text_config(model)
    if units.kind == "attention":
        entries: dict[str, Any] = {"num_attention_heads": count * units.heads}
        if getattr(text, "num_key_value_heads", None) is not None:
            entries["num_key_value_heads"] = count
        # Without it, most classes divide the hidden size by the number of heads.
        yield entries | {"head_dim": units.head_dim}
        return
    for name, value in text.to_dict().items():
        if value == len(units) and type(value) is int:
            yield {name: count}
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
            keep_rows(twin, units.producers[name][kept].flatten())
        shapes |= {f"{name}.{key}": tuple(p.shape) for key, p in twin.named_parameters()}
    return shapes


def keep_units(block: nn.Module, units: Units, kept: Tensor) -> None:
    """Leave only the units `kept` (int64) in the weights of a block.

    The rows and columns that stay keep their order, and what they hold. The modules' settings are
    those of the old width until `adopt_settings`.
    """
    for name, rows in units.producers.items():
        keep_rows(block.get_submodule(name), rows[kept.cpu()].flatten().sort().values)
    columns = units.columns[kept.cpu()].flatten().sort().values
    keep_columns(block.get_submodule(units.consumer), columns)


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
    _share_config(model)


def set_widths(model: nn.Module, overrides: Sequence[Overrides]) -> None:
    """Write one width per block into the model's config: only `llmkern.load` reads the result."""
    write_widths(model.config, overrides)
    _share_config(model, {index for index, entries in enumerate(overrides) if entries})


def write_widths(config: Any, overrides: Sequence[Overrides]) -> None:
    """Give `config` llmkern's entry for the config entries of each block."""
    layers = {str(index): dict(entries) for index, entries in enumerate(overrides) if entries}
    setattr(config, ENTRY, {"layers": layers})


def keep_blocks(model: nn.Module, kept: Sequence[int]) -> None:
    """Leave only the decoder blocks `kept`, in that order, and number them anew.

    Entries of the config with one value per block follow.

    Raises:
        ValueError: no block would be left, or the model class cannot be built that way (named); the
            model is then as it was.
    """
    blocks = find_blocks(model)
    if not kept:
        raise ValueError(f"kept: got no block of the {len(blocks)}, expected at least one")
    overrides = _depth_overrides(text_config(model), kept, len(blocks))
    config = changed_config(model.config, overrides)
    widths = (getattr(config, ENTRY, None) or {}).get("layers", {})
    if widths:
        layers = {str(i): widths[str(old)] for i, old in enumerate(kept) if str(old) in widths}
        setattr(config, ENTRY, {"layers": layers})
    built = skeleton(model, config)
    _check_depth(model, built, kept)
    for index in reversed(range(len(blocks))):
        if index not in kept:
            del blocks.modules[index]
    adopt_settings(blocks.modules, find_blocks(built).modules)
    for name, value in overrides.items():
        setattr(text_config(model), name, value)
    if widths:
        setattr(model.config, ENTRY, getattr(config, ENTRY))
    _share_config(model, {int(i) for i in (layers if widths else ())})


def _depth_overrides(text: Any, kept: Sequence[int], depth: int) -> dict[str, Any]:
    overrides: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in text.to_dict().items():
        # Lists of tokens may happen to be as long as the model is deep.
        if isinstance(value, list) and len(value) == depth and "token" not in name:
            overrides[name] = [value[index] for index in kept]
    return overrides


def _check_depth(model: nn.Module, built: nn.Module, kept: Sequence[int]) -> None:
    prefix = find_blocks(model).name
    outside = {n: s for n, s in _shapes(model) if not n.startswith(f"{prefix}.")}
    wanted = dict(outside)
    for index, old in enumerate(kept):
        block = find_blocks(model).modules[old]
        wanted |= {f"{prefix}.{index}.{name}": shape for name, shape in _shapes(block)}
    got = dict(_shapes(built))
    odd = next((n for n in (*wanted, *got) if got.get(n) != wanted.get(n)), None)
    if odd is not None:
        raise ValueError(
            f"model: got {type(model).__name__}, which cannot be built with blocks {list(kept)} alone "
            f"({odd} would be {got.get(odd)}, not {wanted.get(odd)}), expected a class that can"
        )


def _share_config(model: nn.Module, apart: frozenset[int] | set[int] = frozenset()) -> None:
    """Let the modules of the blocks read the model's own config, but for the blocks `apart`."""
    text = text_config(model)
    for index, block in enumerate(find_blocks(model).modules):
        for module in block.modules() if index not in apart else ():
            if type(getattr(module, "config", None)) is type(text):
                module.config = text  # type: ignore[assignment]


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


def _meta_copy(linear: nn.Module) -> nn.Module:
    twin = copy.copy(linear)
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for name, p in linear._parameters.items()
    }
    return twin

"""What transformers does to a checkpoint's names on the way into a model, and what it cannot hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def module_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The module that each linear of a file belongs to, by its name there.

    Files keep the names of older releases: `language_model.model.layers` is `model.language_model.layers`
    in a model of today. Those of a base model lack the prefix that the model around it adds.

    Raises:
        ValueError: a weight that the model holds as a part of another (named): packed ones cannot be put
            together.
    """
    # transformers is imported where it is needed: `import llmkern` brings torch only.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known, found = model.state_dict(), {}
    for name in names:
        key, prefix = f"{name}.weight", model.base_model_prefix
        renamed, part = rename_source_key(key, renamings, converters, prefix, known)
        if renamed not in known and key in known:
            renamed, part = key, None
        here = renamed.removesuffix(".weight")
        if part is not None:
            raise ValueError(
                f"{name}: got a packed weight, expected a dense one: {type(model).__name__} holds it as "
                f"a part of {here}"
            )
        found[name] = here
    return found


def merged(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The modules among `names` whose parameters transformers puts together from several of a file."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    targets = [re.compile(pattern) for c in converters for pattern in c.target_patterns]
    found = []
    for name in names:
        own = [
            f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters(recurse=False)
        ]
        if any(target.search(key) for target in targets for key in own):
            found.append(name)
    return found


def initialised(skeleton: PreTrainedModel, names: Iterable[str]) -> str | None:
    """The first module that the model's own initialisation cannot pass over once linears have no weight.

    transformers calls that method on every module after loading, packed linears of others among them.
    """
    with torch.random.fork_rng(devices=[]):
        odd = _tripping(skeleton)  # over something else, without data
        for name in names:
            skeleton.get_submodule(name)._parameters.pop("weight", None)
        return next((name for name in _tripping(skeleton) if name not in odd), None)


def _tripping(skeleton: PreTrainedModel) -> list[str]:
    found = []
    for name, module in skeleton.named_modules():
        try:
            skeleton._init_weights(module)  # type: ignore[no-untyped-call]
        except Exception:  # of the model's own code
            found.append(name)
    return found


def rebuilt(model: PreTrainedModel, method: str) -> str | None:
    """The first module that transformers builds in another way for a quantized model, as of Llama 4."""
    try:
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHED
    except ImportError:
        return None
    for name, module in model.named_modules():
        entry: Any = PATCHED.get(type(module).__name__, {})
        if method in [getattr(m, "value", m) for m in entry.get("quantization_methods", ())]:
            return str(name)
    return None


def odd_classes(skeleton: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules among `names` that are no nn.Linear itself."""
    found = {name: skeleton.get_submodule(name) for name in names}
    return {name: module for name, module in found.items() if type(module) is not nn.Linear}

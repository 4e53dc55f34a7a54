"""Recipes: a pipeline as a plain YAML list of stages.

    - prune:    {method: glu, ratio: 0.25, importance: obs}
    - quantize: {method: gptq, bits: 4, group_size: 128}

Every error names the file, the line and the key. Numbers are those of YAML 1.2: 1e-3 is a number, 2:4
is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmkern.pipeline._options import nearest
from llmkern.pipeline.stages import STAGES, Stage

DEFAULT = """\
- prune: {method: glu, ratio: 0.25, importance: obs}
- quantize: {method: gptq, bits: 4}
- distill: {method: soft, student: {layers: 0.5}, temperature: 2.0, alpha: 0.5, steps: 500, lr: 1.0e-3}
"""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, r) for tag, r in resolvers if tag.endswith((":null", ":merge"))])
}
_NUMBER = r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?"
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?\d+$", "-+0123456789"),
    ("float", rf"^{_NUMBER}$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 reads 010 as eight.
    return int(loader.construct_scalar(node))


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load_recipe(path: str | Path) -> list[Stage[Any]]:
    """The stages of a recipe file.

    Raises:
        ValueError: no such file, no list of {stage: options}, an unknown stage, method or option (with
            the nearest known one), a value that the stage refuses; names file, line and key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ValueError(f"recipe: got {str(path)!r}, expected a YAML file ({reason})") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str = "recipe") -> list[Stage[Any]]:
    """The stages of a recipe's text; errors are those of `load_recipe`.

    Args:
        text: YAML.
        name: of the file, for messages.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{name}:{line}: got no valid YAML ({error.problem})") from error
    except yaml.YAMLError as error:  # characters that YAML forbids
        raise ValueError(f"{name}: got no valid YAML ({error})") from error
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        line = 1 if root is None else root.start_mark.line + 1
        raise ValueError(
            f"{name}:{line}: got no list of stages, expected entries like '- prune: {{method: glu}}'"
        )
    return [_stage(node, name) for node in root.value]


def dump_recipe(stages: Iterable[Stage[Any]]) -> str:
    """The recipe that `parse_recipe` reads as these stages."""
    entries = [stage.to_dict() for stage in stages]
    return yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, width=1 << 16)


def default_recipe() -> list[Stage[Any]]:
    """Prune, quantize, distill: what runs where no recipe is given."""
    return parse_recipe(DEFAULT, "the default recipe")


def _stage(node: yaml.Node, file: str) -> Stage[Any]:
    where = f"{file}:{node.start_mark.line + 1}"
    entries = _pairs(node, file) if isinstance(node, yaml.MappingNode) else []
    if len(entries) != 1:
        got = f"{len(entries)} keys" if entries else _shown(node)
        raise ValueError(f"{where}: got {got}, expected one stage as in 'prune: {{method: glu}}'")
    kind, line, value = entries[0]
    where = f"{file}:{line}"
    if kind not in STAGES:
        raise ValueError(f"{where}: {kind}: unknown stage, {nearest(kind, STAGES)}")
    if not isinstance(value, yaml.MappingNode):
        raise ValueError(
            f"{where}: {kind}: got {_shown(value)}, expected its options as in '{{method: "
            f"{STAGES[kind].default}}}'"
        )
    pairs = _pairs(value, f"{file}: {kind}")
    lines = {key: line for key, line, _ in pairs}
    options = {key: _value(item, file) for key, _, item in pairs}
    try:
        return STAGES[kind](**options)
    except (ValueError, NotImplementedError) as error:
        # Messages begin with the option that they are about.
        keys = re.split(r"[:.\[]", str(error), maxsplit=1)[0].split(", ")
        at = next((lines[key] for key in keys if key in lines), line)
        raise ValueError(f"{file}:{at}: {kind}: {error}") from error


def _pairs(node: yaml.MappingNode, file: str) -> list[tuple[str, int, yaml.Node]]:
    """(key, its line, value) of a mapping, each key once."""
    pairs: list[tuple[str, int, yaml.Node]] = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{file}:{line}: got a key that is no plain word")
        first = next((old for name, old, _ in pairs if name == key.value), None)
        if first is not None:
            where = ":".join([*file.split(": ")[:1], str(line)])
            stage = "".join(f"{part}: " for part in file.split(": ")[1:])
            raise ValueError(f"{where}: {stage}{key.value}: given before, in line {first}")
        pairs.append((key.value, line, value))
    return pairs


def _value(node: yaml.Node, file: str) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        line = node.start_mark.line + 1
        raise ValueError(f"{file}:{line}: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "an empty mapping"

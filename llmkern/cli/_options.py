"""Options of commands, made from the annotations and docstrings of the code that gets them.

A command is written as a function with the parameters that are its own and `**options`; `with_options`
puts the made options in the place of the latter. What was not written on the command line is not passed
on, so that the defaults are those of the code below, and each method has its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union

import typer
from rich.markup import escape

from llmkern.calibrate.data import Source
from llmkern.cli._docstrings import brief, entries, refers
from llmkern.drive import Method, find_method

ALL = "All methods"

_M = TypeVar("_M", bound=Method)


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: of the argument or field that gets it, and with dashes the flag.
        kind: bool, int, float, str, Path, list[str], or a function from what is written to the value.
        help: a sentence.
        default: what holds if it is not given, for the reader; "" says nothing.
        panel: heading of its group in the help.
        flags: in place of the flag made from the name, as typer takes them.
        metavar: what stands for the value in the help.
    """

    name: str
    kind: Any
    help: str
    default: str = ""
    panel: str | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None

    def parameter(self) -> inspect.Parameter:
        """The parameter of which typer makes the option."""
        text = escape(f"{self.help} Repeatable." if self.kind == list[str] else self.help)
        if self.default:
            text += f" [dim]{escape(f'[default: {self.default}]')}[/dim]"
        extra: dict[str, Any] = {}
        kind, metavar = self.kind, self.metavar
        if not isinstance(kind, type | types.GenericAlias):
            kind, extra["parser"] = str, self.kind
            metavar = metavar or _METAVARS.get(self.kind)
        declared = typer.Option(
            *self.flags,
            help=text,
            rich_help_panel=self.panel,
            metavar=metavar,
            show_default=False,
            **extra,
        )
        # A type known only now.
        annotation = Annotated[kind | None, declared]  # type: ignore[valid-type]
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )


@dataclass(frozen=True)
class _Field:
    """An argument or a field as the code declares it."""

    name: str
    hint: Any
    default: Any
    text: str


def flag(name: str) -> str:
    """The flag of an option: "--group-size"."""
    return "--" + name.replace("_", "-")


def from_function(
    function: Callable[..., Any], panels: Mapping[str, str | None], **changes: Mapping[str, Any]
) -> list[Option]:
    """Options for keyword-only parameters of a function.

    Args:
        function: with an Args section.
        panels: the parameters that become options, each with its panel.
        changes: by name, what differs from what is made: attributes of `Option`.
    """
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    texts = entries(function.__doc__, "Args")
    fields = [
        _Field(name, hints[name], parameters[name].default, texts.get(name, "")) for name in panels
    ]
    return _options(fields, panels, changes)


def from_dataclass(
    kind: type, panels: Mapping[str, str | None] | str, **changes: Mapping[str, Any]
) -> list[Option]:
    """Options for fields of a dataclass with an Attributes section.

    Args:
        kind: the dataclass.
        panels: the fields that become options, each with its panel; or the panel of all of them.
        changes: by name, what differs from what is made: attributes of `Option`.
    """
    fields = _fields(kind)
    if isinstance(panels, str):
        panels = dict.fromkeys((field.name for field in fields), panels)
    return _options([field for field in fields if field.name in panels], panels, changes)


def from_methods(
    methods: Sequence[Method], without: Collection[str] = (), **changes: Mapping[str, Any]
) -> list[Option]:
    """One option for each field of the methods' dataclasses, grouped by who has it.

    Args:
        methods: in the order of the groups.
        without: names that mean something else for the command.
        changes: by name, what differs from what is made: attributes of `Option`.
    """
    owners: dict[str, dict[str, _Field]] = {}
    for method in methods:
        for field in _fields(method.options):
            if field.name not in without:
                owners.setdefault(field.name, {})[method.name] = field
    made = []
    for name, fields in owners.items():
        kind = _common({_kind(field.hint, field.default) for field in fields.values()})
        if kind is None:
            continue
        names = list(fields)
        panel = f"Method{'s' if len(names) > 1 else ''} {', '.join(names)}"
        if len(names) == len(methods) > 1:
            panel = ALL
        option = Option(name, kind, _text(fields), _defaults(fields), panel)
        made.append(dataclasses.replace(option, **changes.get(name, {})))
    order = list(dict.fromkeys(option.panel for option in made))
    return sorted(made, key=lambda option: order.index(option.panel))


def with_options(
    function: Callable[..., None], options: Sequence[Option]
) -> Callable[[typer.Context], None]:
    """A command with these options in place of the function's `**options`.

    Args:
        function: a command; it gets those of the options that were given.
        options: see above; those with the name of one of the function's own parameters are left out.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    taken = {parameter.name for parameter in own}
    made = [option for option in options if option.name not in taken]

    def command(context: typer.Context, **values: Any) -> None:
        given = {parameter.name: values[parameter.name] for parameter in own}
        for option in made:
            source = context.get_parameter_source(option.name)
            if source is not None and source.name != "DEFAULT":
                value = values[option.name]
                given[option.name] = tuple(value) if isinstance(value, list) else value
        function(**given)

    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *own, *(option.parameter() for option in made)]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


class Verb(Generic[_M]):
    """A driver with its methods, as a command offers them."""

    def __init__(
        self,
        driver: Callable[..., Any],
        methods: Sequence[_M],
        shared: Sequence[Option],
        **changes: Mapping[str, Any],
    ) -> None:
        """Keep them.

        Args:
            driver: has a parameter `method` with a default.
            methods: the driver's.
            shared: the options that are not those of one method.
            changes: by name, what differs from what is made of a method's: attributes of `Option`.
        """
        self._changes = changes
        self._default: str = inspect.signature(driver).parameters["method"].default
        self._methods = methods
        self._shared = list(shared)

    def options(self) -> list[Option]:
        """--method, the shared ones, and those of the methods that are not shared ones."""
        about = [f"{method.name}: {method.about}" for method in self._methods]
        method = Option("method", str, "\n\n".join(about), self._default)
        own = from_methods(self._methods, [option.name for option in self._shared], **self._changes)
        return [method, *self._shared, *own]

    def choose(self, given: dict[str, Any]) -> _M:
        """Take the method out of the options that were given.

        Args:
            given: options by name; left with what the driver gets as options.

        Raises:
            ValueError: there is no such method, or it does not have one of the options; names the
                option, its value and the method.
        """
        name = given.pop("method", self._default)
        method = find_method(self._methods, name)
        known = {option.name for option in self._shared} | option_names(method)
        for option, value in given.items():
            if option not in known:
                raise ValueError(
                    f"{flag(option)}: got {value}, expected nothing: --method {name} has no such option"
                )
        return method


def option_names(method: Method) -> set[str]:
    """Names of a method's own options."""
    return {field.name for field in dataclasses.fields(method.options) if field.init}


def settings_of(method: Method, given: Mapping[str, Any]) -> Any:
    """The method's own options as its dataclass checks them, of those that were given."""
    names = option_names(method)
    return method.options(**{name: value for name, value in given.items() if name in names})


def _fields(kind: type) -> list[_Field]:
    """The fields of a dataclass that its caller can give, with what its docstring or a base's says."""
    hints = typing.get_type_hints(kind)
    texts: dict[str, str] = {}
    for base in kind.__mro__:
        texts = entries(base.__doc__, "Attributes") | texts
    return [
        _Field(field.name, hints[field.name], _default(field), texts.get(field.name, ""))
        for field in dataclasses.fields(kind)
        if field.init
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _options(
    fields: Iterable[_Field],
    panels: Mapping[str, str | None],
    changes: Mapping[str, Mapping[str, Any]],
) -> list[Option]:
    made = []
    for field in fields:
        kind = _kind(field.hint, field.default)
        option = Option(
            field.name, kind, brief(field.text), _shown(field.default), panels[field.name]
        )
        made.append(dataclasses.replace(option, **changes.get(field.name, {})))
    return made


def _text(fields: Mapping[str, _Field]) -> str:
    """What the methods' docstrings say of an option, once if they say the same."""
    texts: dict[str, list[str]] = {}
    for method, field in fields.items():
        if not refers(field.text):
            texts.setdefault(brief(field.text), []).append(method)
    lines = list(texts)
    return "\n\n".join(
        [
            *lines[:1],
            *(f"{', '.join(texts[line])}: {line[:1].lower()}{line[1:]}" for line in lines[1:]),
        ]
    )


def _defaults(fields: Mapping[str, _Field]) -> str:
    """The methods' defaults: the most frequent one, and who has another."""
    shown: dict[str, list[str]] = {}
    for method, field in fields.items():
        shown.setdefault(_value(field.default), []).append(method)
    if len(shown) == 1:
        return _shown(next(iter(fields.values())).default)
    first = max(shown, key=lambda value: len(shown[value]))
    lines = [f"{', '.join(shown[value])}: {value}" for value in shown if value not in ("", first)]
    return "; ".join([first, *lines] if first else lines)


def _shown(default: Any) -> str:
    """A default, if it is worth a word: a switch is off."""
    return "" if default is False else _value(default)


def _value(default: Any) -> str:
    if default is None or default is inspect.Parameter.empty:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, str):
        return default.encode("unicode_escape").decode()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _kind(hint: Any, default: Any) -> Any:
    """What typer is to make of what is written; None where nothing can be written for the annotation."""
    if hint == Source:
        return str
    parts = _alternatives(hint)
    plain = [part for part in parts if part in (bool, int, float, str, Path)]
    if any(typing.get_origin(part) is Literal for part in parts):
        plain.append(str)
    if Path in plain or bool in plain:
        return Path if Path in plain else bool
    if str in plain:
        return _number_or_text if {int, float} & set(plain) else str
    # Only where None is not the default it needs a word.
    named_none = type(None) in parts and default is not None
    for kind, or_none in ((float, _float_or_none), (int, _int_or_none)):
        if kind in plain:
            return or_none if named_none else kind
    rows = [part for part in parts if typing.get_origin(part) in (tuple, list, Sequence)]
    return list[str] if rows else None


def _common(kinds: Collection[Any]) -> Any:
    """One kind for an option that methods annotate differently."""
    known = {kind for kind in kinds if kind is not None}
    if len(known) < 2:
        return next(iter(known), None)
    return float if known == {int, float} else _number_or_text


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _alternatives(part))
    return (hint,)


def _float_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _int_or_none(text: str) -> int | None:
    return None if text == "none" else int(text)


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


_METAVARS = {_float_or_none: "FLOAT", _int_or_none: "INTEGER", _number_or_text: "VALUE"}

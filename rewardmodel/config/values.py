"""A value of a recipe, as YAML or the command line gives it, and the type of its key -> the value in that type."""

import re
from contextlib import suppress
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml


class RecipeLoader(yaml.SafeLoader):
    """YAML as version 1.2 has it in two points: 1e-4 is a number, and 2026-01-31 is a text, not a date."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, RecipeLoader)


def convert_text(text: str, hint: Any) -> Any:
    """Return the value of a text that was typed, like 1e-4, null, no or [q_proj, v_proj].

    Args:
        text: YAML; where the type takes texts and no other value, the text as it is.
        hint: type of the key, as for `convert`.

    Raises:
        ValueError: it is no value of that type; the message says what is.
    """
    try:
        value = read_yaml(text) if text.strip() else text
    except yaml.YAMLError:
        value = text
    with suppress(ValueError):
        return _convert(text if isinstance(value, str) else value, hint)
    return _convert(text, hint)


def convert(value: Any, hint: Any) -> Any:
    """Return a value of a YAML file in the type of its key.

    Args:
        value: as YAML reads it. A number in quotes is a number where the type takes no text.
        hint: type of the key: `int`, `float | None`, `Literal["none", "both"]`, `list[str | Source]`, ...

    Raises:
        ValueError: it is no value of that type; the message says what is.
    """
    return convert_text(value, hint) if isinstance(value, str) and not _takes_text(hint) else _convert(value, hint)


def _convert(value: Any, hint: Any) -> Any:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        for one in inner:
            with suppress(ValueError):
                return _convert(value, one)
    elif is_dataclass(kind) and isinstance(value, dict):
        types = {field.name: field.type for field in fields(kind)}
        with suppress(TypeError, KeyError):  # a field is missing, or unknown
            return hint(**{name: _convert(one, types[name]) for name, one in value.items()})
    elif kind is list and isinstance(value, list) and inner:
        return [_convert(one, inner[0]) for one in value]
    elif kind is dict and isinstance(value, dict) and inner:
        return {name: _convert(one, inner[1]) for name, one in value.items()}
    elif kind is float and type(value) is int:
        return float(value)
    elif kind is Any or type(value) is kind or (kind is Literal and _is_one(value, inner)):
        return value
    raise ValueError(_reason(value, hint))


def _is_one(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(type(one) is type(value) and one == value for one in choices)


def _takes_text(hint: Any) -> bool:
    return hint in (Any, str) or get_origin(hint) is Literal or any(map(_takes_text, get_args(hint)))


def _reason(value: Any, hint: Any) -> str:
    if value is None:
        return "null; give a value, or delete the line for the default"
    reason = f"{value!r}; give {_name(hint)}"
    if isinstance(value, bool):
        reason += "; YAML reads an unquoted no, yes, off or on as a boolean: put such a text into quotes"
    return reason


WORDS = {
    NoneType: "null",
    Any: "any value",
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}
"""Types in the words of messages."""


def _name(hint: Any, several: bool = False) -> str:
    """Return a type in words, like `a whole number or null`, `a list of texts` or `one of ['none', 'both']`."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_name(one, several) for one in inner)
    if kind is Literal:
        return f"one of {list(inner)}"
    name = WORDS.get(kind) or f"a {kind.__name__}"
    if kind in (list, dict) and inner:
        return f"{name} of {_name(inner[-1], several=True)}"
    return f"{name.removeprefix('a ')}s" if several and name.startswith("a ") else name

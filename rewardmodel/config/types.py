"""Python type hints in, JSON schema out, and back: the shipped table of TRL's keys keeps types as JSON schema.

`int | None` is `{"type": ["integer", "null"]}`, `list[str]` is `{"type": "array", "items": {"type": "string"}}`, and
`IntervalStrategy | str` is `{"anyOf": [{"enum": ["no", "steps", "epoch"]}, {"type": "string"}]}`.
"""

from dataclasses import is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

Schema = dict[str, Any]
"""A JSON schema (draft 2020-12), or a part of one."""

_JSON_TYPES: dict[Any, str] = {
    bool: "boolean",
    dict: "object",
    float: "number",
    int: "integer",
    list: "array",
    NoneType: "null",
    str: "string",
}
"""Python types -> the names that JSON schema has for them."""


def type_to_schema(hint: Any) -> Schema:
    """Return the JSON schema of a type hint.

    The alternatives of a union keep their order, an Enum becomes its values, a dataclass of ours a reference into
    `$defs`, and any other class an object: a mapping of what it is made from.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return {}
    if kind is Literal:
        return {"enum": list(inner)}
    if kind in (Union, UnionType):
        return _union([type_to_schema(one) for one in inner])
    if issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    if is_dataclass(kind) and kind.__module__.startswith("rewardmodel."):
        return {"$ref": f"#/$defs/{hint.__name__}"}
    schema: Schema = {"type": _JSON_TYPES.get(kind, "object")}
    if inner and inner[-1] is not Any:
        schema["items" if kind is list else "additionalProperties"] = type_to_schema(inner[-1])
    return schema


def _union(options: list[Schema]) -> Schema:
    plain = all(one.keys() == {"type"} for one in options)
    return {"type": [one["type"] for one in options]} if plain else {"anyOf": options}


def schema_to_type(schema: Schema) -> Any:
    """Return the type hint of a JSON schema of `type_to_schema`; a class comes back as dict, an Enum as a Literal."""
    if "anyOf" in schema:
        return Union[tuple(map(schema_to_type, schema["anyOf"]))]  # noqa: UP007 (made at run time)
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    kind = schema.get("type", Any)
    if isinstance(kind, list):
        return Union[tuple(schema_to_type({"type": one}) for one in kind)]  # noqa: UP007
    if "items" in schema:
        return list[schema_to_type(schema["items"])]  # type: ignore[misc]
    if "additionalProperties" in schema:
        return dict[str, schema_to_type(schema["additionalProperties"])]  # type: ignore[misc]
    return next((one for one, name in _JSON_TYPES.items() if name == kind), Any)

"""The recipe's dataclasses and TRL's keys in, a JSON schema out: what editors complete and check recipes with.

`rewardmodel COMMAND --help` prints the same keys, types, defaults and texts.
"""

import ast
import inspect
import json
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any

from rewardmodel.config.schema import SECTIONS, Recipe, Source
from rewardmodel.config.trainer import property_of, trainer_keys
from rewardmodel.config.types import Schema


def recipe_schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of a recipe: types, choices, defaults and texts of every key.

    An editor reads it from a file, for example with this first line in a recipe:
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rewardmodel recipe",
        **_object(recipe_keys(), _summary(Recipe)),
        "$defs": {"Source": {**_object(_keys_of(Source), _summary(Source)), "required": ["path"]}},
    }


def recipe_keys() -> dict[str, Schema]:
    """Return the JSON schema of each section of a recipe by name; its `properties` are the keys."""
    sections = {name: _object(_keys_of(section), _summary(section)) for name, section in SECTIONS.items()}
    sections["trainer"] = _object(trainer_keys(), "Training: our keys and those of trl.RewardConfig.")
    return {name: sections[name] for name in Recipe.__dataclass_fields__}


def _object(properties: dict[str, Schema], description: str) -> Schema:
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "additionalProperties": False,
    }


def _keys_of(section: Any) -> dict[str, Schema]:
    texts, found = _field_docstrings(section), {}
    for field in fields(section):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found[field.name] = property_of(field.type, default, texts[field.name])
    return found


def _field_docstrings(section: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, by the field's name."""
    body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
    return {
        ast.unparse(field.target): ast.literal_eval(text.value)
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _summary(section: Any) -> str:
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())


TYPE_NAMES = {
    "array": "LIST",
    "boolean": "BOOL",
    "integer": "INT",
    "null": "null",
    "number": "NUMBER",
    "object": "MAPPING",
    "string": "TEXT",
}


def type_name(schema: Schema) -> str:
    """Return the type of a key for its help, like `INT|null`."""
    if "anyOf" in schema:
        return "|".join(map(type_name, schema["anyOf"]))
    if "enum" in schema:
        return "CHOICE" if len(schema["enum"]) > 1 else str(schema["enum"][0])
    kinds = schema.get("type", "object")
    return "|".join(TYPE_NAMES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds))


def choices(schema: Schema) -> list[str] | None:
    """Return the values that a key can have, as typed, or None if they cannot be listed."""
    if schema.get("type") == "boolean":
        return ["true", "false"]
    enums = [one["enum"] for one in (schema, *schema.get("anyOf", ())) if "enum" in one]
    return [value if isinstance(value, str) else json.dumps(value) for value in enums[0]] if enums else None


def help_text(schema: Schema) -> str:
    """Return the text of a key, its choices and its default, for help."""
    known, default = choices(schema), schema.get("default")
    listed = known and len(known) > 1 and schema.get("type") != "boolean"
    notes = [f"one of {', '.join(known or ())}"] if listed else []
    if default is not None:
        notes.append(f"default: {default if isinstance(default, str) else json.dumps(default)}")
    return schema["description"] + (f" ({'; '.join(notes)})" if notes else "")

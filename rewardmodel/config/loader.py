"""A YAML recipe and command-line overrides in, a `Recipe` out, and back; imports neither torch nor trl."""

import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from rewardmodel.config.schema import REMOVED_KEYS, SECTIONS, Recipe, Source
from rewardmodel.config.trainer import TRAINER_REFUSED, trainer_keys
from rewardmodel.config.types import schema_to_type
from rewardmodel.errors import InputError, nearest


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, of_run: bool = False) -> Recipe:
    """Return the recipe of a YAML file with command-line overrides on top.

    Args:
        path: the recipe; `trainer.output_dir` defaults to runs/ and the file's name.
        overrides: as typed: `["--trainer.learning_rate", "1e-4"]` or `["--trainer.learning_rate=1e-4"]`.
        of_run: whether the file is the recipe of a saved run, in which `REMOVED_KEYS` are ignored.

    Raises:
        InputError: no such file, not a mapping of sections, an unknown key (the nearest is named), or a value of the
            wrong type.
    """
    path = Path(path)
    given = _read_mapping(path)
    _check_sources(given.get("data", {}), path)
    overridden = [word[2:].split("=")[0] for word in overrides if word.startswith("--")]

    # the type of every key: {"model.lora_r": int, "trainer.seed": int, ...}; an unknown key is an error
    trainer_names = {*given.get("trainer", {}), *(key.removeprefix("trainer.") for key in overridden)}
    types = {f"{name}.{field.name}": field.type for name, section in SECTIONS.items() for field in fields(section)}
    types |= {f"trainer.{key}": schema_to_type(schema) for key, schema in trainer_keys(trainer_names).items()}
    types |= dict.fromkeys(REMOVED_KEYS, Any) if of_run else {}
    keys = [*_leaves(given, types), *overridden]
    for key in keys:
        _check_key(key, types, path)

    # the values, and the defaults of the file
    sections = _parse(path if given else None, overrides, {key: types[key] for key in keys}, path)
    for section, name in (key.split(".") for key in REMOVED_KEYS):
        sections[section].pop(name, None)
    if "template" in sections["prompt"]:
        sections["prompt"]["template"] = _template_text(sections["prompt"]["template"], path)
    trainer = {"output_dir": str(Path("runs") / path.stem), **dict(sorted(sections["trainer"].items()))}
    return Recipe(trainer=trainer, **{name: section(**sections[name]) for name, section in SECTIONS.items()})


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def _parse(config: Path | None, overrides: Sequence[str], types: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the values that are given, checked by type: section -> key -> value, for every section.

    Args:
        config: the YAML file, unless it is empty.
        overrides: as for `load_recipe`.
        types: of the keys that are given, by dotted name.
        where: the file, for messages.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="rewardmodel", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    for key, hint in types.items():
        parser.add_argument(f"--{key}", type=hint)
    try:
        parsed = parser.parse_args([*(["--config", str(config)] if config else []), *overrides])
    except Exception as error:  # jsonargparse raises errors of many types
        raise InputError(f"{where}: {_reason(error)}") from error
    sections = {name: {} for name in (*SECTIONS, "trainer")} | parsed.as_dict()
    for key, hint in types.items():  # jsonargparse lets every null in a file pass
        section, _, name = key.partition(".")
        if sections[section][name] is None and hint is not Any and NoneType not in get_args(hint):
            raise InputError(f"{where}: {key}: null; give a value, or delete the line for the default")
    return sections


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read a recipe there ({error}); give the path of a YAML file") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}); fix that line") from error
    if content is None:
        return {}
    values = content if isinstance(content, dict) else {"the file": content}
    wrong = [name for name, value in values.items() if not isinstance(value, dict)]
    if wrong:
        names = ", ".join([*SECTIONS, "trainer"])
        raise InputError(f"{path}: {wrong[0]}: not a mapping; a recipe has one mapping per section: {names}")
    return content


def _check_sources(data: Mapping[str, Any], where: Path) -> None:
    known = Source.__dataclass_fields__
    for key in ("train", "test"):
        given = data.get(key)
        for number, source in enumerate(given if isinstance(given, list) else [given]):
            for name in source if isinstance(source, dict) else ():
                if name not in known:
                    place = f"data.{key}[{number}].{name}" if isinstance(given, list) else f"data.{key}.{name}"
                    raise InputError(f"{where}: unknown key '{place}'{nearest(name, known)}; known: {', '.join(known)}")


def _template_text(template: str | None, recipe: Path) -> str | None:
    """Return the template of a recipe; the name of a .jinja file is replaced by its text."""
    if template is None or not template.endswith(".jinja"):
        return template
    for path in (Path(template), recipe.parent / template):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"prompt.template: {path} is not UTF-8; save it as UTF-8") from error
    raise InputError(f"prompt.template: {template}: no such file in the working directory or next to {recipe}")


def _leaves(tree: Mapping[str, Any], known: Container[str], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a recipe's keys, like `model.lora_r`; a known key that holds a mapping is one."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in known:
            yield from _leaves(value, known, f"{name}.")
        else:
            yield name


def _check_key(key: str, known: Collection[str], where: Path) -> None:
    section, _, name = key.partition(".")
    if key in known:
        return
    if section == "trainer" and name in TRAINER_REFUSED:
        raise InputError(f"{where}: trainer.{name} is not accepted: {TRAINER_REFUSED[name]}")
    if key in REMOVED_KEYS:
        raise InputError(f"{where}: {key} does not exist any more: {REMOVED_KEYS[key]}")
    raise InputError(f"{where}: unknown key '{key}'{nearest(key, known) or '; see rewardmodel run --help'}")


def _reason(error: Exception) -> str:
    """Return what jsonargparse reports as one line in plain words."""
    text = " ".join(str(error).replace("Parser key", "key").split())
    text = re.sub(r"(a )?typing\.Literal", "one of ", re.sub(r"<class '([\w.]+)'>", r"\1", text))
    if "Given value type: bool" in text:
        text += "; YAML reads an unquoted no, yes, off or on as a boolean: put such a text into quotes"
    return text

"""A YAML recipe and command-line overrides in, a `Recipe` out, and back; imports neither torch nor trl."""

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from rewardmodel.config.ranges import check_ranges
from rewardmodel.config.recipes import find_recipe
from rewardmodel.config.schema import REMOVED_KEYS, SECTIONS, Recipe, Source
from rewardmodel.config.trainer import TRAINER_REFUSED, trainer_keys
from rewardmodel.config.types import schema_to_type
from rewardmodel.config.values import convert, convert_text, read_yaml
from rewardmodel.errors import InputError, nearest

Overrides = Sequence[str] | Mapping[str, Any]
"""Keys on top of a recipe: as typed, `["--trainer.learning_rate", "1e-4"]`, or `{"trainer.learning_rate": 1e-4}`."""


def load_recipe(path: str | Path | Mapping[str, Any], overrides: Overrides = (), *, of_run: bool = False) -> Recipe:
    """Return a recipe with overrides on top.

    Args:
        path: a YAML file, the name of a packaged recipe like `quickstart`, or its sections as a dict:
            `{"data": {"train": "train.csv"}}`. `trainer.output_dir` defaults to runs/ and the file's name.
        overrides: as typed on the command line, `["--trainer.learning_rate", "1e-4"]` or
            `["--trainer.learning_rate=1e-4"]`; or a dict, `{"trainer.learning_rate": 1e-4}`.
        of_run: whether the file is the recipe of a saved run, in which `REMOVED_KEYS` are ignored, and `trainer` may
            have keys of a trl that is not installed here.

    Raises:
        InputError: no such file, not a mapping of sections, an unknown key (the nearest is named), or a value of the
            wrong type or out of range.
        TypeError: `path` or `overrides` is neither of these.
    """
    if isinstance(path, Mapping):
        where, given = Path("recipe"), _check_sections(_plain(path), Path("recipe"))
    elif isinstance(path, str | Path):
        where = Path(path) if of_run else find_recipe(path)
        given = _read_mapping(where)
    else:
        raise TypeError(f"a recipe is a path, the name of a packaged recipe or a dict, not {_kind(path)}")
    _check_sources(given.get("data", {}), where)
    typed = _read_overrides(overrides, where)

    # the type of every key: {"model.lora_r": int, "trainer.seed": int, ...}; an unknown key is an error
    trainer_names = {*given.get("trainer", {}), *(key.removeprefix("trainer.") for key in typed)}
    types = {f"{name}.{field.name}": field.type for name, section in SECTIONS.items() for field in fields(section)}
    types |= {f"trainer.{key}": Any for key in given.get("trainer", {})} if of_run else {}
    known = trainer_keys(() if of_run else trainer_names)
    types |= {f"trainer.{key}": schema_to_type(schema) for key, schema in known.items()}
    types |= dict.fromkeys(REMOVED_KEYS, Any) if of_run else {}
    written = dict(_leaves(given, types))
    for key in (*written, *typed):
        _check_key(key, types, where)

    # the values, and the defaults of the file
    sections: dict[str, dict[str, Any]] = {name: {} for name in (*SECTIONS, "trainer")}
    read_typed = convert if isinstance(overrides, Mapping) else _read_override
    for values, read in ((written, convert), (typed, read_typed)):
        for key, value in values.items():
            section, _, name = key.partition(".")
            try:
                sections[section][name] = read(value, types[key])
            except ValueError as error:
                raise InputError(f"{where}: {key}: {error}") from error
    for section, name in (key.split(".") for key in REMOVED_KEYS):
        sections[section].pop(name, None)
    if "template" in sections["prompt"]:
        sections["prompt"]["template"] = _template_text(sections["prompt"]["template"], where)
    if not of_run:
        check_ranges(sections, where)
    default = {} if isinstance(path, Mapping) else {"output_dir": str(Path("runs") / where.stem)}
    trainer = {**default, **dict(sorted(sections["trainer"].items()))}
    return Recipe(trainer=trainer, **{name: section(**sections[name]) for name, section in SECTIONS.items()})


RecipeLike = Recipe | str | Path | Mapping[str, Any]
"""What stands for a recipe: a `Recipe`, a path, the name of a packaged one, or its sections as a dict."""


def as_recipe(given: RecipeLike) -> Recipe:
    """Return the recipe that a function was given: a `Recipe`, or what `load_recipe` reads.

    Raises:
        InputError: as `load_recipe`.
        TypeError: it is something else.
    """
    if isinstance(given, Recipe):
        check_ranges(asdict(given), "recipe")
        return given
    if not isinstance(given, str | Path | Mapping):
        raise TypeError(f"the recipe is a Recipe, a path, the name of a packaged recipe or a dict, not {_kind(given)}")
    return load_recipe(given)


def _kind(value: Any) -> str:
    """Return the type of a value in words: `int`, `DataFrame`."""
    return type(value).__name__


def _plain(value: Any) -> Any:
    """Return a value with mappings as dicts and paths as texts, as a YAML file has them."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def _read_overrides(overrides: Overrides, where: Path) -> dict[str, Any]:
    """Return overrides by key: of a dict the values, else the texts as of `_split_overrides`."""
    if isinstance(overrides, Mapping):
        found: dict[str, Any] = {}
        for key, value in _plain(overrides).items():
            section = isinstance(value, dict) and "." not in str(key)  # {"trainer": {"max_steps": 3}}
            found |= {f"{key}.{name}": one for name, one in value.items()} if section else {str(key): value}
        return found
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise TypeError(
            "overrides are a dict, like {'trainer.max_steps': 3}, or a list of words, like ['--trainer.max_steps', "
            f"'3'], not {_kind(overrides)}"
        )
    return _split_overrides(overrides, where)


def _split_overrides(words: Sequence[str], where: Path) -> dict[str, str | None]:
    """Return the texts of overrides by key, like `{"trainer.learning_rate": "1e-4"}`; None: a key without a value."""
    found: dict[str, str | None] = {}
    left = [*words]
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise InputError(f"{where}: '{word}' is not the value of a key; write --section.key value")
        key, equals, text = word[2:].partition("=")
        missing = not equals and (not left or left[0].startswith("--"))
        found[key] = None if missing else text if equals else left.pop(0)
    return found


def _read_override(text: str | None, hint: Any) -> Any:
    if text is None:
        raise ValueError("has no value; write it behind the key")
    return convert_text(text, hint)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read a recipe there ({error}); give the path of a YAML file") from error
    try:
        content = read_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}); fix that line") from error
    return _check_sections({} if content is None else content, path)


def _check_sections(content: Any, path: Path) -> dict[str, Any]:
    """Return what a recipe holds, or raise if it is not a mapping of sections, each of which is a mapping."""
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


def _leaves(tree: Mapping[str, Any], known: Container[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names of a recipe's keys, like `model.lora_r`, and values; a known key may hold a mapping."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in known:
            yield from _leaves(value, known, f"{name}.")
        else:
            yield name, value


def _check_key(key: str, known: Collection[str], where: Path) -> None:
    section, _, name = key.partition(".")
    if key in known:
        return
    if section == "trainer" and name in TRAINER_REFUSED:
        raise InputError(f"{where}: trainer.{name} is not accepted: {TRAINER_REFUSED[name]}")
    if key in REMOVED_KEYS:
        raise InputError(f"{where}: {key} does not exist any more: {REMOVED_KEYS[key]}")
    raise InputError(f"{where}: unknown key '{key}'{nearest(key, known) or '; see rewardmodel run --help'}")

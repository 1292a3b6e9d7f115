"""A YAML recipe and command-line overrides in, a `Recipe` out, and back."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rewardmodel.config.schema import (
    DataConfig,
    InferenceConfig,
    ModelConfig,
    ObjectiveConfig,
    PromptConfig,
    Recipe,
    Source,
)
from rewardmodel.config.trainer import OWN_KEYS, TRAINER_DEFAULTS, TRAINER_REFUSED
from rewardmodel.errors import InputError, nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "prompt": PromptConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "inference": InferenceConfig,
}
"""The sections that are ours; the sixth, `trainer`, is TRL's."""


def recipe_parser(prog: str, description: str | None = None) -> "ArgumentParser":
    """Return a jsonargparse parser of every recipe key, with defaults and help from the dataclasses and from TRL."""
    from jsonargparse import ArgumentParser, set_parsing_settings
    from trl import RewardConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A recipe (YAML).")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    parser.add_class_arguments(RewardConfig, "trainer", skip=set(TRAINER_REFUSED))
    for key, (kind, default, about) in OWN_KEYS.items():
        parser.add_argument(f"--trainer.{key}", type=kind, default=default, help=about)
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
    return parser


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with command-line overrides on top.

    Args:
        path: the recipe; `trainer.output_dir` defaults to runs/ and the file's name.
        overrides: as typed: `["--trainer.learning_rate", "1e-4"]` or `["--trainer.learning_rate=1e-4"]`.

    Raises:
        InputError: no such file, no mapping, an unknown key (the nearest is named), or a value of another type.
    """
    path = Path(path)
    given = _read_mapping(path)
    _check_sources(given.get("data", {}), path)
    parser = recipe_parser("rewardmodel")
    known = set(parser.get_defaults(skip_validation=True).keys())
    keys = [*_leaves(given, known), *(word[2:].split("=")[0] for word in overrides if word.startswith("--"))]
    for key in keys:
        _check_key(key, known, path)
    try:
        parsed = parser.parse_args([*(["--config", str(path)] if given else []), *overrides])
    except Exception as error:
        raise InputError(f"{path}: {_reason(error)}") from error
    sections = parsed.as_dict()
    set_here = {key.removeprefix("trainer.") for key in keys if key.startswith("trainer.")}
    trainer = {key: _plain(sections["trainer"][key]) for key in [*TRAINER_DEFAULTS, *sorted(set_here)]}
    sections["prompt"]["template"] = _template_text(sections["prompt"]["template"], path)
    if "output_dir" not in set_here:
        trainer["output_dir"] = str(Path("runs") / path.stem)
    return Recipe(trainer=trainer, **{name: section(**sections[name]) for name, section in SECTIONS.items()})


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no recipe can be read there ({error}); give the path of a YAML file") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())}); mend that line") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise InputError(f"{path}: a recipe has one mapping a section: {', '.join([*SECTIONS, 'trainer'])}")
    return content


def _check_sources(data: Mapping[str, Any], where: Path) -> None:
    known = Source.__dataclass_fields__
    for key in ("train", "test"):
        given = data.get(key)
        for number, source in enumerate(given if isinstance(given, list) else [given]):
            for name in source if isinstance(source, dict) else ():
                if name not in known:
                    place = f"data.{key}[{number}].{name}" if isinstance(given, list) else f"data.{key}.{name}"
                    raise InputError(
                        f"{where}: unknown key '{place}'{nearest(name, known)}; there are: {', '.join(known)}"
                    )


def _template_text(template: str | None, recipe: Path) -> str | None:
    """Return the template that a recipe names, with the text of a .jinja file in place of its name."""
    if template is None or not template.endswith(".jinja"):
        return template
    for path in (Path(template), recipe.parent / template):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"prompt.template: {path} is not UTF-8; save it as UTF-8") from error
    raise InputError(f"prompt.template: {template}: no such file, here or beside {recipe}")


def _leaves(tree: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in known:
            yield from _leaves(value, known, f"{name}.")
        else:
            yield name


def _check_key(key: str, known: set[str], where: Path) -> None:
    section, _, name = key.partition(".")
    if key in known:
        return
    if section == "trainer" and name in TRAINER_REFUSED:
        raise InputError(f"{where}: trainer.{name} is not taken: {TRAINER_REFUSED[name]}")
    raise InputError(f"{where}: unknown key '{key}'{nearest(key, known) or '; see rewardmodel run --help'}")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).replace("Parser key", "key").replace("typing.Literal", "one of ").split())
    return re.sub(r"<class '([\w.]+)'>", r"\1", text)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value

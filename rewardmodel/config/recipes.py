"""The recipes that come with the package, by name: a name in, the path of its YAML file out."""

import re
import textwrap
from functools import cache
from pathlib import Path

from rewardmodel.errors import InputError, nearest

FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
"""Where the recipes are: inside an installed package, or next to the package in a checkout."""


@cache
def packaged_recipes() -> dict[str, Path]:
    """Return the packaged recipes by name: `{"quickstart": Path(".../recipes/quickstart.yaml"), ...}`."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {path.stem: path for path in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("seeds/*.yaml"))]}


def find_recipe(given: str | Path) -> Path:
    """Return the path of a recipe: a file, or one of the package by name, like `quickstart`.

    Args:
        given: a path; where there is no such file, its last part without ending is the name of a packaged recipe.

    Raises:
        InputError: neither a file nor a name; the nearest name is given.
    """
    path, known = Path(given), packaged_recipes()
    if path.exists():
        return path
    name = path.stem if path.suffix in (".yaml", ".yml") else path.name
    named = path.parent in (Path(), Path("recipes"), Path("seeds"), Path("recipes/seeds"))
    if named and name in known:
        return known[name]
    close = nearest(str(given), map(str, path.parent.glob("*.y*ml"))) or nearest(name, known)
    raise InputError(
        f"{given}: no such file, and no recipe of that name{close}; `rewardmodel recipes` lists the packaged ones"
    )


def describe_recipe(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with, without line breaks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    text = " ".join(line.removeprefix("#").strip() for line in lines[:header])
    return re.split(r"(?<!\.)\.(?=\s|$)", text)[0]


def format_recipes(width: int = 120) -> str:
    """Return the packaged recipes for a terminal, a line each: name and what it is."""
    known = packaged_recipes()
    column = max(map(len, known), default=0) + 2
    return "\n".join(
        f"{name:<{column}}{textwrap.shorten(describe_recipe(path), width - column, placeholder=' …')}"
        for name, path in known.items()
    )

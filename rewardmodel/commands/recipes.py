"""Commands about recipes, of which none is run: recipes, schema."""

import json
import shutil
from argparse import Namespace


def _recipes(options: Namespace) -> None:
    """List the recipes of the package, which every command takes by name: rewardmodel run quickstart."""
    from rewardmodel.config.recipes import format_recipes

    print(format_recipes(shutil.get_terminal_size().columns))


def _schema(options: Namespace) -> None:
    """Print the JSON schema of a recipe, with which editors complete and check recipes."""
    from rewardmodel.config.json_schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


RECIPES = {"recipes": _recipes, "schema": _schema}

"""Recipes as files: the shipped ones by name, and their text. Nothing heavy is imported, so that they list at once."""

import difflib
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with hf_moe: "<model>/<recipe>" to file."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.glob("*/*.yaml"))}


def find_recipe(name: str) -> Path:
    """The YAML file `name`, or the shipped recipe of that name. Raises FileNotFoundError if there is neither."""
    path = Path(name) if Path(name).is_file() else shipped_recipes().get(name)
    if path is None:
        near = difflib.get_close_matches(name, shipped_recipes(), n=3, cutoff=0.0)
        raise FileNotFoundError(
            f"No recipe {name}: give a YAML file, or a name that hf-moe train --list shows, such as {', '.join(near)}."
        )
    return path


def recipe_text(name: str) -> str:
    """What the file holds. Raises FileNotFoundError as `find_recipe`, ValueError if it is not text."""
    try:
        return find_recipe(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Recipe {name} is not YAML: {error}") from error


def read_recipe(name: str) -> dict[str, Any]:
    """Arguments in a recipe. Raises FileNotFoundError as `find_recipe`, ValueError if it does not hold a mapping."""
    try:
        recipe = yaml.safe_load(recipe_text(name))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"Recipe {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"Recipe {name} must map argument names to values, but holds a {type(recipe).__name__}.")
    return recipe


def list_recipes() -> str:
    """A line per shipped recipe: its name and the first line of its file."""
    names = shipped_recipes()
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {recipe_text(name).splitlines()[0].lstrip('# ')}" for name in names)

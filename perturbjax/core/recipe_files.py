"""Recipes as plain values and files: JSON of runs, and TOML files for `--recipe`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json
from perturbjax.core.options import read_toml, replace_fields

_DEFAULTS = Recipe()


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to nested plain values, ready for JSON."""
    return dataclasses.asdict(recipe)


def recipe_from_dict(values: dict[str, Any], base: Recipe = _DEFAULTS) -> Recipe:
    """Build a recipe from nested plain values; the inverse of `recipe_to_dict`.

    Args:
        values: section -> field -> value, and `seed`.
        base: recipe that supplies absent fields.

    Raises:
        InputError: a field is unknown, or its value is not valid.
    """
    sections: dict[str, Any] = {}
    for name, value in values.items():
        if not hasattr(base, name):
            raise InputError(f"recipe: unknown section {name}")
        section = getattr(base, name)
        if dataclasses.is_dataclass(section) and not isinstance(section, type):
            if not isinstance(value, dict):
                raise InputError(f"recipe: {name} is not a table of fields")
            value = replace_fields(section, value, f"recipe: {name}")
        sections[name] = value
    return dataclasses.replace(base, **sections)


def read_recipe(path: Path, base: Recipe) -> Recipe:
    """Read the fields of a recipe from a file; absent fields keep their values of `base`.

    Args:
        path: a `.toml` file with the tables `model`, `input`, `augment`, `optim`, `split` and
            `transfer`, or the `config.json` of a run.
        base: recipe that supplies absent fields.

    Raises:
        InputError: the file cannot be read, or a field is unknown or not valid.
    """
    if path.suffix == ".toml":
        return recipe_from_dict(read_toml(path), base)
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"--recipe {path}: is not a recipe; pass a .toml file or a config.json")
    return recipe_from_dict(values.get("recipe", values), base)

"""Presets and recipe files: read before the other flags, whose defaults they replace."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from perturbjax.cli.parsing import Flag, parse_first
from perturbjax.core.config import PRESETS, Recipe, preset
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.recipe_files import read_recipe

_RECIPE = Flag(
    "recipe", Path, None, "Recipe: .toml file or config.json of a run; flags override it."
)

#: Preset for new data, and the best one that needs no weights (docs/presets.md).
RECOMMENDED, WITHOUT_WEIGHTS = "pretrained", "cells"

#: Defaults by field name, flags for the help, and the remaining words of the command line.
Presets = tuple[dict[str, Any], Sequence[Flag], Sequence[str]]


def train_presets(words: Sequence[str]) -> Presets:
    """Presets of `perturbjax train`."""
    from perturbjax.models.user_networks import allow_network

    (name, file, model), rest = parse_first(words, "preset", "recipe", "model")
    # Only a network on the command line is allowed, not the one of a recipe file.
    allow_network(model)
    # The options dataclass has the flag --model too, so return it to the remaining words.
    rest = [*rest, "--model", model] if model else rest
    name = name or _default_preset(words)
    recipe = preset(name)
    recipe = read_recipe(Path(file), recipe) if file else recipe
    flag = _preset_flag("Named recipe; paper with --recipe or --model.", name, PRESETS)
    return _recipe_defaults(recipe), (flag, _RECIPE), rest


def _default_preset(words: Sequence[str]) -> str:
    """The preset of a training without --preset.

    A recipe or network of the user replaces fields of `paper`. Otherwise it is the preset that is
    recommended for new data.
    """
    flags = {word.split("=")[0] for word in words}
    if flags & {"--recipe", "--model", "--weights", "--head"}:
        return "paper"
    if not (missing := missing_weights()):
        return RECOMMENDED
    # A resumed training has its recipe already, and the help needs no advice.
    if not flags & {"--resume", "-h", "--help", "--help-all"}:
        console.print(f"info: using --preset {WITHOUT_WEIGHTS}, because {missing}")
    return WITHOUT_WEIGHTS


def missing_weights() -> str:
    """Why the weights of the recommended preset cannot be used; empty if they can."""
    from perturbjax.models.weights import resolve_source

    try:
        resolve_source(PRESETS[RECOMMENDED].transfer.weights)
    except InputError as error:
        return f"{RECOMMENDED} needs its weights: {error}"
    return ""


def evaluate_presets(words: Sequence[str]) -> Presets:
    """Defaults of `perturbjax evaluate`: --run can be left out, see `EvaluateConfig`."""
    return {"run": None}, (), words


def import_presets(words: Sequence[str]) -> Presets:
    """Presets of `perturbjax import-torch`; `export-torch` stores the recipe next to the
    weights."""
    from perturbjax.training.pytorch_exchange import recipe_for_import, recipe_of_weight_file

    (name, file, weights), rest = parse_first(words, "preset", "recipe", "checkpoint")
    # --preset overrides the recipe that is stored with the weights.
    stored = recipe_of_weight_file(Path(weights)) if weights and not name else None
    recipe = stored or recipe_for_import(name or "original")
    recipe = read_recipe(Path(file), recipe) if file else recipe
    default = "stored with the weights" if stored else name or "original"
    flag = _preset_flag("Named recipe of the training.", default, PRESETS)
    # The command has the flag --checkpoint too, so return it to the remaining words.
    rest = [*rest, "--checkpoint", weights] if weights else rest
    return _recipe_defaults(recipe), (flag, _RECIPE), rest


def classify_presets(words: Sequence[str]) -> Presets:
    """Presets of `perturbjax classify`."""
    from perturbjax.profiles.profile_options import CLASSIFY_PRESETS

    (name,), rest = parse_first(words, "preset")
    if name and name not in CLASSIFY_PRESETS:
        raise InputError(f"--preset {name}: unknown; choose one of {', '.join(CLASSIFY_PRESETS)}")
    values = dict(CLASSIFY_PRESETS.get(name, {}))
    text = (
        "Named settings. linear: baseline for every network, with --data. linear-resized: the "
        "same on fields shrunk to 224 pixels."
    )
    flag = _preset_flag(text, name or None, CLASSIFY_PRESETS)
    # Defaults are found by field name, so nested fields move to the top level.
    return {**values.pop("source", {}), **values}, (flag,), rest


def audit_presets(words: Sequence[str]) -> Presets:
    """Defaults of `perturbjax audit`: with --data, the features of the linear baseline.

    Its statistics are left out, because they are the controls of the audit.
    """
    from perturbjax.profiles.profile_options import LINEAR_SOURCE

    return {**LINEAR_SOURCE, "statistics": False}, (), words


def _preset_flag(text: str, default: str | None, names: Collection[str]) -> Flag:
    return Flag("preset", str, default, text, metadata={"metavar": f"{{{','.join(names)}}}"})


def _recipe_defaults(recipe: Recipe) -> dict[str, Any]:
    """Field name -> value of all sections of a recipe."""
    sections = [vars(recipe)[f.name] for f in dataclasses.fields(Recipe) if f.name != "seed"]
    return {"seed": recipe.seed} | {n: v for section in sections for n, v in vars(section).items()}

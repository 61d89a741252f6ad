"""Check that a command line in the documentation parses, without running it."""

from __future__ import annotations

from collections.abc import Sequence

from perturbjax import cli


def accept(command: str, words: Sequence[str]) -> None:
    """Fail unless `perturbjax COMMAND WORDS` has known flags and valid values.

    Raises:
        InputError: the error message of the command.
    """
    cli.parse_command(command, words)

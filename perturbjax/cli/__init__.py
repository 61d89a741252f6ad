"""The `perturbjax` command: command table, option parsing and help."""

from perturbjax.cli.commands import VERBS, main

__all__ = ["VERBS", "main"]

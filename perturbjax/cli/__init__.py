"""The `perturbjax` command: command table, option parsing and help."""

from perturbjax.cli.commands import COMMANDS, main, parse_command
from perturbjax.cli.parsing import parse_options

__all__ = ["COMMANDS", "main", "parse_command", "parse_options"]

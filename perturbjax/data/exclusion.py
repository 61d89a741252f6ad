"""Exclusion of sites from training and evaluation by rules on columns of the index, as
`focus_DNA<-6`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool

from perturbjax.core.errors import InputError
from perturbjax.core.plates import CONTROL_TYPE, EMPTY, in_empty_wells

OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
# Column, operator and value. Two-character operators come first, so that <= is not read as <.
RULE = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
#: Maximum size of a file of rules, in bytes.
MAX_FILE_BYTES = 1 << 20
#: Maximum number of classes listed in a message.
LISTED_CLASSES = 6
_EXAMPLES = "a rule like focus_DNA<-6 or Metadata_Well==A01"


def read_rules(arguments: Sequence[str]) -> tuple[str, ...]:
    """Replace files of rules by their rules.

    Args:
        arguments: rules, and files with one rule per line; empty lines and text after # are
            ignored.

    Raises:
        InputError: an argument is neither a rule nor a file of rules.
    """
    return tuple(
        rule
        for argument in arguments
        for rule in ([argument] if RULE.fullmatch(argument) else _read_file(Path(argument)))
    )


def _read_file(path: Path) -> list[str]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"no file of at most {MAX_FILE_BYTES >> 20} MB has this name")
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"--exclude {path}: neither a rule nor a file of rules ({error}). Pass {_EXAMPLES}."
        ) from error
    rules = [line for line in lines if line]
    for rule in rules:
        if not RULE.fullmatch(rule):
            raise InputError(f"--exclude {path}: {rule!r} is not a rule. Write {_EXAMPLES}.")
    return rules


def match_rule(index: pd.DataFrame, rule: str) -> Bool[np.ndarray, " n"]:
    """Find the sites that fulfill a rule. `==` and `!=` also compare text; all others compare
    numbers.

    Returns:
        (n,) booleans; False where a number is missing.

    Raises:
        InputError: the rule has another form, names an absent column, or compares text with a
            number.
    """
    match = RULE.fullmatch(rule)
    if match is None:
        raise InputError(f"--exclude {rule}: not a rule. Pass {_EXAMPLES}.")
    column, sign, value = match.groups()
    if column not in index.columns:
        raise InputError(
            f"--exclude {rule}: the index has no column {column!r} (available: "
            f"{', '.join(index.columns)})."
        )
    values = index[column]
    # Order comparisons of text would be alphabetical, for example "10" < "9".
    if not pd.api.types.is_numeric_dtype(values):
        if sign in ("==", "!="):
            return OPERATORS[sign](values.astype(str), value).to_numpy(bool)
        raise InputError(f"--exclude {rule}: {column} contains text. Compare it with == or !=.")
    try:
        number = float(value)
    except ValueError as error:
        raise InputError(
            f"--exclude {rule}: {column} contains numbers, {value!r} is not a number."
        ) from error
    # A comparison with NaN is False, except for `!=`, so missing values are removed explicitly.
    return values.notna().to_numpy() & OPERATORS[sign](values, number).to_numpy(bool)


def apply_exclusions(
    index: pd.DataFrame, rules: Sequence[str], label: str
) -> tuple[Bool[np.ndarray, " n"], list[str]]:
    """Find the sites that no rule excludes. Empty wells are always excluded.

    Args:
        index: one row for each of n sites.
        rules: exclusion rules.
        label: column whose classes the summary counts.

    Returns:
        (n,) True for included sites; and one sentence for each rule with the number of excluded
        sites.

    Raises:
        InputError: a rule cannot be applied, or all sites are excluded.
    """
    included, sentences = np.ones(len(index), bool), []
    if in_empty_wells(index).any():
        rules = (f"{CONTROL_TYPE}=={EMPTY}", *rules)
    for rule in rules:
        excluded = match_rule(index, rule)
        included &= ~excluded
        sentences.append(
            f"excluded by {rule}: {excluded.sum()} of {len(index)} "
            f"sites{_count_missing(index, rule)}"
        )
    if not included.any():
        raise InputError(f"--exclude {' '.join(rules)}: excludes all sites. Use other bounds.")
    if rules:
        sentences.append(_summarize(index[label].astype(str), included))
    return included, sentences


def _count_missing(index: pd.DataFrame, rule: str) -> str:
    column = RULE.fullmatch(rule)[1]  # type: ignore[index]  # match_rule has checked the rule
    missing = int(index[column].isna().sum())
    return f" ({missing} sites without {column} are included)" if missing else ""


def _summarize(labels: pd.Series, included: Bool[np.ndarray, " n"]) -> str:
    """Count the excluded sites of each class, and name the classes without any remaining site."""
    counts = labels[~included].value_counts()
    summary = f"excluded in total: {(~included).sum()} sites"
    if not len(counts):
        return summary
    classes = ", ".join(f"{name} {count}" for name, count in counts.head(LISTED_CLASSES).items())
    if len(counts) > LISTED_CLASSES:
        classes += f" and {len(counts) - LISTED_CLASSES} more classes"
    # Classes without any remaining site.
    lost = sorted(set(labels) - set(labels[included]))
    names = ", ".join(lost[:LISTED_CLASSES]) + (" …" if len(lost) > LISTED_CLASSES else "")
    return f"{summary} ({classes})" + (f"; no sites remain of {names}" if lost else "")

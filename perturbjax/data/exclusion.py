"""Which sites are left out of training and judging: rules on columns of the index, and what they left out, said."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool

from perturbjax.core.errors import InputError

OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
RULE = re.compile(r"\s*([^<>=!]+?)\s*(<=|>=|==|!=|<|>)\s*(.+?)\s*")
#: Bytes that a file of rules may have.
LARGEST_FILE = 1 << 20
#: Classes that a line names at most.
NAMED = 6


def read_rules(words: Sequence[str]) -> tuple[str, ...]:
    """Rules as they are, and those of files in their place: one a line, empty lines and what follows a # left out.

    Raises:
        InputError: a word is neither a rule nor a file of rules.
    """
    return tuple(
        rule
        for word in words
        for rule in ([word] if RULE.fullmatch(word) else _rules_in(Path(word)))
    )


def _rules_in(path: Path) -> list[str]:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            raise ValueError("there is no such file of rules, one a line")
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"--exclude {path}: is no rule like focus_DNA<-6, and {error}") from error
    rules = [line for line in lines if line]
    for rule in rules:
        if not RULE.fullmatch(rule):
            raise InputError(
                f"--exclude {path}: {rule!r} is no rule like focus_DNA<-6 or Metadata_Well==A01"
            )
    return rules


def matches(index: pd.DataFrame, rule: str) -> Bool[np.ndarray, " n"]:
    """The sites that a rule is true of. `<` and the like compare numbers, `==` and `!=` texts too.

    Raises:
        InputError: it is no rule, its column is not in the index, or numbers are compared with what is none.
    """
    found = RULE.fullmatch(rule)
    if found is None:
        raise InputError(f"--exclude {rule}: is no rule like focus_DNA<-6 or Metadata_Well==A01")
    column, sign, value = found.groups()
    if column not in index.columns:
        raise InputError(
            f"--exclude {rule}: the index has no column {column!r}; it has {', '.join(index.columns)}"
        )
    values = index[column]
    if not pd.api.types.is_numeric_dtype(values):
        if sign in ("==", "!="):
            return OPERATORS[sign](values.astype(str), value).to_numpy(bool)
        raise InputError(
            f"--exclude {rule}: {column} holds text; it can only be compared by == and !="
        )
    try:
        number = float(value)
    except ValueError as error:
        raise InputError(f"--exclude {rule}: {value!r} is no number") from error
    known = values.notna().to_numpy()
    return known & OPERATORS[sign](values, number).to_numpy(bool)


def apply_exclusions(
    index: pd.DataFrame, rules: Sequence[str], label: str
) -> tuple[Bool[np.ndarray, " n"], list[str]]:
    """The sites that no rule leaves out, and one sentence for each rule that says what it leaves out.

    Raises:
        InputError: a rule cannot be used, or none is left.
    """
    kept, said = np.ones(len(index), bool), []
    for rule in rules:
        out = matches(index, rule)
        kept &= ~out
        said.append(f"excluded by {rule}: {out.sum()} of {len(index)} sites{_unknown(index, rule)}")
    if not kept.any():
        raise InputError(f"--exclude {' '.join(rules)}: leaves no site; choose other bounds")
    if rules:
        said.append(_lost(index, kept, label))
    return kept, said


def _unknown(index: pd.DataFrame, rule: str) -> str:
    column = RULE.fullmatch(rule)[1]  # type: ignore[index]  # matches() has refused what is no rule
    missing = int(index[column].isna().sum())
    return f" ({missing} have no {column} and are kept)" if missing else ""


def _lost(index: pd.DataFrame, kept: Bool[np.ndarray, " n"], label: str) -> str:
    labels = index[label].astype(str)
    counts = labels[~kept].value_counts()
    each = ", ".join(f"{name} {count}" for name, count in counts.head(NAMED).items())
    more = f" and {len(counts) - NAMED} classes more" if len(counts) > NAMED else ""
    gone = sorted(set(labels) - set(labels[kept]))
    lost = (
        f"; no site is left of {', '.join(gone[:NAMED])}" + (" …" if len(gone) > NAMED else "")
        if gone
        else ""
    )
    return f"excluded together: {(~kept).sum()} sites" + (
        f" ({each}{more}){lost}" if len(counts) else ""
    )

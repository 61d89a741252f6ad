"""Which columns of a table are features.

A classifier uses every number it gets. Row numbers, identifiers and concentrations in a table
sorted by treatment therefore give perfect scores on pure noise. Three rules keep them out:

1. By name: unnamed columns, `Image_Metadata_*`, identifiers and counters (`ObjectNumber`,
   `Parent_Nuclei`, `WellID`).
2. By content: integers that count the rows (1, 2, 3, ...), and columns that are not numeric.
3. With a label: columns that have one value in each class or on each plate. Measurements have
   noise, so these are annotations. Columns with few values that determine label, plate or well give
   a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int

from perturbjax.core.text_tables import MISSING
from perturbjax.dataset import WELL
from perturbjax.profiles.profile_table import METADATA, SITE_ID

#: Columns that perturbjax writes next to features.
OWN_COLUMNS = (SITE_ID, "label", "part")

_ROW_NUMBERS = "row numbers"
_IDENTIFIERS = "identifiers or counters"
#: Reasons to leave a column out, with the pattern of its name.
_BY_NAME = {
    _ROW_NUMBERS: re.compile(
        r"\s*|Unnamed: ?\d+.*|index|level_\d+|__index_level_\d+__|row_?names?"
    ),
    "metadata of images": re.compile(r"Image_Metadata_.*"),
    _IDENTIFIERS: re.compile(r"(Image|Table|Object)Number"),
}
#: Names of identifiers if all values are whole numbers. Their mean over the cells of a well is not
#: a whole number; it depends on the number of cells, and published profiles use it as a feature.
_WHOLE_IDENTIFIERS = re.compile(
    r".*Object_?Number.*|.*_(Image|Table)Number|(.*_)?Parent_.*|(.*[a-z_])?ID|(.*_)?[iI]d"
)
#: A value that occurs in fewer rows than this, on average, can determine their class by chance.
_ROWS_PER_VALUE = 3
#: Rows from which continuous features are recognized, for speed on tables of many rows.
_SAMPLE = 1000
#: Fraction of rows whose class must follow from the value to give a warning.
_ALMOST = 0.99


def select_features(table: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Select the columns that are features.

    Args:
        table: table as read from a file.
        path: file, for messages.

    Returns:
        The feature columns as numbers, and one sentence for each reason why columns were left out.
    """
    names: list[str] = []
    converted: dict[str, pd.Series] = {}
    reasons: dict[str, list[str]] = {}
    for name, column in table.items():
        name = str(name)
        if name.startswith(METADATA) or name in OWN_COLUMNS:
            continue
        reason = next((why for why, pattern in _BY_NAME.items() if pattern.fullmatch(name)), "")
        if not reason and not pd.api.types.is_numeric_dtype(column):
            column, reason = _to_numbers(column)
            converted[name] = column
        if not reason and _counts_rows(column):
            reason = _ROW_NUMBERS
        elif not reason and _WHOLE_IDENTIFIERS.fullmatch(name) and _is_whole(column):
            reason = _IDENTIFIERS
        if reason:
            reasons.setdefault(reason, []).append(name)
        else:
            names.append(name)
    notes = [f"{path}: left out {list_columns(left)} ({why})" for why, left in reasons.items()]
    numbers = {name: column for name, column in converted.items() if name in set(names)}
    return table[names].assign(**numbers), notes


def list_columns(names: list[str]) -> str:
    """Return the number of columns and the first names: "5 columns: a, b, c, ..."."""
    listed = ", ".join(name or "(without a name)" for name in names[:3])
    return f"{len(names)} column{'s' * (len(names) != 1)}: {listed}{', ...' * (len(names) > 3)}"


def _to_numbers(column: pd.Series) -> tuple[pd.Series, str]:
    """Convert text cells to numbers; the second value is the reason if that is not possible."""
    text = column.astype(object).where(column.notna(), "").astype(str).str.strip()
    # Text such as NA is a missing value, see `text_tables`.
    text = text.mask(text.str.lower().isin(MISSING))
    numbers = pd.to_numeric(text, errors="coerce").astype(float)
    wrong = (numbers.isna() & text.notna()).to_numpy()
    if not wrong.any():
        return numbers, ""
    row = int(np.argmax(wrong))
    return numbers, f"not numeric: {wrong.sum()} cells such as {text.iloc[row]!r} in row {row + 1}"


def _is_whole(column: pd.Series) -> bool:
    return bool((column.dropna().astype(float) % 1 == 0).all())


def _counts_rows(column: pd.Series) -> bool:
    if len(column) < 3 or not pd.api.types.is_integer_dtype(column) or column.hasnans:
        return False
    return bool((np.diff(column.to_numpy(np.int64)) == 1).all())


def find_annotations(
    values: Float32[np.ndarray, "n d"], names: tuple[str, ...], metadata: Mapping[str, pd.Series]
) -> tuple[list[str], list[str]]:
    """Find features that annotate the experiment instead of measuring cells.

    Args:
        values: features.
        names: names of the features.
        metadata: columns to compare with: the label, `Metadata_Plate`, `Metadata_Well`; (n,) each.

    Returns:
        Names of features with one value per class or plate, and warnings as sentences.
    """
    annotations: list[str] = []
    warnings: list[str] = []
    codes = {name: np.unique(column, return_inverse=True)[1] for name, column in metadata.items()}
    for number, name in enumerate(names):
        if len(np.unique(values[:_SAMPLE, number])) > _SAMPLE // 2:
            continue  # continuous: skip sorting all rows
        distinct, value = np.unique(values[:, number], return_inverse=True)
        # Constant columns are dropped later, and columns with many values can match a label by
        # chance.
        if not 2 <= len(distinct) <= len(values) / _ROWS_PER_VALUE:
            continue
        for column, group in codes.items():
            if column != WELL and _is_constant_in_groups(value, group):
                annotations.append(name)
                warnings.append(
                    f"warning: left out feature {name}: it has one value for each {column}, so it "
                    f"is not a measurement. Rename it to {METADATA}{name}."
                )
                break
            if _determines(value, group):
                warnings.append(
                    f"warning: feature {name} determines {column} for at least {_ALMOST:.0%} of "
                    f"the rows. If it is not a measurement, rename it to {METADATA}{name}."
                )
                break
    return annotations, warnings


def _is_constant_in_groups(value: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"]) -> bool:
    # As many (value, group) pairs as groups: each group has a single value.
    pairs = len(np.unique(np.stack([value, group]), axis=1).T)
    groups = group.max() + 1
    return bool(pairs == groups and len(group) >= _ROWS_PER_VALUE * groups)


def _determines(value: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"]) -> bool:
    """Whether the value predicts the group of nearly all rows, unlike the largest group."""
    counts = np.zeros((value.max() + 1, group.max() + 1), int)
    np.add.at(counts, (value, group), 1)
    # Error rate if each value predicts its most frequent group, compared with the error rate of
    # always predicting the largest group.
    wrong = 1 - counts.max(axis=1).sum() / len(value)
    wrong_without = 1 - counts.sum(axis=0).max() / len(value)
    return bool(wrong <= (1 - _ALMOST) and wrong <= 0.1 * wrong_without and wrong_without > 0)

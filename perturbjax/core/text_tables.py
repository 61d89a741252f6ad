"""Rules for text in tables, shared by `load_data.csv`, plate maps and tables of profiles.

The same table must give the same classes, plates and wells whether it is read from CSV, TSV,
parquet or AnnData, and whether it is used to build a dataset or to compare profiles. Therefore all
readers apply these rules to metadata:

1. Metadata are text: plate `0012` stays `0012`.
2. Spaces at both ends of a cell are removed.
3. A cell is missing if it is empty or one of `MISSING` (NA, N/A, NaN, None, null, ...), in upper or
   lower case. Missing cells are read as "".
4. In a column where every number is written like `1.0`, the `.0` is dropped, because pandas writes
   whole numbers so if one cell of the column is missing.
5. The separator of a text file is the one of `SEPARATORS` that gives the header the most columns.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

#: Spellings of a missing value in lower case: those of pandas.read_csv. "" is missing too.
MISSING = frozenset(
    {"", "na", "n/a", "nan", "none", "null", "<na>", "#n/a", "#na", "#n/a n/a", "-nan"}
    | {"1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"}
)
#: Separators of CSV files and their names in messages. A comma wins where two give equally many
#: columns.
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

_WHOLE_NUMBER = r"[+-]?[0-9]+\.0+"


class Dialect(NamedTuple):
    """How the cells of a text file are separated.

    Attributes:
        separator: a key of `SEPARATORS`.
        decimal: decimal sign of numbers, "." or ",".
    """

    separator: str
    decimal: str

    def note(self) -> str:
        """Sentence for an information line, or "" for an ordinary CSV."""
        if self == (",", "."):
            return ""
        sign = ", decimal commas" if self.decimal == "," else ""
        return f"columns are separated by {SEPARATORS[self.separator]}{sign}"


def detect_dialect(header: str, row: str = "") -> Dialect:
    """Find the separator and the decimal sign of a text file.

    Args:
        header: first line of the file.
        row: second line. If columns are separated by semicolons and a cell of it reads like `1,5`,
            numbers have decimal commas.
    """
    # csv.reader ignores separators within quotes. It refuses longer fields, and with the wrong
    # separator the whole line is one field.
    header = header[: csv.field_size_limit()]
    counts = {one: len(next(csv.reader([header], delimiter=one), [])) for one in SEPARATORS}
    separator = max(counts, key=lambda one: counts[one])
    # Programs that write decimal commas separate columns by semicolons.
    comma = separator == ";" and re.search(
        r"(^|;)\s*-?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?\s*(;|$)", row
    )
    return Dialect(separator, "," if comma else ".")


def clean_text(column: pd.Series) -> tuple[pd.Series, int]:
    """Convert a column to text by the rules of this module.

    Args:
        column: values of any type.

    Returns:
        The column as text ("" where a value is missing), and the number of cells from which spaces
        were removed.
    """
    missing = column.isna()
    text = column.astype(object).astype(str).mask(missing, "").astype(object)
    stripped = text.str.strip()
    changed = int(((stripped != text) & (stripped != "")).sum())
    stripped = stripped.mask(stripped.str.lower().isin(MISSING), "")
    filled = stripped[stripped != ""]
    # A single value such as 1.5 shows that the decimals are part of the values.
    if len(filled) and filled.str.fullmatch(_WHOLE_NUMBER).all():
        stripped = stripped.str.replace(r"\.0+$", "", regex=True)
    return stripped.astype(object), changed


def clean_columns(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Convert all columns of a table to text, see `clean_text`.

    Returns:
        The table, and one sentence for each column from which spaces were removed.
    """
    cleaned, notes = {}, []
    for name in table.columns:
        cleaned[name], changed = clean_text(table[name])
        if changed:
            notes.append(f"removed spaces at the ends of {changed} cells of {name}")
    return pd.DataFrame(cleaned, index=table.index), notes


def case_variants(values: Iterable[str]) -> list[list[str]]:
    """Return groups of values that differ only in upper and lower case, such as DMSO and dmso."""
    groups: dict[str, list[str]] = {}
    for value in sorted(set(values)):
        groups.setdefault(value.casefold(), []).append(value)
    return [group for group in groups.values() if len(group) > 1]

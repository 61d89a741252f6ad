"""Reading tables as text."""

from __future__ import annotations

import csv
import io
import lzma
import zlib
from collections import Counter
from pathlib import Path

import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import OPENERS, read_parquet

#: What an empty perturbation stands for, in a table whose column says so: the wells that got the solvent only.
SOLVENT = "DMSO"
#: Bytes a table may have, unpacked.
LARGEST_TABLE = 1 << 28
#: The header is line 1, so the first row is row 2, as editors and spreadsheets number them.
FIRST_ROW = 2


def read_table(path: Path, sep: str = ",") -> pd.DataFrame:
    """A CSV or TSV (also `.gz`, `.bz2`, `.xz`) or parquet with every cell as text; empty cells are empty text.

    Raises:
        InputError: it is missing, empty, cut short or no text; a column stands twice, or a row has not as many cells
            as there are columns (the message names the row).
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        rows = list(
            csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=sep, strict=True)
        )
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error
    rows = [row for row in rows if row]  # blank lines say nothing
    if not rows:
        raise InputError(f"{path}: is empty; it needs a header and one row per site")
    columns = [name.strip() for name in rows[0]]
    name, times = Counter(columns).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"{path}: column {name or '(without a name)'} stands twice in the header; rename one of them"
        )
    for number, row in enumerate(rows[1:], FIRST_ROW):
        if len(row) != len(columns):
            raise InputError(
                f"{path}, row {number}: has {len(row)} cells and the header {len(columns)} columns; "
                "the row was cut short or a cell holds the separator without quotes"
            )
    if len(rows) == 1:
        raise InputError(f"{path}: has a header but no rows")
    return pd.DataFrame(
        [[cell.strip() for cell in row] for row in rows[1:]], columns=columns, dtype=object
    )


def _read_parquet(path: Path) -> pd.DataFrame:
    table = read_parquet(path, "is it whole?")
    if table.empty:
        raise InputError(f"{path}: has a header but no rows")
    empty = table.isna()
    return table.astype(str).mask(empty, "").astype(object)


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a file")
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            content = file.read(LARGEST_TABLE + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read as a table ({error}); is it whole?") from error
    if len(content) > LARGEST_TABLE:
        raise InputError(
            f"{path}: is larger than {LARGEST_TABLE >> 20} MB, unpacked; no table of a screen is"
        )
    if "\0" in text:
        raise InputError(
            f"{path}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: holds a NUL byte; it is damaged"
        )
    return text

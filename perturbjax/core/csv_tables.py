"""Reader for tables of text: CSV, TSV and parquet.

Cells follow the rules of `perturbjax.core.text_tables`, as in tables of profiles: spaces at the
ends are removed, NA and similar spellings are missing values, and commas, semicolons or tabs
separate the columns.
"""

from __future__ import annotations

import codecs
import csv
import io
import lzma
import zlib
from collections import Counter
from pathlib import Path

import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import OPENERS, read_parquet
from perturbjax.core.messages import console
from perturbjax.core.text_tables import SEPARATORS, Dialect, clean_columns, detect_dialect

#: Maximum size of a table in bytes, after decompression.
LARGEST_TABLE = 1 << 28
#: Maximum number of columns. CellProfiler's tables of images have up to some thousands.
MOST_COLUMNS = 10_000
#: Line number of the first row. Line 1 is the header, as in editors and spreadsheets.
FIRST_ROW = 2

_DECIMAL_COMMA = r"[+-]?[0-9]+(,[0-9]+)?([eE][+-]?[0-9]+)?"


def read_table(path: Path) -> pd.DataFrame:
    """Read a table as text.

    Prints an information line about an unusual separator and about cells from which spaces were
    removed.

    Args:
        path: CSV or TSV (also `.gz`, `.bz2`, `.xz`), or parquet.

    Returns:
        All cells as text; missing values are "".

    Raises:
        InputError: The table is missing, empty, truncated or not text; a column name occurs twice;
            or a row and the header have different numbers of cells.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return _clean(_read_parquet(path), path)
    rows, dialect = read_rows(path)
    return table_of_rows(rows, path, decimal=dialect.decimal)


def _clean(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    table, notes = clean_columns(table)
    for note in notes:
        console.print(f"info: {path}: {note}")
    return table


def read_rows(path: Path) -> tuple[list[list[str]], Dialect]:
    """Read the rows of a text file, which may have different numbers of cells.

    Prints an information line about an unusual separator.

    Returns:
        Rows without blank lines, and the separators.

    Raises:
        InputError: The file is missing, empty, truncated, not text, or too wide.
    """
    text = _read_text(path)
    # The first lines suffice to detect the separator.
    lines = [line for line in text[: 1 << 20].splitlines() if line.strip()]
    # A title above the table has no separator.
    start = next((n for n, line in enumerate(lines) if set(line) & set(SEPARATORS)), 0)
    dialect = detect_dialect(*lines[start : start + 2]) if lines else detect_dialect("")
    if dialect.note() and not {".tsv", ".txt"} & set(path.suffixes):  # tabs are usual in these
        console.print(f"info: {path}: {dialect.note()}")
    try:
        rows = list(
            csv.reader(io.StringIO(text, newline=""), delimiter=dialect.separator, strict=True)
        )
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error
    rows = [row for row in rows if row]  # skip blank lines
    if not rows:
        raise InputError(f"{path}: is empty; it needs a header and one row per site")
    if len(rows[0]) > MOST_COLUMNS:
        raise InputError(
            f"{path}: has {len(rows[0]):,} columns; a table of sites has at most {MOST_COLUMNS:,}. "
            "Keep the columns of metadata and file names"
        )
    return rows, dialect


def table_of_rows(rows: list[list[str]], path: Path, decimal: str = ".") -> pd.DataFrame:
    """Build a table of text whose header is the first row.

    Args:
        rows: Header and rows.
        path: File, for messages.
        decimal: Decimal sign of numbers.

    Raises:
        InputError: A column name occurs twice, a row and the header have different numbers of
            cells, or there are no rows.
    """
    columns = [name.strip() for name in rows[0]]
    name, times = Counter(columns).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"{path}: column {name or '(without a name)'} occurs twice in the header; rename one"
        )
    # Without this check, pandas would fill a truncated row with missing values.
    for number, row in enumerate(rows[1:], FIRST_ROW):
        if len(row) != len(columns):
            raise InputError(
                f"{path}, row {number}: has {len(row)} cells, but the header has {len(columns)} "
                "columns; the row is truncated, or a cell with a separator has no quotes"
            )
    if len(rows) == 1:
        raise InputError(f"{path}: has a header but no rows")
    table = pd.DataFrame(rows[1:], columns=columns, dtype=object)
    return _clean(decimal_points(table) if decimal == "," else table, path)


def decimal_points(table: pd.DataFrame) -> pd.DataFrame:
    """Replace decimal commas by points in columns that contain only numbers."""
    for name in table.columns:
        cells = table[name].str.strip()
        # Columns with any other text are left unchanged: a comma can be part of a name.
        if cells[cells != ""].str.fullmatch(_DECIMAL_COMMA).all():
            table[name] = cells.str.replace(",", ".")
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    table = read_parquet(path, "is it whole?")
    if table.empty:
        raise InputError(f"{path}: has a header but no rows")
    return table


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a file")
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            # One byte more than allowed shows that the file is larger; small archives can expand to
            # gigabytes.
            content = file.read(LARGEST_TABLE + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: cannot be read as a table ({error}); the file may be truncated"
        ) from error
    if len(content) > LARGEST_TABLE:
        raise InputError(
            f"{path}: is larger than {LARGEST_TABLE >> 20} MB after decompression; this is not a "
            "table of sites"
        )
    text = _decode(content, path)
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{path}, line {line}: contains a NUL byte; the file is damaged")
    return text


def _decode(content: bytes, path: Path) -> str:
    """Decode UTF-8 and name other encodings, which spreadsheet programs write on Windows."""
    advice = "save the table as UTF-8 (in Excel: 'CSV UTF-8')"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: is encoded as UTF-16, but UTF-8 is required; {advice}")
    try:
        # Also removes the byte order mark that Excel writes.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: is not UTF-8 text (byte 0x{content[error.start]:02x}, "
            f"perhaps of a Windows encoding such as cp1252); {advice}"
        ) from error

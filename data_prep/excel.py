"""Read the cells of XLSX files as text, with bounded size."""

from __future__ import annotations

import datetime
import zipfile
from pathlib import Path
from typing import Any

from perturbjax.core.errors import InputError

#: Maximum size of all parts of a file in bytes, after decompression.
LARGEST_WORKBOOK = 1 << 27
#: Maximum number of rows and columns that are read.
MOST_ROWS, MOST_COLUMNS = 100_000, 256
#: An archive member that declares a document type could define entities of any size.
_DOCTYPE = b"<!DOCTYPE"


def is_excel(path: Path) -> bool:
    """Return whether a file name is that of a spreadsheet."""
    return path.suffix.lower() in (".xlsx", ".xlsm", ".xls")


def read_sheets(path: Path) -> dict[str, list[list[str]]]:
    """Read all sheets with text; cells with formulas have their stored results.

    Returns:
        Name of a sheet -> rows without blank rows; whole numbers have no decimal point.

    Raises:
        InputError: openpyxl is not installed, or the file cannot be read or is too large.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise InputError(
            f'{path}: reading spreadsheets requires `pip install "perturbjax[excel]"`; or save the '
            "sheet as CSV"
        ) from error
    if path.suffix.lower() == ".xls":
        raise InputError(f"{path}: is an old Excel file; save it as .xlsx or CSV")
    _check_archive(path)
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = {
            sheet.title: _rows(
                sheet.iter_rows(max_row=MOST_ROWS, max_col=MOST_COLUMNS, values_only=True)
            )
            for sheet in book.worksheets
        }
        book.close()
    except Exception as error:  # openpyxl raises many types for damaged files
        raise InputError(f"{path}: cannot be read as XLSX ({error}); save it again") from error
    sheets = {name: rows for name, rows in sheets.items() if rows}
    if not sheets:
        raise InputError(f"{path}: has no cell with text; formulas need stored results")
    return sheets


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > LARGEST_WORKBOOK:
                raise InputError(
                    f"{path}: has {size >> 20} MB after decompression; at most "
                    f"{LARGEST_WORKBOOK >> 20} MB are read"
                )
            for member in archive.infolist():
                with archive.open(member) as file:
                    if _DOCTYPE in file.read(4096):
                        raise InputError(f"{path}: {member.filename} has a document type (DOCTYPE)")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read as XLSX ({error}); save it again") from error


def _rows(rows: Any) -> list[list[str]]:
    """Convert cells to text; all rows get the width of the longest one."""
    trimmed = []
    for row in rows:
        texts = [_text(cell) for cell in row]
        while texts and not texts[-1]:
            texts.pop()
        if texts:
            trimmed.append(texts)
    width = max(map(len, trimmed), default=0)
    return [row + [""] * (width - len(row)) for row in trimmed]


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime.datetime | datetime.date):
        return cell.isoformat()
    return str(cell).strip()

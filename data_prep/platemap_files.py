"""Read plate maps: lists of wells and grids, from CSV, TSV, parquet and XLSX files.

A list has one row per well. Usual column names are accepted (`Well`, `Compound`, `Conc (uM)`, ...).
A grid has the shape of the plate: column numbers in its first row and row letters in its first
column. Several grids can follow each other, each with a title, or lie on several sheets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from data_prep.excel import is_excel, read_sheets
from perturbjax.core.csv_tables import decimal_points, read_rows, read_table, table_of_rows
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.plates import FORMATS, row_name, well_name
from perturbjax.core.text_tables import Dialect, clean_columns

#: Columns of a plate map after reading: position, and plate if the map has several.
POSITION, PLATE_NAME = "well_position", "plate"
#: Treatment of a well; the default label column is `Metadata_pert_iname`.
TREATMENT = "pert_iname"
#: Spellings without spaces and punctuation, in lower case.
_WELLS = ("wellposition", "well", "wellid", "wellname", "wellpos", "position", "destinationwell")
_PLATES = ("plate", "plateid", "platename", "platebarcode", "barcode", "assayplatebarcode")
#: The first of these columns is the treatment if the map has no column `pert_iname`.
_TREATMENTS = (
    *("compound", "compoundname", "treatment", "drug", "drugname", "perturbation", "pertname"),
    *("molecule", "gene", "genesymbol", "sirna", "reagent", "condition"),
)
_CONTROL_TYPES = {
    **dict.fromkeys(("negative control", "negative", "neg", "negctrl", "negcon"), "negcon"),
    **dict.fromkeys(("positive control", "positive", "pos", "posctrl", "poscon"), "poscon"),
}
#: Texts in the corner of a grid that are no title.
_CORNERS = ("row", "rowcol", "rowcolumn", *_WELLS)
#: Names of sheets that spreadsheet programs choose.
_DEFAULT_SHEET = r"(sheet|tabelle|feuil|hoja|foglio|blad)\s*\d*"


@dataclass(frozen=True)
class Grid:
    """Values of one property in the shape of a plate, as wells -> text."""

    title: str
    cells: dict[str, str]


def read_platemap(path: Path) -> pd.DataFrame:
    """Read a plate map as text.

    Prints how columns were understood.

    Args:
        path: CSV or TSV (compressed too), parquet or XLSX.

    Returns:
        One row per well: `well_position`, `plate` if the map has it, and its other columns.

    Raises:
        InputError: The file cannot be read, or is neither a list of wells nor a grid.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return _name_columns(read_table(path), path)
    dialect = Dialect(",", ".")
    if is_excel(path):
        sheets = read_sheets(path)
    else:
        rows, dialect = read_rows(path)
        sheets = {"": rows}
    grids = [grid for sheet, rows in sheets.items() for grid in _find_grids(rows, sheet, path)]
    if grids:
        table = _join_grids(grids, path)
        # Programs that write decimal commas separate columns by semicolons.
        table = decimal_points(table) if dialect.separator == ";" else table
        return _name_columns(table, path)
    # The first sheet with a column of wells.
    has_wells = (name for name, rows in sheets.items() if set(map(_plain, rows[0])) & set(_WELLS))
    sheet = next(has_wells, next(iter(sheets)))
    if len(sheets) > 1:
        console.print(f"info: {path}: sheet {sheet} of {len(sheets)} is the plate map")
    return _name_columns(
        table_of_rows(_drop_blank_columns(sheets[sheet]), path, dialect.decimal), path
    )


def _drop_blank_columns(rows: list[list[str]]) -> list[list[str]]:
    """Leave out columns without header and text, which spreadsheet programs export."""
    width = max(map(len, rows))
    used = [n for n in range(width) if any(_cell(row, n) for row in rows)]
    # Rows of another length remain, so that `table_of_rows` reports them.
    return [[row[n] for n in used if n < len(row)] for row in rows]


def _plain(name: str) -> str:
    """Reduce a column name to lower-case letters and digits, without `Metadata_`."""
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("metadata_"))


def _name_columns(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Give well, plate, treatment and concentration their standard names."""
    plain = {_plain(name): name for name in reversed(table.columns)}
    names = {}
    if well := _first(plain, _WELLS):
        names[well] = POSITION
    elif "row" in plain and (column := _first(plain, ("column", "col"))):
        table = table.assign(**{POSITION: table[plain["row"]] + table[column]})
        # Rows can be letters or numbers.
        is_number = table[plain["row"]].str.isdecimal()
        numbers = "r" + table[plain["row"]] + "c" + table[column]
        table[POSITION] = table[POSITION].mask(is_number, numbers)
        table = table.drop(columns=[plain["row"], column])
    else:
        raise InputError(
            f"{path}: has no column of wells, and no grid of row letters and column numbers "
            f"(columns: {', '.join(map(str, table.columns[:8]))}); name the column well"
        )
    if plate := _first(plain, _PLATES):
        names[plate] = PLATE_NAME
    if not {"pertiname", "broadsample"} & set(plain) and (label := _first(plain, _TREATMENTS)):
        names[label] = TREATMENT
    for name in table.columns:
        names.setdefault(name, _standard_name(name))
    changed = [f"{old} as {new}" for old, new in names.items() if old != new]
    if changed:
        console.print(f"info: {path}: reading column {', '.join(changed)}")
    duplicates = {new for new in names.values() if list(names.values()).count(new) > 1}
    if duplicates:
        raise InputError(f"{path}: two columns mean {min(duplicates)}; rename or drop one")
    return _name_controls(table.rename(columns=names))


def _first(plain: dict[str, str], candidates: tuple[str, ...]) -> str:
    return next((plain[name] for name in candidates if name in plain), "")


def _standard_name(name: str) -> str:
    """Return a name for `Metadata_NAME`: `Conc (µM)` becomes `concentration_uM`."""
    text = str(name).removeprefix("Metadata_").replace("µ", "u").replace("μ", "u")
    text = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    text = re.sub(r"^(?i:conc|concentration)(?=_|$)", "concentration", text)
    match = re.fullmatch(r"(concentration|(?i:dose))_(?i:([unm])M)", text)
    return f"{match[1].lower()}_{match[2].lower()}M" if match else text


def _name_controls(table: pd.DataFrame) -> pd.DataFrame:
    """Write the usual spellings of control types as `negcon` and `poscon`."""
    if "control_type" not in table.columns:
        return table
    types = table["control_type"]
    return table.assign(control_type=types.str.lower().map(_CONTROL_TYPES).fillna(types))


def _find_grids(rows: list[list[str]], sheet: str, path: Path) -> list[Grid]:
    """Find all grids of a sheet."""
    grids, start = [], 0
    while start < len(rows):
        columns = _count_columns(rows[start])
        height = _count_rows(rows[start + 1 :]) if columns > 1 else 0
        if height < 2:
            start += 1
            continue
        if (height, columns) not in FORMATS.values():
            shapes = ", ".join(f"{h} x {w}" for h, w in FORMATS.values())
            raise InputError(
                f"{path}: a grid has {height} rows and {columns} columns; plates have {shapes}"
            )
        cells = {
            well_name(row, column): _cell(rows[start + 1 + row], column + 1)
            for row in range(height)
            for column in range(columns)
        }
        grids.append(Grid(_title(rows, start, sheet), cells))
        start += height + 1
    return grids


def _cell(row: list[str], column: int) -> str:
    return row[column].strip() if column < len(row) else ""


def _count_columns(row: list[str]) -> int:
    """Count the column numbers 1, 2, 3, ... after the first cell of a row."""
    count = 0
    while _cell(row, count + 1).removesuffix(".0") in (str(count + 1), f"{count + 1:02d}"):
        count += 1
    return count


def _count_rows(rows: list[list[str]]) -> int:
    """Count the row letters A, B, C, ... in the first cells of rows."""
    count = 0
    while count < len(rows) and count < 32 and _cell(rows[count], 0).upper() == row_name(count):
        count += 1
    return count


def _title(rows: list[list[str]], start: int, sheet: str) -> str:
    """Return the title of a grid: its corner, the line above it, or the name of the sheet."""
    corner = _cell(rows[start], 0)
    if re.search("[A-Za-z]", corner) and _plain(corner) not in _CORNERS:
        return corner
    above = [cell.strip() for cell in rows[start - 1] if cell.strip()] if start else []
    if len(above) == 1:
        return above[0]
    return "" if re.fullmatch(_DEFAULT_SHEET, sheet, re.IGNORECASE) else sheet


def _join_grids(grids: list[Grid], path: Path) -> pd.DataFrame:
    """Make one row per well with a value in any grid."""
    columns: dict[str, dict[str, str]] = {}
    for grid in grids:
        # A single grid has the treatments, whatever the name of its sheet or plate is.
        is_only = len(grids) == 1 and not re.match("dose|conc", grid.title, re.IGNORECASE)
        name = TREATMENT if is_only or not grid.title else grid.title
        if name in columns:
            raise InputError(
                f"{path}: has two grids of {name}; write a title in the cell above or left of each"
            )
        columns[name] = grid.cells
    table, _ = clean_columns(pd.DataFrame(columns))
    table = table[(table != "").any(axis=1)]
    shapes = {len(grid.cells) for grid in grids}
    console.print(
        f"info: {path}: grid of {max(shapes)} wells ({', '.join(columns)}), {len(table)} in use"
    )
    return table.rename_axis(POSITION).reset_index()

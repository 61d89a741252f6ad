"""Plates and their wells: names, formats, geometry, and which plates share a layout."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from jaxtyping import Int

from perturbjax.core.errors import InputError

#: `Metadata_*` columns without which a plate cannot be laid out.
PLATE, WELL, SITE = "Metadata_Plate", "Metadata_Well", "Metadata_Site"
#: Columns that name a compound, best first: one compound can carry several broad_samples.
COMPOUND_COLUMNS = ("Metadata_InChIKey", "Metadata_pert_iname", "Metadata_broad_sample")
#: Wells of the usual plates: (rows, columns).
FORMATS = {
    6: (2, 3),
    12: (3, 4),
    24: (4, 6),
    48: (6, 8),
    96: (8, 12),
    384: (16, 24),
    1536: (32, 48),
}
#: Two plates share a layout when their sets of (well, compound) overlap by at least this Jaccard index. Plates of one
#: layout differ by a few failed wells; plates of two layouts have only their control wells in common.
SAME_LAYOUT = 0.5

#: Row letters (A to Z, AA to AF in 1,536-well plates) and column number: `A01`, `a1`, `A-01`.
_WELL_NAME = re.compile(r"([A-Z]|A[A-F])[\s_-]*0*([1-9][0-9]?)")
#: Row and column numbers, as Opera Phenix names wells: `r01c01`.
_ROW_COLUMN = re.compile(r"R0*([1-9][0-9]?)[\s_-]*C0*([1-9][0-9]?)")
_MAX_ROWS = 32


def parse_well(name: str) -> tuple[int, int]:
    """Parse a well name into row and column, both from 0.

    `A01`, `a1`, `A-01`, `A - 1` and `r01c01` are (0, 0), `P24` is (15, 23) and `AF48` (31, 47).
    Names without a recognized position, such as `A06_rescan`, give (-1, -1).
    """
    name = name.strip().upper()
    if match := _WELL_NAME.fullmatch(name):
        letters, number = match.groups()
        return ord(letters[-1]) - ord("A") + 26 * (len(letters) - 1), int(number) - 1
    if (match := _ROW_COLUMN.fullmatch(name)) and int(match[1]) <= _MAX_ROWS:
        return int(match[1]) - 1, int(match[2]) - 1
    return -1, -1


def parse_wells(names: pd.Series) -> Int[np.ndarray, "n 2"]:
    """`parse_well` of each name."""
    known = {name: parse_well(str(name)) for name in pd.unique(names)}
    return np.array([known[name] for name in names], dtype=int).reshape(-1, 2)


def row_name(row: int) -> str:
    """0 is `A`, 26 is `AA`."""
    return chr(ord("A") + row) if row < 26 else "A" + chr(ord("A") + row - 26)


def well_name(row: int, column: int) -> str:
    """The well in a row and column, both from 0: (0, 0) is `A01`."""
    return f"{row_name(row)}{column + 1:02d}"


def normalize_well(name: str) -> str:
    """`a1`, `A01` and `A001` are all `A01`; a name of another form stays as it is."""
    spot = parse_well(name)
    return name if spot == (-1, -1) else well_name(*spot)


def plate_shape(wells: int) -> tuple[int, int]:
    """(rows, columns) of the smallest usual plate with room for that many wells."""
    return FORMATS[min(size for size in FORMATS if size >= wells)]


def smallest_plate_shape(spots: Int[np.ndarray, "n 2"], least: int = 96) -> tuple[int, int]:
    """(rows, columns) of the smallest usual plate, of at least `least` wells, that has all these rows and columns.

    Columns that no usual plate has (`A49` to `A99`) make it wider.
    """
    rows, columns = (int(end) for end in spots.max(axis=0) + 1)
    for size, (high, wide) in FORMATS.items():
        if size >= least and rows <= high and columns <= wide:
            return high, wide
    return FORMATS[max(FORMATS)][0], columns


def compound_column(index: pd.DataFrame) -> str:
    """The column that names a site's compound.

    Raises:
        InputError: there is none.
    """
    for column in COMPOUND_COLUMNS:
        if column in index.columns:
            return column
    raise InputError(
        f"the index has no column that names a compound; it needs one of {', '.join(COMPOUND_COLUMNS)}"
    )


def plate_layouts(index: pd.DataFrame) -> dict[str, str]:
    """Plate → name of its layout: the first plate (by name) of those that share a plate map.

    Args:
        index: one row a site (or a well) with `Metadata_Plate`, `Metadata_Well` and a compound's column.

    Raises:
        InputError: no column names a compound.
    """
    compound = compound_column(index)
    plates = {
        str(plate): set(zip(rows[WELL].astype(str), rows[compound].astype(str), strict=True))
        for plate, rows in index.groupby(PLATE, sort=True)
    }
    layout: dict[str, str] = {}
    for plate, wells in plates.items():
        alike = [other for other in layout if _jaccard(wells, plates[other]) >= SAME_LAYOUT]
        names = {layout[other] for other in alike}
        home = min(names, default=plate)
        layout[plate] = home
        layout.update({other: home for other, name in layout.items() if name in names})
    return layout


def shared_layouts(index: pd.DataFrame) -> list[list[str]]:
    """Groups of two plates or more that `plate_layouts` gives one layout, by name."""
    groups: dict[str, list[str]] = {}
    for plate, layout in plate_layouts(index).items():
        groups.setdefault(layout, []).append(plate)
    return [sorted(plates) for plates in groups.values() if len(plates) > 1]


def _jaccard(a: set, b: set) -> float:
    return len(a & b) / max(len(a | b), 1)

"""Plates and wells: names, formats, geometry, and plates with the same layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from perturbjax.core.errors import InputError

#: Metadata columns with the position of a site.
PLATE, WELL, SITE = "Metadata_Plate", "Metadata_Well", "Metadata_Site"
BATCH = "Metadata_Batch"
#: Column that marks controls, and its value for wells without cells or treatment.
CONTROL_TYPE, EMPTY = "Metadata_control_type", "empty"
#: Columns that identify a compound, best first: one compound can have several broad_samples.
COMPOUND_COLUMNS = ("Metadata_InChIKey", "Metadata_pert_iname", "Metadata_broad_sample")
#: Column of the treatment, column that marks controls, and its value for negative controls.
COMPOUND, CONTROL_TYPE, NEGATIVE = "Metadata_pert_iname", "Metadata_control_type", "negcon"
#: Name of the solvent control, used for wells without a treatment in a plate map.
SOLVENT = "DMSO"
#: Treatments of negative controls in lower case, if no well is marked as one.
VEHICLES = ("dmso", "negcon", "negative control", "vehicle", "untreated")
#: Number of wells of a standard plate -> (rows, columns).
FORMATS = {
    6: (2, 3),
    12: (3, 4),
    24: (4, 6),
    48: (6, 8),
    96: (8, 12),
    384: (16, 24),
    1536: (32, 48),
}
#: Minimum Jaccard index of the (well, compound) pairs of two plates with the same layout. Plates of
#: one layout differ in a few failed wells; plates of two layouts share their control wells only.
SAME_LAYOUT = 0.5

#: Row letters (A to Z, AA to AF in 1,536-well plates) and column number: `A01`, `a1`, `A-01`.
_WELL_NAME = re.compile(r"([A-Z]|A[A-F])[\s_-]*0*([1-9][0-9]?)")
#: Row and column numbers, as Opera Phenix names wells: `r01c01`.
_ROW_COLUMN = re.compile(r"R0*([1-9][0-9]?)[\s_-]*C0*([1-9][0-9]?)")
_MAX_ROWS = 32
#: Number of a quadrant before or after the well of its source plate: `Q1-A01`, `A01.Q4`.
_QUADRANT = re.compile(r"Q([1-4])[\s._-]*(.+)|(.+?)[\s._-]*Q([1-4])")


def parse_well(name: str) -> tuple[int, int]:
    """Parse a well name into row and column, both from 0.

    `A01`, `a1`, `A-01`, `A - 1` and `r01c01` are (0, 0), `P24` is (15, 23) and `AF48` (31, 47).
    `Q2-A01` and `A01.Q2` are well A01 of the second of four plates that were combined into a plate
    of 384 or 1,536 wells: (0, 1). Names without a recognized position, such as `A06_rescan`, give
    (-1, -1).

    Source of the quadrants: `Plate.get_quadrant` of PyLabRobot. The first wells of quadrants 1 to 4
    are A1, A2, B1 and B2 of the combined plate; its rows and columns alternate.
    """
    position = _parse_plain(name)
    if position == (-1, -1) and (match := _QUADRANT.fullmatch(name.strip().upper())):
        row, column = _parse_plain(match[2] or match[3])
        # The largest source plate has 384 wells.
        if 0 <= row < FORMATS[384][0] and column < FORMATS[384][1]:
            down, right = divmod(int(match[1] or match[4]) - 1, 2)
            return 2 * row + down, 2 * column + right
    return position


def _parse_plain(name: str) -> tuple[int, int]:
    """Parse a well name without quadrant; see `parse_well`."""
    name = name.strip().upper()
    if match := _WELL_NAME.fullmatch(name):
        letters, number = match.groups()
        # Two letters begin with AA, which is row 26.
        return ord(letters[-1]) - ord("A") + 26 * (len(letters) - 1), int(number) - 1
    if (match := _ROW_COLUMN.fullmatch(name)) and int(match[1]) <= _MAX_ROWS:
        return int(match[1]) - 1, int(match[2]) - 1
    return -1, -1


def parse_wells(names: pd.Series) -> Int[np.ndarray, "n 2"]:
    """Parse well names; see `parse_well`.

    Returns:
        (n, 2) rows and columns from 0.
    """
    # Parse each distinct name once: many sites share a well.
    positions = {name: parse_well(str(name)) for name in pd.unique(names)}
    return np.array([positions[name] for name in names], dtype=int).reshape(-1, 2)


def row_name(row: int) -> str:
    """Return the letters of a row from 0: `A` for 0, `AA` for 26."""
    return chr(ord("A") + row) if row < 26 else "A" + chr(ord("A") + row - 26)


def well_name(row: int, column: int) -> str:
    """Return the name of a well: `A01` for row 0 and column 0."""
    return f"{row_name(row)}{column + 1:02d}"


def normalize_well(name: str) -> str:
    """Return the standard spelling of a well name: `A01` for `a1`; unknown names are unchanged."""
    position = parse_well(name)
    return name if position == (-1, -1) else well_name(*position)


def normalize_wells(wells: pd.Series, plates: pd.Series | None, source: Path | str) -> pd.Series:
    """Return the standard spelling of the wells of a table; see `normalize_well`.

    Args:
        wells: Well names.
        plates: Plate of each well; None for wells of a single plate.
        source: File of the table, for messages.

    Raises:
        InputError: A plate has wells with and without the number of a quadrant. `A02` could then be
            a well of the combined plate or of a source plate.
    """
    plate_names = pd.Series("", index=wells.index) if plates is None else plates
    names = pd.DataFrame({"plate": plate_names, "well": wells}).drop_duplicates()
    names = names[[parse_well(name) != (-1, -1) for name in names["well"]]]
    plain = np.array([_parse_plain(name) != (-1, -1) for name in names["well"]], dtype=bool)
    mixed = names[~plain].merge(names[plain], on="plate", suffixes=("", "_plain"))
    if len(mixed):
        first = mixed.iloc[0]
        plate = f"plate {first['plate']}" if first["plate"] else "the plate"
        raise InputError(
            f"{source}: {plate} has wells with a quadrant ({first['well']}) and without "
            f"({first['well_plain']}), so their positions are ambiguous. Name all wells of a plate "
            "in one way"
        )
    # Parse each distinct name once: many rows share a well.
    return wells.map({name: normalize_well(name) for name in wells.unique()})


def separate_batches(tables: Sequence[pd.DataFrame]) -> str:
    """Rename plates of which a well occurs in several batches to BATCH_PLATE, in place.

    Laboratories number the plates of each batch from 1, so that different plates have one name. A
    batch column that differs between the wells of one plate does not separate them.

    Args:
        tables: Tables with `Metadata_Plate`, `Metadata_Well` and optionally `Metadata_Batch`.

    Returns:
        A sentence about the renamed plates, or "".
    """
    with_batch = [table[[PLATE, WELL, BATCH]] for table in tables if BATCH in table.columns]
    if not with_batch:
        return ""
    wells = pd.concat(with_batch).drop_duplicates()
    # One row per well and batch is left, so a repeated well is in several batches.
    several = wells[wells.duplicated([PLATE, WELL])]
    repeated = list(several[PLATE].unique())
    for table in tables:
        if BATCH in table.columns and repeated:
            rows = table[PLATE].isin(repeated)
            table[PLATE] = table[PLATE].mask(rows, table[BATCH] + "_" + table[PLATE])
    if not repeated:
        return ""
    return (
        "renamed plates that occur in several batches to BATCH_PLATE (first: "
        f"{several[BATCH].iloc[0]}_{repeated[0]})"
    )


def plate_shape(wells: int) -> tuple[int, int]:
    """Return (rows, columns) of the smallest standard plate with at least `wells` wells."""
    return FORMATS[min(size for size in FORMATS if size >= wells)]


def smallest_plate_shape(positions: Int[np.ndarray, "n 2"], min_wells: int = 96) -> tuple[int, int]:
    """Return (rows, columns) of the smallest standard plate that contains all positions.

    Args:
        positions: (n, 2) rows and columns from 0. Columns beyond 48 (`A49` to `A99`) give a wider
            plate than the standard.
        min_wells: minimum number of wells.
    """
    rows, columns = (int(end) for end in positions.max(axis=0) + 1)
    for wells, (height, width) in FORMATS.items():
        if wells >= min_wells and rows <= height and columns <= width:
            return height, width
    return FORMATS[max(FORMATS)][0], columns


def compound_column(index: pd.DataFrame) -> str:
    """Return the first column of `COMPOUND_COLUMNS` in a table.

    Raises:
        InputError: the table has none of them.
    """
    for column in COMPOUND_COLUMNS:
        if column in index.columns:
            return column
    names = ", ".join(COMPOUND_COLUMNS)
    raise InputError(f"the index has no column that identifies compounds. Add one of {names}.")


def in_empty_wells(index: pd.DataFrame) -> Bool[np.ndarray, " n"]:
    """True for sites or wells with `Metadata_control_type` empty, which have no treatment."""
    if CONTROL_TYPE not in index.columns:
        return np.zeros(len(index), dtype=bool)
    return (index[CONTROL_TYPE].astype(str) == EMPTY).to_numpy(dtype=bool)


def plate_layouts(index: pd.DataFrame) -> dict[str, str]:
    """Assign plates to layouts. Plates with the same plate map have the same layout.

    Args:
        index: one row per site or well, with `Metadata_Plate`, `Metadata_Well` and a column of
            `COMPOUND_COLUMNS`.

    Returns:
        Plate -> layout, which has the name of its first plate in alphabetical order.

    Raises:
        InputError: no column identifies compounds.
    """
    compound = compound_column(index)
    plates = {
        str(plate): set(zip(rows[WELL].astype(str), rows[compound].astype(str), strict=True))
        for plate, rows in index.groupby(PLATE, sort=True)
    }
    layout: dict[str, str] = {}
    # Single linkage: a plate joins the layout of any plate that is similar enough.
    for plate, wells in plates.items():
        similar = [other for other in layout if _jaccard(wells, plates[other]) >= SAME_LAYOUT]
        # A plate that is similar to plates of several layouts merges these layouts.
        merged = {layout[other] for other in similar}
        name = min(merged, default=plate)
        layout[plate] = name
        layout.update({other: name for other, former in layout.items() if former in merged})
    return layout


def shared_layouts(index: pd.DataFrame) -> list[list[str]]:
    """Return groups of two or more plates with the same layout, sorted by name."""
    groups: dict[str, list[str]] = {}
    for plate, layout in plate_layouts(index).items():
        groups.setdefault(layout, []).append(plate)
    return [sorted(plates) for plates in groups.values() if len(plates) > 1]


def _jaccard(a: set, b: set) -> float:
    return len(a & b) / max(len(a | b), 1)

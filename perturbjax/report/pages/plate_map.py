"""Plate maps: the wells of an index, drawn by the script of the page."""

from __future__ import annotations

import pandas as pd

from perturbjax.core.plates import PLATE, WELL, parse_wells, smallest_plate_shape
from perturbjax.report.pages.page import figure, widget


def has_plate_positions(index: pd.DataFrame) -> bool:
    """Whether all wells have names such as A01."""
    return bool((parse_wells(index[WELL]) >= 0).all())


def plate_maps(name: str, wells: pd.DataFrame, *, color: str, label: str, caption: str) -> str:
    """Draw every plate with its wells, colored by a column that the reader selects, as HTML.

    Args:
        name: name of the figure.
        wells: one row per well with `Metadata_Plate` and `Metadata_Well`. All other columns appear
            on hover and in the color menu. `part` ("test" for test wells) and `flagged` (1 or 0)
            change the symbol; `site` is the anchor that a click leads to.
        color: column of the initial colors.
        label: description for screen readers.
        caption: text below the figure.
    """
    spots = parse_wells(wells[WELL])
    rows, columns = smallest_plate_shape(spots, min_wells=24)
    table = wells.rename(columns={PLATE: "plate", WELL: "well"}).assign(
        row=spots[:, 0], column=spots[:, 1]
    )
    drawing = widget("plates", name, label, color=color, rows=rows, columns=columns)
    return figure(name, drawing, caption, table)

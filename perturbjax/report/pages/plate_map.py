"""Plates drawn as plates: the wells of an index, one row each, as the page's script takes them."""

from __future__ import annotations

import pandas as pd

from perturbjax.core.plates import PLATE, WELL, parse_wells, shape_holding
from perturbjax.report.pages.page import figure, widget


def has_plate_positions(index: pd.DataFrame) -> bool:
    """Whether wells are named as on a plate."""
    return bool((parse_wells(index[WELL]) >= 0).all())


def plate_maps(name: str, wells: pd.DataFrame, *, colour: str, label: str, caption: str) -> str:
    """Every plate with its wells, coloured by the column that the reader chooses, as HTML.

    Args:
        name: of the figure.
        wells: one row a well, `Metadata_Plate` and `Metadata_Well` named as on a plate. All other columns are shown
            on hover, and offered to colour by. `part` ("test" for wells that judge) and `flagged` (1 or 0) change how
            a well is drawn; `site` is where a click on it leads.
        colour: the column that colours first.
        label: what is seen, for those who do not.
        caption: text.
    """
    spots = parse_wells(wells[WELL])
    rows, columns = shape_holding(spots, least=24)
    drawn = wells.rename(columns={PLATE: "plate", WELL: "well"}).assign(
        row=spots[:, 0], column=spots[:, 1]
    )
    drawing = widget("plates", name, label, colour=colour, rows=rows, columns=columns)
    return figure(name, drawing, caption, drawn)

"""Points in the plane that say what they are where the pointer is, and show their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.page import figure, widget

#: Pictures that one layout shows at most; their side in pixels, and how many stand in a row of their sheet.
PICTURES, _SIDE, _ACROSS = 600, 56, 30


def scatter(
    name: str,
    points: pd.DataFrame,
    *,
    colours: Sequence[str],
    label: str,
    caption: str,
    renderer: pictures.Renderer | None = None,
    positions: Int[np.ndarray, " n"] | None = None,
    palette: Mapping[str, str] | None = None,
) -> str:
    """A layout with its data, as HTML.

    Args:
        name: of the figure.
        points: one row a point: `x`, `y` and `class`, whose points are joined where the pointer is. All other columns
            are shown on hover, but `control` (1 where a point is a cross). Where there is a column `part`, points that
            are not "test" are hollow.
        colours: columns offered to colour by, the first of them first.
        label: what is seen, for those who do not.
        caption: text.
        painter, positions: of the dataset, and where each point's site stands in it; without them points show no cells.
        palette: value of the first column → colour, in the order of the legend; what is not in it is grey. By default
            the most frequent values have colours.
    """
    drawn = points.assign(picture=-1)
    settings: dict[str, Any] = {"colours": list(colours)}
    if palette is not None:
        settings["palette"] = dict(palette)
    if renderer is not None and positions is not None:
        count = min(len(drawn), renderer.affordable(PICTURES))
        chosen = np.unique(np.linspace(0, len(drawn) - 1, count).astype(int))
        drawn.iloc[chosen, drawn.columns.get_loc("picture")] = np.arange(len(chosen))
        sites = [renderer.picture(int(position), _SIDE) for position in positions[chosen]]
        settings |= {
            "atlas": pictures.address(pictures.atlas(sites, _SIDE, _ACROSS)),
            "side": _SIDE,
            "across": _ACROSS,
        }
    return figure(name, widget("scatter", name, label, **settings), caption, drawn)

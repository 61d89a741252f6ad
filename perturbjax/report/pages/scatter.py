"""Scatter plots with metadata and cells on hover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.page import figure, widget

#: Maximum number of pictures in one plot, their size in pixels, and pictures per row of the atlas.
PICTURES, _SIDE, _ACROSS = 600, 56, 30


def scatter(
    name: str,
    points: pd.DataFrame,
    *,
    colors: Sequence[str],
    label: str,
    caption: str,
    renderer: pictures.Renderer | None = None,
    positions: Int[np.ndarray, " n"] | None = None,
    palette: Mapping[str, str] | None = None,
) -> str:
    """Draw points with their metadata, as HTML.

    Args:
        name: name of the figure.
        points: one row per point with `x`, `y` and `class`; points of one class are joined on
            hover. All other columns appear on hover, except `control` (1: drawn as a cross). If
            there is a column `part`, points that are not "test" are hollow.
        colors: columns of the color menu; the first is the initial one.
        label: description for screen readers.
        caption: text below the figure.
        renderer: draws the sites of the points; None draws none.
        positions: row of each point's site in the dataset of the renderer.
        palette: value of the first color column -> color, in the order of the legend; other values
            are gray. By default the most frequent values have colors.
    """
    table = points.assign(picture=-1)
    settings: dict[str, Any] = {"colors": list(colors)}
    if palette is not None:
        settings["palette"] = dict(palette)
    if renderer is not None and positions is not None:
        count = min(len(table), renderer.affordable(PICTURES))
        # Evenly spaced points get a picture; -1 in the column `picture` means none.
        chosen = np.unique(np.linspace(0, len(table) - 1, count).astype(int))
        table.iloc[chosen, table.columns.get_loc("picture")] = np.arange(len(chosen))
        sites = [renderer.picture(int(position), _SIDE) for position in positions[chosen]]
        # The page contains one image with all pictures instead of many images.
        sheet = pictures.address(pictures.atlas(sites, _SIDE, _ACROSS))
        settings |= {"atlas": sheet, "side": _SIDE, "across": _ACROSS}
    return figure(name, widget("scatter", name, label, **settings), caption, table)

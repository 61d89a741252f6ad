"""Pixel size of each plate in micrometers: from a column of the table, or from the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from data_prep.site_table import SiteTable
from data_prep.sources.pixel_size import common_size, micrometers
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE

#: Column with the height and width of a pixel of the images in micrometers.
COLUMN = "Metadata_PixelSizeUm"
#: Columns of JUMP tables, in meters.
_JUMP_COLUMNS = ("Metadata_ImageResolutionX", "Metadata_ImageResolutionY")


def plate_pixel_sizes(
    table: SiteTable,
    shapes: Sequence[tuple[int, int]],
    header_sizes: Sequence[float],
    resize: int,
) -> dict[str, float]:
    """Return the size of a stored pixel of each plate in micrometers.

    Plates with an unknown size are left out, and a line is printed if their sites differ.

    Args:
        table: Sites; `Metadata_PixelSizeUm` (µm) or the JUMP columns (m) take precedence.
        shapes: (height, width) of the images of each site.
        header_sizes: Pixel size of the images of each site in micrometers; 0 if unknown.
        resize: Height and width of stored images in pixels; 0 keeps the size.

    Raises:
        InputError: `Metadata_PixelSizeUm` is not a positive number in a row.
    """
    from_table = _column_sizes(table)
    source = np.where(from_table > 0, from_table, header_sizes)
    scales = [_scale(shape, resize) for shape in shapes]
    if source.any() and not all(scales):
        console.print(
            f"info: the pixel size is left out, because --resize {resize} changes the ratio of "
            "height and width"
        )
        return {}
    stored = source * scales
    sizes = {}
    for plate, rows in pd.Series(stored).groupby(table.sites[PLATE].to_numpy(), sort=False):
        # Six digits, since conversions of units change the last ones.
        if size := common_size(rows):
            sizes[str(plate)] = float(f"{size:.6g}")
        elif rows.any():
            texts = [f"{value:.4g} µm" if value else "unknown" for value in sorted(set(rows))]
            console.print(
                f"info: plate {plate}: its pixel size is left out, because its sites differ "
                f"({', '.join(texts[:3])}{', ...' if len(texts) > 3 else ''})"
            )
    return sizes


def _scale(shape: tuple[int, int], resize: int) -> float:
    """Return source pixels per stored pixel; 0 if height and width are scaled differently."""
    height, width = shape
    return common_size((height / resize, width / resize)) if resize else 1.0


def _column_sizes(table: SiteTable) -> np.ndarray:
    """Return the pixel sizes (n,) in the table in micrometers; 0 where it has none."""
    sites = table.sites
    if COLUMN in sites:
        return np.array([_parse(row, table) for row in sites.to_dict("records")])
    if set(_JUMP_COLUMNS) <= set(sites.columns):
        pairs = sites[list(_JUMP_COLUMNS)].itertuples(index=False)
        return np.array([common_size(micrometers(value, "m") for value in pair) for pair in pairs])
    return np.zeros(len(sites))


def _parse(row: dict, table: SiteTable) -> float:
    size = micrometers(row[COLUMN], "um")
    if row[COLUMN] and not size:
        raise InputError(
            f"{table.where(row)}: {COLUMN} is {row[COLUMN]!r}; it must be a number of micrometers "
            "from 0.001 to 1000, or empty"
        )
    return size

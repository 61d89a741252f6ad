"""HTML summary of a dataset or run for notebooks: counts, classes and example sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.colours import address, composite, downsample_pixels
from perturbjax.core.messages import html_text
from perturbjax.core.plates import PLATE, WELL
from perturbjax.dataset.schema import SiteSource

#: Black is the `LOW`-th percentile over sites of their 1st percentiles, full color the `HIGH`-th of
#: their 99th.
LOW, HIGH = 5, 75
#: Maximum number of example sites, their height in pixels, and maximum number of listed classes.
PICTURES, PICTURE_HEIGHT, LISTED_CLASSES = 8, 96, 12


def dataset_card(dataset: SiteSource, index: pd.DataFrame, pixel_sizes: Mapping[str, float]) -> str:
    """Return the HTML summary of a dataset: counts, classes, one site of each frequent class.

    Args:
        dataset: the dataset.
        index: its index.
        pixel_sizes: plate → pixel size in micrometers, 0 if unknown.
    """
    column = dataset.label_column
    counts = index[column].astype(str).value_counts()
    wells = index[[name for name in (PLATE, WELL) if name in index.columns]].drop_duplicates()
    facts = {
        "sites": len(index),
        "wells": len(wells),
        "plates": index[PLATE].nunique() if PLATE in index.columns else 0,
        "cells": int(index["n_cells"].sum()),
        "channels": ", ".join(dataset.channel_names),
        **({"pixel size": text} if (text := describe_pixel_sizes(pixel_sizes)) else {}),
        f"classes of {column}": len(counts),
    }
    classes = [f"{name} ({count})" for name, count in counts.items()]
    return card(str(dataset.path), facts, classes, strip(dataset, column, list(counts.index)))


def describe_pixel_sizes(sizes: Mapping[str, float]) -> str:
    """Return the pixel sizes of plates as text, such as "0.65 µm"; empty if none is known."""
    texts = [f"{size:.3g}" for size in sorted(filter(None, sizes.values()))]
    if not texts:
        return ""
    missing = len(sizes) - len(texts)
    unknown = f" (unknown for {missing} of {len(sizes)} plates)" if missing else ""
    return f"{' to '.join(dict.fromkeys((texts[0], texts[-1])))} µm{unknown}"


def card(title: str, facts: Mapping[str, object], classes: Sequence[str], pictures: str) -> str:
    """Return HTML with a title, one line of facts, pictures and the first classes."""
    summary = " · ".join(
        f"{html_text(name)}: <b>{html_text(value)}</b>" for name, value in facts.items()
    )
    listed = ", ".join(map(html_text, classes[:LISTED_CLASSES]))
    rest = f" … and {len(classes) - LISTED_CLASSES} more" if len(classes) > LISTED_CLASSES else ""
    return (
        f"<div><p><b>{html_text(title)}</b><br>{summary}</p>{pictures}<p>{listed}{rest}</p></div>"
    )


def strip(dataset: SiteSource, column: str, classes: Sequence[str]) -> str:
    """Return the first site of each class as `<img>` tags, with class and site as tooltips."""
    site_ids = dataset.column("site_id")
    values = dataset.column(column).astype(str).to_numpy()
    low, high = contrast(dataset)
    pictures = []
    for name in [name for name in classes if name in values][:PICTURES]:
        # First site of the class: argmax returns the first True.
        position = int(np.argmax(values == name))
        image, mask = dataset.pixels(position)
        # Whole-number downsampling factor; images below the height are not enlarged.
        step = max(min(mask.shape) // PICTURE_HEIGHT, 1)
        data = address(composite(downsample_pixels(image, step), low, high))
        title = html_text(f"{name}, {site_ids[position]}")
        pictures.append(
            f'<img src="{data}" alt="{title}" title="{title}" height="{PICTURE_HEIGHT}"> '
        )
    scale = (
        f"black: {LOW}th percentile over sites of their 1st percentiles; "
        f"full color: {HIGH}th of their 99th percentiles"
    )
    return f"<p>{''.join(pictures)}<br><small>one site for each class; {scale}</small></p>"


def contrast(dataset: SiteSource) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Return the stored intensities of each channel that are displayed as black and as full color,
    each (C,).
    """

    def percentile(statistic: str, percent: float) -> Float[np.ndarray, " c"]:
        columns = [dataset.column(f"{statistic}_{name}") for name in dataset.channel_names]
        numbers = [
            # The index may contain text or missing values in damaged datasets; these count as 0.
            pd.to_numeric(column, errors="coerce").fillna(0).to_numpy(dtype=float)
            for column in columns
        ]
        return np.array([np.percentile(values, percent) for values in numbers])

    low = percentile("p01", LOW)
    # At least 1 above black, so that the display does not divide by 0.
    return low, np.maximum(percentile("p99", HIGH), low + 1)

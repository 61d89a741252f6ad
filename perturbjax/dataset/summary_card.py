"""What a notebook shows of a dataset or a run: counts, classes, and a strip of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.colours import address, composite, downsample_pixels
from perturbjax.core.messages import html_text
from perturbjax.core.plates import PLATE, WELL

if TYPE_CHECKING:
    from perturbjax.dataset.reader import Dataset

#: Black is this percentile, over sites, of a site's 1st percentile; full colour that of its 99th.
LOW, HIGH = 5, 95
#: Pictures in a strip, their side in pixels, and classes that are listed.
PICTURES, SIDE, LISTED = 8, 96, 12


def dataset_card(dataset: Dataset) -> str:
    """A dataset as a piece of HTML: counts, classes, and a site of each of the commonest."""
    index, column = dataset.index, dataset.label_column
    counts = index[column].astype(str).value_counts()
    wells = index[[name for name in (PLATE, WELL) if name in index.columns]].drop_duplicates()
    facts = {
        "sites": len(index),
        "wells": len(wells),
        "plates": index[PLATE].nunique() if PLATE in index.columns else 0,
        "cells": int(index["n_cells"].sum()),
        "channels": ", ".join(dataset.channel_names),
        f"classes of {column}": len(counts),
    }
    named = [f"{name} ({count})" for name, count in counts.items()]
    return card(str(dataset.path), facts, named, strip(dataset, column, list(counts.index)))


def card(title: str, facts: Mapping[str, object], classes: Sequence[str], pictures: str) -> str:
    """HTML of a title, facts in one line, pictures, and the first classes."""
    line = " · ".join(
        f"{html_text(name)}: <b>{html_text(value)}</b>" for name, value in facts.items()
    )
    listed = ", ".join(map(html_text, classes[:LISTED]))
    rest = f" … and {len(classes) - LISTED} more" if len(classes) > LISTED else ""
    return f"<div><p><b>{html_text(title)}</b><br>{line}</p>{pictures}<p>{listed}{rest}</p></div>"


def strip(dataset: Dataset, column: str, classes: Sequence[str]) -> str:
    """The first site of each of the first classes of a column, as `<img>` tags that say what is seen."""
    values = dataset.column(column).astype(str).to_numpy()
    low, high = contrast(dataset)
    pictures = []
    for name in [name for name in classes if name in values][:PICTURES]:
        site = dataset[int(np.argmax(values == name))]
        step = max(min(site["mask"].shape) // SIDE, 1)
        data = address(composite(downsample_pixels(site["image"], step), low, high))
        words = html_text(f"{name}, {site['site_id']}")
        pictures.append(f'<img src="{data}" alt="{words}" title="{words}" height="{SIDE}"> ')
    shown = f"black: {LOW}th percentile over sites of their 1st, full colour: {HIGH}th of their 99th percentile"
    return f"<p>{''.join(pictures)}<br><small>one site a class; {shown}</small></p>"


def contrast(dataset: Dataset) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Stored intensities of each channel that are shown as black and as full colour, from the index alone."""

    def of_sites(statistic: str, share: float) -> Float[np.ndarray, " c"]:
        columns = [dataset.column(f"{statistic}_{name}") for name in dataset.channel_names]
        numbers = [
            pd.to_numeric(column, errors="coerce").fillna(0).to_numpy(dtype=float)
            for column in columns
        ]
        return np.array([np.percentile(values, share) for values in numbers])

    low = of_sites("p01", LOW)
    return low, np.maximum(of_sites("p99", HIGH), low + 1)

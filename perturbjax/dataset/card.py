"""What a notebook shows of a dataset or a run: counts, classes, and a strip of pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt, UInt8

from perturbjax.console import html_text
from perturbjax.plates import PLATE, WELL

if TYPE_CHECKING:
    from perturbjax.dataset.opened import Dataset

#: Colours of channels, added up, that are told apart with any colour vision (after Okabe and Ito, 2008); one channel
#: alone is white.
COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0))
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
    line = " · ".join(f"{html_text(name)}: <b>{html_text(value)}</b>" for name, value in facts.items())
    listed = ", ".join(map(html_text, classes[:LISTED]))
    rest = f" … and {len(classes) - LISTED} more" if len(classes) > LISTED else ""
    return f"<div><p><b>{html_text(title)}</b><br>{line}</p>{pictures}<p>{listed}{rest}</p></div>"


def strip(dataset: Dataset, column: str, classes: Sequence[str]) -> str:
    """The first site of each of the first classes of a column, as `<img>` tags that say what is seen."""
    values = dataset.column(column).astype(str).to_numpy()
    limits = contrast(dataset)
    pictures = []
    for name in [name for name in classes if name in values][:PICTURES]:
        site = dataset[int(np.argmax(values == name))]
        data = base64.b64encode(png(colour(site["image"], limits))).decode()
        words = html_text(f"{name}, {site['site_id']}")
        pictures.append(f'<img src="data:image/png;base64,{data}" alt="{words}" title="{words}" height="{SIDE}"> ')
    shown = "black to full colour: 1st to 99th percentile of the channel (median over sites)"
    return f"<p>{''.join(pictures)}<br><small>one site a class; {shown}</small></p>"


def contrast(dataset: Dataset) -> Sequence[tuple[float, float]]:
    """Intensities of each channel that are shown as black and as full colour, in stored units."""
    return [
        (float(dataset.column(f"p01_{name}").median()), float(dataset.column(f"p99_{name}").median()))
        for name in dataset.channel_names
    ]


def colour(image: UInt[np.ndarray, "h w c"], limits: Sequence[tuple[float, float]]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """An image in colours, each channel between its limits, at most about `SIDE` pixels high by leaving pixels out."""
    step = max(min(image.shape[:2]) // SIDE, 1)
    low, high = np.array(limits, np.float32).T
    shown = np.clip((image[::step, ::step] - low) / np.maximum(high - low, 1), 0, 1)
    channels = shown.shape[2]
    colours = np.array([(255, 255, 255)] if channels == 1 else COLOURS, np.float32)
    return np.clip(shown @ colours[np.arange(channels) % len(colours)], 0, 255).astype(np.uint8)


def png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Pixels as a PNG file."""
    import imagecodecs

    return bytes(imagecodecs.png_encode(pixels))

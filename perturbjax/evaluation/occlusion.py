"""Occlusion maps for networks without attention: which parts of a site does a prediction need?

A window is replaced by the site's median of each channel and by an empty mask. The map contains the
decrease of the predicted class's probability for each window. Windows are twice as wide as their
step, so that each pixel is covered by several windows.

Source: Zeiler and Fergus 2014, arXiv 1311.2901.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from perturbjax.data.augmentation import RawBatch
from perturbjax.dataset import Dataset
from perturbjax.inference import Network

#: Windows along each image axis.
GRID = 8


def occlude(
    network: Network, dataset: Dataset, positions: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, "n g g"]:
    """Compute the decrease of the predicted class's probability for each hidden window."""
    variants = 1 + GRID**2  # the unchanged site, then one variant per window

    def hide_window(batch: RawBatch, first: int) -> RawBatch:
        image: Any = np.array(batch.image)
        mask: Any = np.array(batch.mask)
        for row in range(len(image)):
            # Rows follow site by site, so the remainder is the variant; variant 0 stays unchanged.
            window = (first + row) % variants
            if window:
                rows, columns = window_at(window - 1, image.shape[1], image.shape[2])
                image[row, rows, columns] = np.median(image[row], axis=(0, 1)).astype(image.dtype)
                mask[row, rows, columns] = 0
        return batch._replace(image=image, mask=mask)

    probabilities = network.changed(
        dataset, np.repeat(positions, variants), hide_window
    ).probabilities
    probabilities = probabilities.reshape(len(positions), variants, -1)
    predicted = probabilities[:, 0].argmax(axis=1)
    # Probability of the class predicted for the unchanged site, (sites, variants).
    own = np.take_along_axis(probabilities, predicted[:, None, None], axis=2)[..., 0]
    return (own[:, :1] - own[:, 1:]).reshape(-1, GRID, GRID).astype(np.float32)


def window_at(number: int, height: int, width: int) -> tuple[slice, slice]:
    """Return rows and columns of a window; windows are numbered row by row."""
    slices = []
    for step, length in zip(divmod(number, GRID), (height, width), strict=True):
        # Half a window is one step wide, so windows overlap by half.
        center, half = (step + 0.5) * length / GRID, max(length / GRID, 0.5)
        slices.append(slice(max(0, round(center - half)), max(1, round(center + half))))
    return slices[0], slices[1]


def summary(
    drops: Float[np.ndarray, "n g g"], cells: Float[np.ndarray, "n g g"]
) -> dict[str, float]:
    """Summarize occlusion maps.

    Args:
        drops: maps of `occlude`.
        cells: maps of `window_centers`.

    Returns:
        `largest`: mean over sites of the maximum decrease; `on_cells`: fraction of the total
        decrease in windows centered on cells; `cells`: fraction of such windows.
    """
    # Negative drops mean that hiding the window raised the probability; they do not count.
    losses = np.maximum(drops, 0)
    total = float(losses.sum())
    return {
        "largest": float(losses.max(axis=(1, 2)).mean()),
        "on_cells": float((losses * cells).sum() / total) if total else 0.0,
        "cells": float(cells.mean()),
    }


def window_centers(mask: Int[np.ndarray, "h w"] | np.ndarray) -> Float[np.ndarray, "g g"]:
    """Return 1 for windows whose center lies in a cell, otherwise 0."""
    rows, columns = (((np.arange(GRID) + 0.5) * size / GRID).astype(int) for size in mask.shape)
    return (mask[np.ix_(rows, columns)] > 0).astype(float)

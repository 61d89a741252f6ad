"""Where a network without attention looks: how much less sure it is of its answer where a part of the site is hidden.

Occlusion (Zeiler and Fergus 2014, arXiv 1311.2901): a window takes the site's own median of every channel, and no cell.
Windows are twice as wide as their step, so that each place is hidden by several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int

from perturbjax.data.augmentation import RawBatch
from perturbjax.dataset import Dataset
from perturbjax.training.apply_network import Predictions

#: Windows along each side.
GRID = 8


@runtime_checkable
class Asked(Protocol):
    """What is asked of a network (`inference.Network`)."""

    def changed(
        self,
        dataset: Dataset,
        positions: Int[np.ndarray, " n"],
        change: Callable[[RawBatch, int], RawBatch],
    ) -> Predictions: ...


def occlude(
    network: Asked, dataset: Dataset, positions: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, "n g g"]:
    """By how much the probability of the answer to each site falls where a window is hidden; below 0 it rises."""
    asked = 1 + GRID**2  # as it is, then with each window hidden

    def change(batch: RawBatch, first: int) -> RawBatch:
        image: Any = np.array(batch.image)  # on the host still
        mask: Any = np.array(batch.mask)
        for row in range(len(image)):
            window = (first + row) % asked
            if window:
                rows, columns = window_at(window - 1, image.shape[1], image.shape[2])
                image[row, rows, columns] = np.median(image[row], axis=(0, 1)).astype(image.dtype)
                mask[row, rows, columns] = 0
        return batch._replace(image=image, mask=mask)

    found = network.changed(dataset, np.repeat(positions, asked), change).probabilities
    found = found.reshape(len(positions), asked, -1)
    told = found[:, 0].argmax(axis=1)
    sure = np.take_along_axis(found, told[:, None, None], axis=2)[..., 0]
    return (sure[:, :1] - sure[:, 1:]).reshape(-1, GRID, GRID).astype(np.float32)


def window_at(number: int, height: int, width: int) -> tuple[slice, slice]:
    """The pixels of a window, numbered row by row."""
    sides = []
    for at, length in zip(divmod(number, GRID), (height, width), strict=True):
        middle, half = (at + 0.5) * length / GRID, max(length / GRID, 0.5)
        sides.append(slice(max(0, round(middle - half)), max(1, round(middle + half))))
    return sides[0], sides[1]


def summary(
    drops: Float[np.ndarray, "n g g"], cells: Float[np.ndarray, "n g g"]
) -> dict[str, float]:
    """In numbers: `largest`, the mean over sites of the greatest loss; `on_cells`, the share of all that is lost in
    windows about a cell's pixel, and `cells`, the share of such windows.

    Args:
        cells: 1 where a window's middle lies in a cell.
    """
    lost = np.maximum(drops, 0)
    total = float(lost.sum())
    on_cells = float((lost * cells).sum() / total) if total else 0.0
    return {
        "largest": float(lost.max(axis=(1, 2)).mean()),
        "on_cells": on_cells,
        "cells": float(cells.mean()),
    }


def window_centers(mask: Int[np.ndarray, "h w"] | np.ndarray) -> Float[np.ndarray, "g g"]:
    """1 where the middle of a window lies in a cell."""
    rows, columns = (((np.arange(GRID) + 0.5) * side / GRID).astype(int) for side in mask.shape)
    return (mask[np.ix_(rows, columns)] > 0).astype(float)

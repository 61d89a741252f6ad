"""Training images of a run as a reference: distance of other images to them, and ranges.

Distance. Network features are standardized. The distance of a site is its Mahalanobis distance to
the nearest class mean, with one covariance within classes (Lee et al. 2018, NeurIPS, arXiv
1807.03888), shrunk because there are often fewer sites than features (Ledoit & Wolf 2004, J
Multivar Anal 88, 365).

Ranges. The number of cells and the mean intensity of each channel are compared with the 1st and
99th percentile of the training sites.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

#: Columns of the index with a range: number and area of cells, mean intensity of each channel.
_RANGED = re.compile(r"^(n_cells|mask_area|mean_.*)$")
_PERCENTILES = (1, 99)
#: Fraction of sites outside the training range above which a column is reported; 2 % are expected.
_MANY_OUTSIDE = 0.2
#: Fraction of sites unlike the training images above which they are reported; 5 % are expected.
MANY_UNLIKE = 0.15


@dataclass(frozen=True)
class TrainingReference:
    """Class means of the training features, their scale, and ranges of the training sites.

    Attributes:
        center: mean of each feature.
        whitening: matrix from centered features to features of covariance 1 within classes.
        means: whitened mean of each training class.
        columns: columns of the index with a range.
        low: 1st percentile of each of these columns over the training sites.
        high: 99th percentile.
    """

    center: Float[np.ndarray, " d"]
    whitening: Float[np.ndarray, "d d"]
    means: Float[np.ndarray, "_classes d"]
    columns: tuple[str, ...]
    low: Float[np.ndarray, " columns"]
    high: Float[np.ndarray, " columns"]

    def distance(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Compute the distance of each site to the nearest class of the training sites."""
        white = (features.astype(float) - self.center) @ self.whitening
        # |a - b|² = |a|² - 2 a·b + |b|²; rounding can leave a value below 0.
        squared = (white**2).sum(axis=1)[:, None] - 2 * white @ self.means.T
        return np.sqrt(np.maximum((squared + (self.means**2).sum(axis=1)).min(axis=1), 0))

    def range_warnings(self, index: pd.DataFrame) -> list[str]:
        """Describe columns with many sites outside the range of the training sites."""
        warnings = []
        for column, low, high in zip(self.columns, self.low, self.high, strict=True):
            if column not in index.columns:
                continue
            values = index[column].to_numpy(dtype=float)
            outside = float(((values < low) | (values > high)).mean())
            if outside > _MANY_OUTSIDE:
                warnings.append(
                    f"{_describe_column(column)}: {outside:.0%} of the sites are outside the "
                    f"training range {low:,.4g} to {high:,.4g} (median here "
                    f"{np.median(values):,.4g})"
                )
        return warnings


def _describe_column(column: str) -> str:
    """Return words for a column: `mean_DNA` is "mean intensity of DNA"."""
    words = {"n_cells": "number of cells", "mask_area": "area of the cells"}
    return words.get(column, f"mean intensity of {column.removeprefix('mean_')}")


def fit_reference(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], index: pd.DataFrame
) -> TrainingReference:
    """Fit class means, covariance and ranges to the training sites.

    Args:
        features: network features of the training sites.
        labels: their classes.
        index: their rows of the index.
    """
    from sklearn.covariance import ledoit_wolf

    x = features.astype(float)
    center, scale = x.mean(axis=0), x.std(axis=0)
    # Features without variance (unused units) keep their scale.
    scale = np.where(scale > 0, scale, 1.0)
    x = (x - center) / scale
    classes, numbers = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), x.shape[1]))
    np.add.at(sums, numbers.ravel(), x)
    means = sums / np.bincount(numbers.ravel())[:, None]
    covariance, _ = ledoit_wolf(x - means[numbers.ravel()], assume_centered=True)
    # A small ridge, for training sites without any variance within classes.
    values, vectors = np.linalg.eigh(covariance + 1e-6 * np.eye(len(covariance)))
    rotation = vectors / np.sqrt(np.maximum(values, 1e-12))
    columns = [column for column in index.columns if _RANGED.match(str(column))]
    table = index[columns].to_numpy(dtype=float)
    low, high = np.percentile(table, _PERCENTILES, axis=0)
    # Single precision halves the stored file.
    whitening, white_means = (
        values.astype(np.float32) for values in (rotation / scale[:, None], means @ rotation)
    )
    return TrainingReference(center, whitening, white_means, tuple(columns), low, high)

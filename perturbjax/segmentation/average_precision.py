"""Average precision of instance masks: the fraction of objects that match the ground truth at an
overlap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float, Int, Integer

#: Intersection over union (IoU) at which scores are reported.
THRESHOLDS = (0.5, 0.75, 0.9)


class Matches(NamedTuple):
    """Counts of objects of one image, for each threshold."""

    true_positives: Int[np.ndarray, " t"]
    false_positives: Int[np.ndarray, " t"]
    false_negatives: Int[np.ndarray, " t"]

    @property
    def average_precision(self) -> Float[np.ndarray, " t"]:
        """TP / (TP + FP + FN), as in Cellpose; 1 if both masks are empty."""
        total = sum(self)
        return np.where(total > 0, self.true_positives / np.maximum(total, 1), 1.0)


def overlaps(
    truth: Integer[np.ndarray, "h w"], labels: Integer[np.ndarray, "h w"]
) -> Float[np.ndarray, "n m"]:
    """Return the IoU of every true object with every predicted object; labels may have gaps."""
    # Numbers without gaps, so that they can index the matrix of overlaps.
    _, a = np.unique(truth, return_inverse=True)
    _, b = np.unique(labels, return_inverse=True)
    # Background has index 0, also in a mask without background.
    a, b = a.ravel() + (0 not in truth), b.ravel() + (0 not in labels)
    # (1 + n, 1 + m): number of pixels for each pair of a true and a predicted label.
    shared = sparse.coo_array((np.ones(a.size), (a, b)), (a.max() + 1, b.max() + 1)).toarray()
    union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
    # Row and column 0 belong to the background.
    return (shared / np.maximum(union, 1))[1:, 1:]


def match(
    truth: Integer[np.ndarray, "h w"],
    labels: Integer[np.ndarray, "h w"],
    thresholds: Iterable[float] = THRESHOLDS,
) -> Matches:
    """Match the objects of one image: as many pairs as possible at each threshold, each object
    once.

    Raises:
        ValueError: the masks differ in shape.
    """
    from scipy.optimize import linear_sum_assignment

    if truth.shape != labels.shape:
        raise ValueError(f"masks of shapes {truth.shape} and {labels.shape} cannot be compared")
    iou = overlaps(truth, labels)
    n, m = iou.shape
    hits = []
    for threshold in thresholds:
        # A pair above the threshold counts more than any sum of overlaps below it.
        pairs = linear_sum_assignment(
            (iou >= threshold) + iou / (2 * max(min(n, m), 1)), maximize=True
        )
        hits.append(int((iou[pairs] >= threshold).sum()))
    true = np.array(hits, int)
    return Matches(true, m - true, n - true)


def mean(matches: Iterable[Matches]) -> Float[np.ndarray, " t"]:
    """Average over images, each with the same weight."""
    return np.mean([image.average_precision for image in matches], axis=0)

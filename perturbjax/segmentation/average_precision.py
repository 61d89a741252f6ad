"""Average precision of instance masks: how many objects are found, at a stated overlap with the truth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float, Int, Integer

#: Intersection over union at which scores are stated.
THRESHOLDS = (0.5, 0.75, 0.9)


class Matches(NamedTuple):
    """Objects of one image, a count for each threshold."""

    true_positives: Int[np.ndarray, " t"]
    false_positives: Int[np.ndarray, " t"]
    false_negatives: Int[np.ndarray, " t"]

    @property
    def average_precision(self) -> Float[np.ndarray, " t"]:
        """TP / (TP + FP + FN), as cellpose states it of an image; 1 where there is nothing to find."""
        everything = sum(self)
        return np.where(everything > 0, self.true_positives / np.maximum(everything, 1), 1.0)


def overlaps(
    truth: Integer[np.ndarray, "h w"], found: Integer[np.ndarray, "h w"]
) -> Float[np.ndarray, "n m"]:
    """Intersection over union of every object of the truth with every found one; labels may have gaps."""
    _, a = np.unique(truth, return_inverse=True)
    _, b = np.unique(found, return_inverse=True)
    a, b = a.ravel() + (0 not in truth), b.ravel() + (0 not in found)
    shared = sparse.coo_array((np.ones(a.size), (a, b)), (a.max() + 1, b.max() + 1)).toarray()
    union = shared.sum(1, keepdims=True) + shared.sum(0, keepdims=True) - shared
    return (shared / np.maximum(union, 1))[1:, 1:]


def match(
    truth: Integer[np.ndarray, "h w"],
    found: Integer[np.ndarray, "h w"],
    thresholds: Iterable[float] = THRESHOLDS,
) -> Matches:
    """Pair the objects of one image, as many as can be at each threshold, no object twice.

    Raises:
        ValueError: the masks' shapes differ.
    """
    from scipy.optimize import linear_sum_assignment

    if truth.shape != found.shape:
        raise ValueError(f"masks of shapes {truth.shape} and {found.shape} cannot be compared")
    iou = overlaps(truth, found)
    n, m = iou.shape
    hits = []
    for threshold in thresholds:
        # A pair above the threshold outweighs any sum of overlaps below it.
        pairs = linear_sum_assignment(
            (iou >= threshold) + iou / (2 * max(min(n, m), 1)), maximize=True
        )
        hits.append(int((iou[pairs] >= threshold).sum()))
    true = np.array(hits, int)
    return Matches(true, m - true, n - true)


def mean(matches: Iterable[Matches]) -> Float[np.ndarray, " t"]:
    """Average precision of each image, averaged over the images: crowded and sparse ones count alike."""
    return np.mean([image.average_precision for image in matches], axis=0)

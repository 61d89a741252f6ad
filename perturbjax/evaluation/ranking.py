"""Rankings by cosine similarity: average precision, recall, and values of random rankings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

#: Fraction of the wells that `recall_at_top` counts.
TOP = 0.01
#: Queries per block.
_BLOCK = 256


def unit_rows(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Scale rows to length 1; rows of zeros are unchanged and have similarity 0."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def average_precision(
    similarity: Float[np.ndarray, "q n"],
    positives: Bool[np.ndarray, "q n"],
    negatives: Bool[np.ndarray, "q n"],
) -> Float[np.ndarray, " q"]:
    """Compute the average precision of each row's ranking.

    AP = mean over the positives of (rank among positives) / (rank among all). Negatives precede
    positives of equal similarity. NaN for rows without positives or negatives.
    """
    precision = np.full(len(similarity), np.nan)
    for row in np.flatnonzero(positives.any(axis=1) & negatives.any(axis=1)):
        right = np.sort(similarity[row, positives[row]])[::-1]
        wrong = np.sort(similarity[row, negatives[row]])
        # Number of negatives that are at least as similar as each positive.
        before = len(wrong) - np.searchsorted(wrong, right, side="left")
        rank = np.arange(1, len(right) + 1)
        precision[row] = (rank / (rank + before)).mean()
    return precision


def recall_at_top(
    similarity: Float[np.ndarray, "q n"],
    positives: Bool[np.ndarray, "q n"],
    negatives: Bool[np.ndarray, "q n"],
) -> Float[np.ndarray, " q"]:
    """Compute the fraction of positives among the most similar 1 % of wells (at least one).

    NaN for rows without positives or negatives.
    """
    recall = np.full(len(similarity), np.nan)
    for row in np.flatnonzero(positives.any(axis=1) & negatives.any(axis=1)):
        pool = positives[row] | negatives[row]
        # 1 % of the wells that take part in this ranking.
        top = max(1, int(np.ceil(TOP * pool.sum())))
        # Wells outside of the pool have similarity -inf and are therefore not among the nearest.
        near = np.argpartition(-np.where(pool, similarity[row], -np.inf), top - 1)[:top]
        recall[row] = positives[row, near].sum() / positives[row].sum()
    return recall


def similarity_blocks(
    features: Float[np.ndarray, "n d"],
) -> Iterator[tuple[Int[np.ndarray, " q"], Float[np.ndarray, "q n"]]]:
    """Yield blocks of rows and their cosine similarity to all rows."""
    unit = unit_rows(features)
    for start in range(0, len(unit), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(unit)))
        yield rows, unit[rows] @ unit.T


def random_precision(
    positives: int, negatives: int, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, " draws"]:
    """Simulate the average precision of random rankings."""
    # Ranks of the positives among all wells, from 1, in ascending order.
    ranks = np.sort(_distinct_numbers(positives, positives + negatives, draws, rng), axis=1) + 1
    return (np.arange(1, positives + 1) / ranks).mean(axis=1)


def _distinct_numbers(
    count: int, limit: int, draws: int, rng: np.random.Generator
) -> Int[np.ndarray, "draws count"]:
    """Draw `count` distinct numbers below `limit` for each row."""
    if count * count > limit:
        # Rejection is slow here: many rows would contain a number twice (birthday problem).
        rows = [rng.choice(limit, count, replace=False, shuffle=False) for _ in range(draws)]
        return np.stack(rows)
    numbers = rng.integers(limit, size=(draws, count))
    while True:  # few rows contain a number twice; draw these again
        ordered = np.sort(numbers, axis=1)
        repeated = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(repeated):
            return numbers
        numbers[repeated] = rng.integers(limit, size=(len(repeated), count))

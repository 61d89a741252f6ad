"""Three measures of how much a treatment differs from the negative controls of its plates.

All work on the wells of one `Pool`, are larger for stronger effects, and are evaluated for many
label assignments at once, so that `permutation_test` can use them:

- mean average precision: do replicates of the treatment rank each other before the controls of the
  same plate, by cosine similarity? (Kalinin et al. 2025, Nature Communications 16, 5181). It
  answers whether the effect is reproducible.
- energy distance: 2 E|X-Y| - E|X-X'| - E|Y-Y'| for treated wells X and control wells Y (Szekely and
  Rizzo 2013, J Stat Plan Inference 143, 1249). It answers whether the distributions differ.
- Mahalanobis distance: length of the mean shift in units of the spread between like wells, after
  whitening by a shrunken covariance (Ledoit and Wolf 2004, J Multivariate Analysis 88, 365). It
  answers how large the shift is.

The pool is centered plate by plate on the mean of treated and control wells together, and the
covariance is estimated from both. This makes everything independent of the labels, which the
permutation test needs; centering on the controls alone would make the treated wells look further
away than they are when controls are few.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from sklearn.covariance import ledoit_wolf

from perturbjax.screening.permutations import Pool, Statistic

#: Values of one intermediate array of `average_precision_statistic`; bounds memory.
_BLOCK_VALUES = 4_000_000


def center_by_plate(
    values: Float[np.ndarray, "n d"], plates: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n d"]:
    """Subtract from each well the mean of its plate's wells.

    Args:
        values: one row per well.
        plates: plate of each well.
    """
    # Plate numbers from 0 without gaps.
    numbers = np.unique(plates, return_inverse=True)[1]
    sums = np.zeros((numbers.max() + 1, values.shape[1]))
    np.add.at(sums, numbers, values)
    return values - (sums / np.bincount(numbers)[:, None])[numbers]


def energy_statistic(values: Float[np.ndarray, "n d"], pool: Pool) -> Statistic:
    """Energy distance between treated and control wells, for every assignment.

    Args:
        values: centered profiles of the pool's wells.
        pool: the wells.
    """
    squares = (values**2).sum(axis=1)
    # |x - y|² = |x|² + |y|² - 2 x·y, in place, since new arrays take most of the time.
    distances = values @ values.T
    distances *= -2
    distances += squares
    distances += squares[:, None]
    # Rounding can make small distances negative.
    np.maximum(distances, 0, out=distances)
    np.sqrt(distances, out=distances)
    np.fill_diagonal(distances, 0)
    # The sums over controls follow from these totals. Each assignment then needs only the
    # distances between its treated wells.
    row_sums, total = distances.sum(axis=1), distances.sum()
    n, m = pool.treated, len(values) - pool.treated

    def statistic(treated: Int[np.ndarray, "p n"]) -> Float[np.ndarray, " p"]:
        within = _pair_sums(distances, treated)
        to_all = row_sums[treated].sum(axis=1)
        across = to_all - within
        return 2 * across / (n * m) - within / n**2 - (total - 2 * to_all + within) / m**2

    return statistic


def _pair_sums(
    matrix: Float[np.ndarray, "n n"], treated: Int[np.ndarray, "p k"]
) -> Float[np.ndarray, " p"]:
    """Sum of a symmetric matrix over all ordered pairs of each row of positions."""
    size, (count, k) = len(matrix), treated.shape
    first, second = np.triu_indices(k, 1)
    flat, sums = matrix.ravel(), np.empty(count)
    # Blocks bound the memory; each needs k (k - 1) / 2 values for each assignment.
    step = max(1, _BLOCK_VALUES // max(len(first), 1))
    for start in range(0, count, step):
        block = treated[start : start + step].astype(np.int64)
        sums[start : start + step] = flat[block[:, first] * size + block[:, second]].sum(axis=1)
    # Each pair counts twice, and the diagonal once.
    return 2 * sums + np.diagonal(matrix)[treated].sum(axis=1)


def mahalanobis_statistic(values: Float[np.ndarray, "n d"], pool: Pool) -> Statistic:
    """Distance between the treated and the control mean in units of the spread between like wells.

    Args:
        values: centered profiles of the pool's wells.
        pool: the wells.
    """
    whitened = values @ _whitening(values)
    n, m = pool.treated, len(values) - pool.treated
    # The squared length of a sum of vectors is the sum of their inner products.
    products = whitened @ whitened.T

    def statistic(treated: Int[np.ndarray, "p n"]) -> Float[np.ndarray, " p"]:
        length = np.sqrt(np.maximum(_pair_sums(products, treated), 0)) / n
        # The pool sums to zero, so the control mean is -n / m times the treated mean.
        return length * (1 + n / m)

    return statistic


def _whitening(values: np.ndarray) -> np.ndarray:
    covariance, _ = ledoit_wolf(values, assume_centered=True)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    # The floor limits the gain of directions that have almost no variance.
    floor = max(eigenvalues.max() * 1e-6, 1e-12)
    return vectors / np.sqrt(np.maximum(eigenvalues, floor))


def average_precision_statistic(values: Float[np.ndarray, "n d"], pool: Pool) -> Statistic:
    """Mean average precision of treated wells retrieving each other before their plate's controls.

    Treated wells on a query's own plate are positives like those on other plates. NaN for a single
    treated well. Of equally similar wells the controls come first.

    Args:
        values: centered profiles of the pool's wells.
        pool: the wells.
    """
    length = np.linalg.norm(values, axis=1, keepdims=True)
    # Rows of zeros are unchanged and have similarity 0.
    unit = values / np.where(length > 0, length, 1)
    similarity = unit @ unit.T
    rank = _plate_ranks(similarity, pool.plates)
    n = pool.treated
    # `_mean_precision` needs n² values for each assignment.
    step = max(1, _BLOCK_VALUES // n**2)

    def statistic(treated: Int[np.ndarray, "p n"]) -> Float[np.ndarray, " p"]:
        if n < 2:
            return np.full(len(treated), math.nan)
        blocks = [treated[start : start + step] for start in range(0, len(treated), step)]
        return np.concatenate([_mean_precision(b, similarity, pool.plates, rank) for b in blocks])

    return statistic


def _plate_ranks(
    similarity: Float[np.ndarray, "n n"], plates: Int[np.ndarray, " n"]
) -> Int[np.ndarray, "n n"]:
    """For each query (row): number of wells of its plate that are at least as similar as a well.

    The well itself counts if it is on the plate, and the query does not.
    """
    mates = plates[:, None] == plates
    np.fill_diagonal(mates, False)
    order = np.argsort(-similarity, axis=1)
    counts = np.take_along_axis(mates, order, axis=1).cumsum(axis=1, dtype=np.int32)
    rank = np.empty(similarity.shape, dtype=np.int32)
    np.put_along_axis(rank, order, counts, axis=1)
    # Equally similar wells all have the rank of the last of them.
    ordered = np.take_along_axis(similarity, order, axis=1)
    for query in np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1)):
        row = np.sort(similarity[query, mates[query]])
        rank[query] = len(row) - np.searchsorted(row, similarity[query], side="left")
    return rank


def _mean_precision(
    treated: np.ndarray, similarity: np.ndarray, plates: np.ndarray, rank: np.ndarray
) -> np.ndarray:
    """Mean over the treated wells of their average precision, for each assignment."""
    count, n = treated.shape
    pairs = treated.astype(np.int64)[:, :, None] * len(similarity) + treated[:, None, :]
    own = similarity.ravel()[pairs]  # (assignment, query, positive)
    # A query is not its own positive: it is sorted to the end.
    own[:, np.arange(n), np.arange(n)] = -np.inf
    order = np.argsort(-own, axis=2)[:, :, : n - 1]
    ranked = np.take_along_axis(rank.ravel()[pairs], order, axis=2)
    own_plates = plates[treated]
    mates = np.take_along_axis(own_plates[:, None, :], order.reshape(count, 1, -1), axis=2)
    mates = mates.reshape(count, n, n - 1) == own_plates[:, :, None]
    # Treated wells of the query's plate are no negatives: take them out of its rank.
    negatives = ranked - mates.cumsum(axis=2)
    positives = np.arange(1, n)
    return (positives / (positives + negatives)).mean(axis=(1, 2))

"""Permutation test: is the score compatible with labels that are unrelated to the images?

Null hypothesis: within a plate (and fold), the labels of the wells are exchangeable. The test
shuffles the labels of whole wells within plate and fold and scores the unchanged predictions
against the shuffled labels. Sites of a well keep one label because they are not independent. The
p-value is the fraction of arrangements, the observed one included, with at least the observed
score (Phipson & Smyth 2010, Stat Appl Genet Mol Biol 9, 39). No model is refitted: the predictions
of a fold do not depend on the labels of its test wells.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

from perturbjax.evaluation.baselines import BaselineUnavailable
from perturbjax.evaluation.scores import HEADLINE, METRICS, Counts

#: Minimum number of distinct arrangements; fewer cannot give p < 0.01.
_MIN_ARRANGEMENTS = 100


def permutation_p(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    wells: Int[np.ndarray, " n"],
    blocks: Int[np.ndarray, " n"],
    *,
    metric: str = HEADLINE,
    permutations: int = 2000,
    seed: int = 0,
) -> float:
    """Compute the p-value of a score by shuffling the labels of wells within blocks.

    Args:
        labels: true class of each site.
        probabilities: predicted probabilities of each site.
        wells: well number of each site, from 0.
        blocks: number of the block (plate and fold) of each site, equal for all sites of a well.
        metric: name of a metric.
        permutations: number of random arrangements.
        seed: seed of the random numbers.

    Raises:
        BaselineUnavailable: sites of one well have different labels, or there are too few
            arrangements.
    """
    # Index of the first site of each well.
    first = np.unique(wells, return_index=True)[1]
    well_labels, well_blocks, classes = labels[first], blocks[first], probabilities.shape[1]
    if (well_labels[wells] != labels).any():
        raise BaselineUnavailable("sites of one well have different labels")
    arrangements = _log_arrangements(well_labels, well_blocks)
    if arrangements < np.log(_MIN_ARRANGEMENTS):
        raise BaselineUnavailable(
            f"the labels of the wells of a plate have only {round(np.exp(arrangements))} "
            f"arrangements; {_MIN_ARRANGEMENTS} are needed for a p-value below 0.01"
        )
    # predicted[w, c]: number of sites of well w with predicted class c.
    predicted = np.zeros((len(first), classes))
    np.add.at(predicted, (wells, probabilities.argmax(axis=1)), 1)
    sites = predicted.sum(axis=1)
    rng = np.random.default_rng(seed)
    order = np.lexsort((np.arange(len(first)), well_blocks))  # sorts wells by block
    scores = np.empty(permutations + 1)
    for row in range(permutations + 1):
        # Row 0 is the observed arrangement. Sorting by block, then by random numbers, shuffles
        # the labels within each block.
        shuffled = order if row == 0 else np.lexsort((rng.random(len(first)), well_blocks))
        permuted = np.empty_like(well_labels)
        permuted[order] = well_labels[shuffled]
        truth = np.bincount(permuted, weights=sites, minlength=classes)
        # Number of sites of each well that are predicted as its shuffled label.
        right = predicted[np.arange(len(first)), permuted]
        hits = np.bincount(permuted, weights=right, minlength=classes)
        counts = Counts(truth, predicted.sum(axis=0), hits, np.float64(0))
        scores[row] = METRICS[metric].function(counts)
    # The tolerance counts ties despite rounding. Row 0 is included, so that p is never 0.
    return float((scores >= scores[0] - 1e-12).mean())


def _log_arrangements(
    labels: Int[np.ndarray, " wells"], blocks: Int[np.ndarray, " wells"]
) -> float:
    """Logarithm of the number of distinct arrangements of the labels within blocks."""
    pairs = np.unique(np.stack([blocks, labels]), axis=1, return_counts=True)[1]
    # Multinomial coefficient n! / (n_1! n_2! ...) of each block, multiplied over the blocks.
    return float(gammaln(np.bincount(blocks) + 1).sum() - gammaln(pairs + 1).sum())

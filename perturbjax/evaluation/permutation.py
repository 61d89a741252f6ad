"""Could the score be luck? Labels dealt anew to whole wells, the predictions left as they are.

Under the null hypothesis any label could have stood in any well of its plate, so the wells' labels are exchanged within
plates (and within the fold that judged them, whose labels its own training never saw). Sites of a well keep together,
since they share what went wrong with it.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

from perturbjax.evaluation.baselines import BaselineUnavailable
from perturbjax.evaluation.scores import HEADLINE, METRICS, Counts

#: Fewer ways than this to deal the labels give no p below 0.01.
_LEAST_WAYS = 100


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
    """Share of the deals (the one that happened among them) in which the predictions score at least as well.

    Args:
        labels: true class of each site.
        probabilities: what was predicted of each site.
        wells: number of each site's well, from 0.
        blocks: number of what labels are exchanged within (plate and fold), one for all sites of a well.
        metric: one that is made of counts.
        permutations: deals beside the one that happened.
        seed: of the deals.

    Raises:
        Unavailable: sites of a well differ in label, or there are too few ways to deal the labels.
    """
    first = np.unique(wells, return_index=True)[1]
    of_well, block_of, classes = labels[first], blocks[first], probabilities.shape[1]
    if (of_well[wells] != labels).any():
        raise BaselineUnavailable(
            "the sites of one well have different labels, so wells cannot be exchanged"
        )
    ways = _log_ways(of_well, block_of)
    if ways < np.log(_LEAST_WAYS):
        raise BaselineUnavailable(
            f"there are {round(np.exp(ways))} ways to deal the labels to the wells of a plate: too few for a p-value"
        )
    predicted = np.zeros((len(first), classes))
    np.add.at(predicted, (wells, probabilities.argmax(axis=1)), 1)
    sites = predicted.sum(axis=1)
    rng = np.random.default_rng(seed)
    order = np.lexsort((np.arange(len(first)), block_of))  # wells of a block stand together
    scores = np.empty(permutations + 1)
    for row in range(permutations + 1):
        dealt = np.empty_like(of_well)
        # The wells of each block in their own, then in random order: within its block each label finds another well.
        shuffled = order if row == 0 else np.lexsort((rng.random(len(first)), block_of))
        dealt[order] = of_well[shuffled]
        truth = np.bincount(dealt, weights=sites, minlength=classes)
        hits = np.bincount(
            dealt, weights=predicted[np.arange(len(first)), dealt], minlength=classes
        )
        scores[row] = METRICS[metric].function(
            Counts(truth, predicted.sum(axis=0), hits, np.float64(0))
        )
    return float((scores >= scores[0] - 1e-12).mean())


def _log_ways(labels: Int[np.ndarray, " wells"], blocks: Int[np.ndarray, " wells"]) -> float:
    """Logarithm of the number of distinct ways to deal the labels within blocks."""
    pairs = np.unique(np.stack([blocks, labels]), axis=1, return_counts=True)[1]
    return float(gammaln(np.bincount(blocks) + 1).sum() - gammaln(pairs + 1).sum())

"""Prediction sets: classes that contain the true one with a given probability.

Idea. A score measures how badly a class fits a site. On calibration sites, which the network was
not trained on, the scores of the true classes have a 90 % quantile. The prediction set of a new
site contains all classes with a score up to this quantile (split conformal prediction).

Score. Classes are sorted by probability, and s(y) is the sum of all probabilities before y plus
u times that of y, with u uniform in [0, 1) (adaptive prediction sets: Romano et al. 2020, NeurIPS,
arXiv 2006.02544). u is derived from the name of the site, so that repeated predictions agree. The
most probable class is always in the set, which can only increase the coverage.

Groups. Sites of one well are dependent, so wells (or plates) are exchangeable and sites are not.
With K groups of n_k sites, each site has weight 1 / ((K + 1) n_k), and infinity has the weight
1 / (K + 1) of the new group. The weighted quantile then covers a site of a new group with at least
the given probability (hierarchical conformal prediction: Lee, Barber & Willett 2023,
arXiv 2306.06342).

Unlike images. A site is called unlike the training images if its distance to them exceeds the 95 %
quantile of the calibration sites. Its set is empty. The quantile of s counts such calibration sites
as not covered, so that the sets cover the true class in total.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from perturbjax.evaluation.bootstrap import Estimate

#: Probability with which a set contains the true class.
LEVEL = 0.9
#: Maximum fraction of ordinary sites that are called unlike the training images.
UNLIKE = 0.05
#: Minimum number of calibration groups for a finite quantile, and for detecting unlike images.
MIN_GROUPS = round(1 / (1 - LEVEL)) - 1
MIN_UNLIKE_GROUPS = round(1 / UNLIKE) - 1
#: Text of the empty set in tables.
NONE_OF_THEM = "none of the known treatments"
#: Text between the classes of a set in tables.
SEPARATOR = " | "
#: Significance level of the test whether plates differ.
_ALPHA = 0.01
_REPLICATES = 2000


class TooFewGroups(Exception):
    """There are too few calibration groups for prediction sets; the message gives the numbers."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Predictions of labeled sites with everything that prediction sets depend on.

    Attributes:
        probabilities: predicted probabilities.
        labels: true class of each site.
        uniform: number u of each site, see `site_uniform`.
        distance: distance to the training images; infinity is unlike, 0 if unknown.
        wells: well number of each site.
        plates: plate number of each site.
    """

    probabilities: Float[np.ndarray, "n classes"]
    labels: Int[np.ndarray, " n"]
    uniform: Float[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    wells: Int[np.ndarray, " n"]
    plates: Int[np.ndarray, " n"]

    def take(self, rows: Bool[np.ndarray, " n"]) -> Scored:
        """Select sites."""
        return Scored(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Thresholds of prediction sets.

    Attributes:
        threshold: maximum score of a class in the set.
        unlike_threshold: maximum distance of an ordinary site; infinity with few groups.
        groups: number of calibration groups.
        unit: "well" or "plate".
    """

    threshold: float
    unlike_threshold: float
    groups: int
    unit: Literal["well", "plate"]

    def sets(
        self,
        probabilities: Float[np.ndarray, "n classes"],
        uniform: Float[np.ndarray, " n"],
        distance: Float[np.ndarray, " n"],
    ) -> Bool[np.ndarray, "n classes"]:
        """Return whether each class is in the set of each site; unlike sites have an empty set.

        Args:
            probabilities: predicted probabilities.
            uniform: number u of each site, see `site_uniform`.
            distance: distance to the training images.
        """
        members = class_scores(probabilities, uniform) <= self.threshold
        members[np.arange(len(members)), probabilities.argmax(axis=1)] = True
        return members & (distance <= self.unlike_threshold)[:, None]

    def sets_of(self, sites: Scored) -> Bool[np.ndarray, "n classes"]:
        """Return the sets of scored sites."""
        return self.sets(sites.probabilities, sites.uniform, sites.distance)


@dataclasses.dataclass(frozen=True)
class SetSummary:
    """Measured coverage and size of prediction sets on test sites.

    Attributes:
        level: nominal coverage.
        coverage: fraction of test sites with the true class in their set, with its 95 % interval.
        size: mean number of classes in a set.
        classes: number of classes.
        unlike: fraction of sites with an empty set; None with too few groups to detect them.
        groups: number of calibration groups.
        unit: calibration groups, "well" or "plate".
        source: sites of the calibration, "validation" or "test" (cross-fitted).
        plate_p: p-value of equal scores on all plates; None with one plate or few wells.
    """

    level: float
    coverage: Estimate
    size: float
    classes: int
    unlike: float | None
    groups: int
    unit: str
    source: str
    plate_p: float | None


def site_uniform(site_ids: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Derive a number in [0, 1) from the name of each site; equal names give equal numbers."""
    digests = (hashlib.blake2b(str(one).encode(), digest_size=8).digest() for one in site_ids)
    # 53 bits are the precision of a float, so that the largest number is below 1.
    return np.array([int.from_bytes(digest, "big") >> 11 for digest in digests]) / 2.0**53


def class_scores(
    probabilities: Float[np.ndarray, "n classes"], uniform: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n classes"]:
    """Compute the score of every class: the probability before it, plus u times its probability."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=1).astype(float)
    before = np.cumsum(ranked, axis=1) - ranked
    scores = np.empty_like(ranked)
    np.put_along_axis(scores, order, before + uniform[:, None] * ranked, axis=1)
    return scores


def group_quantile(
    values: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"], level: float
) -> float:
    """Return the quantile that a value of a new group does not exceed with probability `level`.

    Args:
        values: value of each site.
        groups: group of each site; groups are exchangeable.
        level: probability in (0, 1).

    Returns:
        The weighted quantile; infinity with fewer than level / (1 - level) groups.
    """
    _, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(values, kind="stable")
    # Each group has the total weight 1 / (K + 1); the remaining weight belongs to infinity.
    cumulative = np.cumsum(1 / sizes[numbers.ravel()][order]) / (len(sizes) + 1)
    # The tolerance absorbs rounding in the sum of the weights.
    first = int(np.searchsorted(cumulative, level - 1e-9))
    return float(values[order[first]]) if first < len(values) else float("inf")


def calibrate(sites: Scored) -> Calibration:
    """Fit the thresholds of prediction sets to sites that the network was not trained on.

    Groups are plates if there are at least `MIN_GROUPS`, otherwise wells.

    Raises:
        TooFewGroups: there are fewer than `MIN_GROUPS` wells.
    """
    plates, wells = len(np.unique(sites.plates)), len(np.unique(sites.wells))
    by_plate = plates >= MIN_GROUPS
    if wells < MIN_GROUPS:
        raise TooFewGroups(
            f"sets of {LEVEL:.0%} coverage need {MIN_GROUPS} calibration wells, there are {wells}"
        )
    groups = sites.plates if by_plate else sites.wells
    unlike = group_quantile(sites.distance, groups, 1 - UNLIKE)
    # An unlike site has an empty set, which counts as not covered.
    scores = np.where(sites.distance > unlike, np.inf, true_scores(sites))
    threshold = group_quantile(scores, groups, LEVEL)
    return Calibration(threshold, unlike, plates if by_plate else wells, _unit(by_plate))


def _unit(by_plate: bool) -> Literal["well", "plate"]:
    return "plate" if by_plate else "well"


def true_scores(sites: Scored) -> Float[np.ndarray, " n"]:
    """Return the score of the true class of each site."""
    scores = class_scores(sites.probabilities, sites.uniform)
    return scores[np.arange(len(scores)), sites.labels]


def cross_fitted_sets(sites: Scored, parts: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n classes"]:
    """Compute the sets of each part with a calibration on all other parts.

    Raises:
        TooFewGroups: as `calibrate`, for the sites outside a part.
    """
    members = np.zeros(sites.probabilities.shape, dtype=bool)
    for part in np.unique(parts):
        inside = parts == part
        members[inside] = calibrate(sites.take(~inside)).sets_of(sites.take(inside))
    return members


def summarize(
    sites: Scored,
    members: Bool[np.ndarray, "n classes"],
    calibration: Calibration,
    source: str,
    plate_p: float | None,
    seed: int = 0,
) -> SetSummary:
    """Measure coverage and size of the sets of test sites.

    Args:
        sites: test sites.
        members: their sets.
        calibration: thresholds of the sets.
        source: sites of the calibration, "validation" or "test".
        plate_p: see `plate_difference`.
        seed: seed of the bootstrap over wells.
    """
    # Cross-fitted sets are calibrated on half of the groups.
    groups = calibration.groups // 2 if source == "test" else calibration.groups
    unlike = float((~members.any(axis=1)).mean()) if groups >= MIN_UNLIKE_GROUPS else None
    covered = members[np.arange(len(members)), sites.labels]
    wells = np.unique(sites.wells, return_inverse=True)[1].ravel()
    hits, sizes = np.bincount(wells, covered), np.bincount(wells)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(_REPLICATES, len(sizes)))
    low, high = np.quantile(hits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), (0.025, 0.975))
    return SetSummary(
        level=LEVEL,
        coverage=Estimate(float(covered.mean()), float(low), float(high)),
        size=float(members.sum(axis=1).mean()),
        classes=members.shape[1],
        unlike=unlike,
        groups=calibration.groups,
        unit=calibration.unit,
        source=source,
        plate_p=plate_p,
    )


def plate_difference(sites: Scored) -> float | None:
    """Test whether the scores of the true classes have the same distribution on all plates.

    Kruskal-Wallis test over the mean scores of wells (Kruskal & Wallis 1952, JASA 47, 583).

    Returns:
        The p-value; None without two plates of at least five wells, as the test requires.
    """
    # Imported here, because `predict` does not need it and its import takes most of a second.
    from scipy import stats

    _, first, numbers = np.unique(sites.wells, return_index=True, return_inverse=True)
    means = np.bincount(numbers.ravel(), true_scores(sites)) / np.bincount(numbers.ravel())
    plates = sites.plates[first]
    samples = [means[plates == plate] for plate in np.unique(plates)]
    samples = [sample for sample in samples if len(sample) >= 5]
    if len(samples) < 2 or np.ptp(np.concatenate(samples)) == 0:
        return None
    return float(stats.kruskal(*samples).pvalue)


def format_sets(members: Bool[np.ndarray, "n classes"], class_names: Sequence[str]) -> list[str]:
    """Write each set as text: the classes in their order, or `NONE_OF_THEM`."""
    names = np.asarray(class_names, dtype=object)
    return [SEPARATOR.join(names[row]) if row.any() else NONE_OF_THEM for row in members]


def describe_sets(summary: SetSummary) -> list[str]:
    """Describe coverage, size and unlike images, and the limits of the guarantee."""
    cover, kind = summary.coverage, "validation" if summary.source == "validation" else "test"
    sentences = [
        f"Prediction sets ({summary.level:.0%}): the true class is in the set of "
        f"{cover.value:.1%} [{cover.low:.1%}, {cover.high:.1%}] of the test sites; mean size "
        f"{summary.size:.2f} of {summary.classes} classes; calibrated on {summary.groups} {kind} "
        f"{summary.unit}s{', cross-fitted' if summary.source == 'test' else ''}."
    ]
    if summary.unlike is None:
        sentences.append("Too few groups to measure the fraction of unlike images.")
    else:
        sentences.append(
            f"Unlike the training images: {summary.unlike:.1%} of the test sites "
            f"({NONE_OF_THEM}; at most {UNLIKE:.0%} expected)."
        )
    if summary.plate_p is not None and summary.plate_p < _ALPHA:
        sentences.append(
            f"Plates are not exchangeable (Kruskal-Wallis p {_p(summary.plate_p)}), so the "
            "coverage of a further plate can differ."
        )
    elif summary.unit == "well":
        sentences.append(
            f"The coverage applies to further wells of such plates; {MIN_GROUPS} calibration "
            "plates are needed to state it for new plates."
        )
    if cover.high < summary.level:
        sentences.append(
            f"The coverage is below {summary.level:.0%}: the test sites differ from the "
            "calibration sites."
        )
    return sentences


def _p(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"

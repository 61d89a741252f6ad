"""Similar treatments: cosine similarity of consensus profiles, calibrated against chance.

A consensus profile is the mean over plates of the well profiles relative to the controls of the
plate. Two treatments whose wells share a plate, a plate position or a plate layout look alike for
technical reasons; `restriction` leaves such wells out of the comparison. The p-value of a pair
compares its similarity with that of consensus profiles of random control wells of the same
design (as many wells per treatment, from the same plates), so that treatments without an effect
have no neighbors.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import false_discovery_control, hypergeom

from perturbjax.core.plates import PLATE, WELL, plate_layouts
from perturbjax.screening.wells import Wells, reduce_profiles

#: What two compared wells may not share.
RESTRICTIONS = ("none", "plate", "position", "layout")
#: Random pairs of control profiles behind the p-values, and how many are drawn together. The many
#: pairs of a screen need small p-values.
DRAWS, CHUNK = 20_000, 1000
#: Neighbors per treatment whose mechanisms are tested for enrichment.
NEIGHBORS = 5


def relative_to_controls(wells: Wells) -> Float[np.ndarray, "n k"]:
    """Profiles minus the mean of the negative controls of their plate.

    A plate without controls is centered on the mean of all its wells.

    Args:
        wells: profiles of a screen.
    """
    values, plates = reduce_profiles(wells.values, wells.plates), wells.plates
    centered = np.empty_like(values)
    for plate in np.unique(plates):
        rows = plates == plate
        reference = rows & wells.control
        centered[rows] = values[rows] - values[reference if reference.any() else rows].mean(axis=0)
    return centered


def similarity_matrix(wells: Wells, restriction: str = "none") -> pd.DataFrame:
    """Cosine similarity between the treatments of a screen.

    Args:
        wells: profiles of a screen.
        restriction: "none" compares consensus profiles over all wells. "plate", "position" and
            "layout" average the cosine over pairs of wells that do not share this.

    Returns:
        A square table with treatments as index and columns, 1 on the diagonal; NaN where no pair
        of wells is allowed.
    """
    values = relative_to_controls(wells)
    treated = ~wells.control
    names, groups = np.unique(wells.treatment[treated], return_inverse=True)
    if restriction == "none":
        consensus = _consensus(values[treated], groups, wells.plates[treated])
        matrix = _unit(consensus) @ _unit(consensus).T
    else:
        matrix = _mean_pair_cosine(values[treated], groups, _shared(wells, restriction)[treated])
    np.fill_diagonal(matrix, 1.0)
    return pd.DataFrame(matrix, index=names, columns=names)


def _consensus(values: np.ndarray, groups: np.ndarray, plates: np.ndarray) -> np.ndarray:
    """Mean over plates of the plate means, so that a plate with many wells does not dominate."""
    means = pd.DataFrame(values).groupby([groups, plates]).mean()
    return means.groupby(level=0).mean().to_numpy()


def _unit(values: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(length > 0, length, 1)


def _shared(wells: Wells, restriction: str) -> Int[np.ndarray, " n"]:
    """Number of the plate, position or layout of each well."""
    if restriction == "position":
        return pd.factorize(wells.metadata[WELL])[0]
    if restriction == "layout":
        # `plate_layouts` needs a column that identifies compounds.
        index = wells.metadata[[PLATE, WELL]].assign(Metadata_pert_iname=wells.treatment.to_numpy())
        return pd.factorize(wells.metadata[PLATE].astype(str).map(plate_layouts(index)))[0]
    return wells.plates


def _mean_pair_cosine(values: np.ndarray, groups: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Mean cosine over the pairs of wells of two groups that do not share a number.

    The sum over all pairs of two groups is a product of sums; pairs that share a number are
    summed number by number and subtracted.
    """
    unit, count = _unit(values), groups.max() + 1
    total, pairs = _group_sums(unit, groups, count)
    cosine, number = total @ total.T, np.outer(pairs, pairs)
    for value in np.unique(shared):
        rows = shared == value
        sums, size = _group_sums(unit[rows], groups[rows], count)
        # Pairs within a value are not allowed: remove their sum and their number.
        cosine -= sums @ sums.T
        number -= np.outer(size, size)
    return np.where(number > 0, cosine / np.maximum(number, 1), np.nan)


def _group_sums(unit: np.ndarray, groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    sums = np.zeros((count, unit.shape[1]))
    np.add.at(sums, groups, unit)
    return sums, np.bincount(groups, minlength=count).astype(float)


def neighbor_table(
    wells: Wells, *, restriction: str = "none", top: int = NEIGHBORS, seed: int = 0
) -> pd.DataFrame:
    """The most similar treatments of every treatment.

    Args:
        wells: profiles of a screen.
        restriction: see `similarity_matrix`.
        top: neighbors per treatment.
        seed: of the random control profiles.

    Returns:
        One row per treatment and neighbor, nearest first: `treatment`, `neighbor`, `rank`,
        `similarity`, `p` (fraction of pairs of random control profiles at least as similar) and
        `q` (Benjamini-Hochberg over all pairs of the screen).
    """
    matrix = similarity_matrix(wells, restriction)
    null = _null_similarities(wells, seed, pairs=restriction != "none")
    values = matrix.to_numpy()
    p = np.full(values.shape, np.nan)
    present = np.isfinite(values)
    # `null` is sorted, so this is the number of random pairs that are at least as similar.
    above = len(null) - np.searchsorted(null, values[present], side="left")
    p[present] = (1 + above) / (1 + len(null)) if len(null) else np.nan
    q = np.full(values.shape, np.nan)
    # The matrix is symmetric, and each pair counts once in the correction.
    upper = np.triu(np.isfinite(p), 1)
    if upper.any():
        q[upper] = false_discovery_control(p[upper])
        # Copy the upper triangle to the lower one.
        q = np.where(np.isnan(q), q.T, q)
    rows = []
    for number, name in enumerate(matrix.index):
        order = np.argsort(-np.where(present[number], values[number], -np.inf), kind="stable")
        allowed = [other for other in order if other != number and present[number, other]]
        for rank, other in enumerate(allowed[:top], start=1):
            rows.append(
                (
                    name,
                    matrix.index[other],
                    rank,
                    values[number, other],
                    p[number, other],
                    q[number, other],
                )
            )
    return pd.DataFrame(rows, columns=["treatment", "neighbor", "rank", "similarity", "p", "q"])


def _null_similarities(wells: Wells, seed: int, *, pairs: bool) -> Float[np.ndarray, " draws"]:
    """Sorted similarities of two disjoint random sets of control wells.

    Each set has as many wells as the median treatment, at most half of the controls. With `pairs`
    the similarity is the mean cosine over pairs of wells, as for restricted comparisons.
    """
    rng = np.random.default_rng(seed)
    values = relative_to_controls(wells)[wells.control]
    if len(values) < 2:
        return np.zeros(0)
    # The product of two means of unit vectors is the mean cosine over pairs of wells.
    values = _unit(values) if pairs else values
    size = int(wells.treatment[~wells.control].value_counts().median())
    size = max(1, min(size, len(values) // 2))
    similarities = []
    for _ in range(DRAWS // CHUNK):
        # Random subset of 2 * size controls for each draw, then a random division into two halves,
        # since argpartition does not return a random order.
        rows = rng.random((CHUNK, len(values))).argpartition(2 * size - 1, axis=1)[:, : 2 * size]
        rows = rng.permuted(rows, axis=1)
        # Mean profiles of the two halves, (CHUNK, features).
        a, b = values[rows[:, :size]].mean(axis=1), values[rows[:, size:]].mean(axis=1)
        cosine = (a * b).sum(axis=1)
        if not pairs:
            lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosine /= np.maximum(lengths, 1e-12)
        similarities.append(cosine)
    return np.sort(np.concatenate(similarities))


def cluster_order(matrix: pd.DataFrame) -> list[str]:
    """Treatments in the order of the leaves of an average-linkage dendrogram.

    Args:
        matrix: from `similarity_matrix`.
    """
    if len(matrix) < 3:
        return list(matrix.index)
    distance = 1 - matrix.fillna(0).to_numpy()
    # Rounding can leave slightly negative or asymmetric distances.
    distance = np.clip((distance + distance.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    leaves = leaves_list(linkage(squareform(distance, checks=False), "average"))
    return [matrix.index[leaf] for leaf in leaves]


def mechanism_enrichment(neighbors: pd.DataFrame, mechanism: dict[str, str]) -> pd.DataFrame:
    """Test whether the neighbors of a treatment share a mechanism more often than by chance.

    Args:
        neighbors: from `neighbor_table`.
        mechanism: mechanism of each treatment; treatments without one do not count.

    Returns:
        One row per treatment and mechanism found among its neighbors: `treatment`, `mechanism`,
        `own` (it is the treatment's own mechanism), `neighbors` (number with it), `p`
        (hypergeometric) and `q` (Benjamini-Hochberg).
    """
    counts = pd.Series(mechanism).value_counts()
    rows = []
    for name, group in neighbors.groupby("treatment", sort=True):
        labels = [mechanism[n] for n in group["neighbor"] if n in mechanism]
        own = mechanism.get(str(name))
        for label, hits in pd.Series(labels, dtype=object).value_counts().items():
            # A treatment cannot be a neighbor of the same treatment.
            others = len(mechanism) - (own is not None)
            members = int(counts[label]) - (own == label)
            # P(at least `hits` neighbors with this mechanism) if neighbors were drawn at random.
            p = float(hypergeom.sf(hits - 1, others, members, len(labels)))
            rows.append((name, label, own == label, int(hits), p))
    table = pd.DataFrame(rows, columns=["treatment", "mechanism", "own", "neighbors", "p"])
    table["q"] = false_discovery_control(table["p"]) if len(table) else math.nan
    return table

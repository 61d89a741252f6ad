"""Similar treatments: cosine similarity of consensus profiles, calibrated against chance.

A consensus profile is the mean over plates of the well profiles relative to the controls of the
plate. Two treatments whose wells share a plate, a plate position or a plate layout look alike for
technical reasons; `restriction` leaves such wells out of the comparison. With doses, treatments are
compared with other compounds only. The p-value of a pair compares its similarity with that of
consensus profiles of random control wells of the same design (as many wells per treatment, from the
same plates), so that treatments without an effect have no neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import false_discovery_control, hypergeom

from perturbjax.core.plates import PLATE, WELL, plate_layouts
from perturbjax.profiles.profile_table import METADATA
from perturbjax.screening.wells import Wells, metadata_column, reduce_profiles

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


def similarity_matrix(
    wells: Wells, restriction: str = "none", reference: Bool[np.ndarray, " n"] | None = None
) -> pd.DataFrame:
    """Cosine similarity between the treatments of a screen.

    Args:
        wells: profiles of a screen.
        restriction: "none" compares consensus profiles over all wells. "plate", "position",
            "layout" or a metadata column average the cosine over pairs of wells that do not share
            it.
        reference: wells of a reference table, which are the columns of the matrix.

    Returns:
        A table with treatments as index and columns; NaN where no pair of wells is allowed, or the
        compound is the same. Without a reference it is square, with 1 on the diagonal.
    """
    values, treated = relative_to_controls(wells), ~wells.control
    own = np.zeros(len(values), dtype=bool) if reference is None else reference
    # Treatments of the reference are groups of their own, even if the names are the same.
    keys = pd.DataFrame({"reference": own, "treatment": wells.treatment.to_numpy()})[treated]
    groups = keys.groupby(["reference", "treatment"], sort=True).ngroup().to_numpy()
    first = np.unique(groups, return_index=True)[1]
    names, in_reference = keys["treatment"].to_numpy()[first], keys["reference"].to_numpy()[first]
    if restriction == "none":
        consensus = _consensus(values[treated], groups, wells.plates[treated])
        matrix = _unit(consensus) @ _unit(consensus).T
    else:
        matrix = _mean_pair_cosine(values[treated], groups, _shared(wells, restriction)[treated])
    if reference is not None:
        rows, columns = ~in_reference, in_reference
        return pd.DataFrame(
            matrix[np.ix_(rows, columns)], index=names[rows], columns=names[columns]
        )
    compound = wells.compounds.to_numpy()[treated][first]
    matrix[compound[:, None] == compound] = np.nan
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
    """Number of the plate, position, layout or value of a column of each well."""
    if restriction.startswith(METADATA):
        return pd.factorize(metadata_column(wells.metadata, restriction, "restriction"))[0]
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
    wells: Wells,
    *,
    restriction: str = "none",
    top: int = NEIGHBORS,
    seed: int = 0,
    reference: Bool[np.ndarray, " n"] | None = None,
) -> pd.DataFrame:
    """The most similar treatments of every treatment.

    Args:
        wells: profiles of a screen.
        restriction: see `similarity_matrix`.
        top: neighbors per treatment.
        seed: of the random control profiles.
        reference: wells of a reference table; neighbors then come only from it.

    Returns:
        One row per treatment and neighbor, nearest first: `treatment`, `neighbor`, `rank`,
        `similarity`, `p` (fraction of pairs of random control profiles at least as similar) and
        `q` (Benjamini-Hochberg over all pairs of the screen).
    """
    matrix = similarity_matrix(wells, restriction, reference)
    null = _null_similarities(wells, seed, pairs=restriction != "none", reference=reference)
    values = matrix.to_numpy()
    p = np.full(values.shape, np.nan)
    present = np.isfinite(values)
    # `null` is sorted, so this is the number of random pairs that are at least as similar.
    above = len(null) - np.searchsorted(null, values[present], side="left")
    p[present] = (1 + above) / (1 + len(null)) if len(null) else np.nan
    q = np.full(values.shape, np.nan)
    # Without a reference the matrix is symmetric, and each pair counts once in the correction.
    counted = np.isfinite(p) if reference is not None else np.triu(np.isfinite(p), 1)
    if counted.any():
        q[counted] = false_discovery_control(p[counted])
        if reference is None:
            # Copy the upper triangle to the lower one.
            q = np.where(np.isnan(q), q.T, q)
    rows = []
    for number, name in enumerate(matrix.index):
        order = np.argsort(-np.where(present[number], values[number], -np.inf), kind="stable")
        allowed = [
            other
            for other in order
            if present[number, other] and (reference is not None or other != number)
        ]
        for rank, other in enumerate(allowed[:top], start=1):
            rows.append(
                (name, matrix.columns[other], rank, values[number, other], p[number, other],
                 q[number, other])
            )  # fmt: skip
    return pd.DataFrame(rows, columns=["treatment", "neighbor", "rank", "similarity", "p", "q"])


def _null_similarities(
    wells: Wells, seed: int, *, pairs: bool, reference: np.ndarray | None = None
) -> Float[np.ndarray, " draws"]:
    """Sorted similarities of two disjoint random sets of control wells.

    Each set has as many wells as the median treatment, at most half of the controls. With `pairs`
    the similarity is the mean cosine over pairs of wells, as for restricted comparisons. With a
    reference, one set is from the screen and the other from the reference.
    """
    rng = np.random.default_rng(seed)
    values = relative_to_controls(wells)[wells.control]
    if len(values) < 2:
        return np.zeros(0)
    # The product of two means of unit vectors is the mean cosine over pairs of wells.
    values = _unit(values) if pairs else values
    size = int(wells.treatment[~wells.control].value_counts().median())
    size = max(1, min(size, len(values) // 2))
    own = np.zeros(len(values), dtype=bool) if reference is None else reference[wells.control]
    similarities = []
    for _ in range(DRAWS // CHUNK):
        if reference is not None:
            a, b = (_random_means(values[rows], size, rng) for rows in (~own, own))
            similarities.append(_row_cosine(a, b, unit=not pairs))
            continue
        # Random subset of 2 * size controls for each draw, then a random division into two halves,
        # since argpartition does not return a random order.
        rows = rng.random((CHUNK, len(values))).argpartition(2 * size - 1, axis=1)[:, : 2 * size]
        rows = rng.permuted(rows, axis=1)
        # Mean profiles of the two halves, (CHUNK, features).
        a, b = values[rows[:, :size]].mean(axis=1), values[rows[:, size:]].mean(axis=1)
        similarities.append(_row_cosine(a, b, unit=not pairs))
    return np.sort(np.concatenate(similarities))


def _random_means(values: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Mean profiles of CHUNK random sets of `size` rows, or of all rows if there are fewer."""
    size = min(size, len(values))
    rows = rng.random((CHUNK, len(values))).argpartition(size - 1, axis=1)[:, :size]
    return values[rows].mean(axis=1)


def _row_cosine(a: np.ndarray, b: np.ndarray, *, unit: bool) -> np.ndarray:
    """Products of the rows of two tables; with `unit` divided by their lengths."""
    product = (a * b).sum(axis=1)
    if not unit:
        return product
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return product / np.maximum(lengths, 1e-12)


def cluster_tree(
    matrix: pd.DataFrame,
) -> tuple[Float[np.ndarray, "merges 4"] | None, list[str]]:
    """Cluster the treatments by average linkage.

    Args:
        matrix: from `similarity_matrix`.

    Returns:
        SciPy linkage of the rows in the returned order, or None for fewer than 3 treatments; and
        the treatments in the order of the leaves of the dendrogram.
    """
    if len(matrix) < 3:
        return None, list(matrix.index)
    distance = 1 - matrix.fillna(0).to_numpy()
    # Rounding can leave slightly negative or asymmetric distances.
    distance = np.clip((distance + distance.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    leaves = leaves_list(tree)
    # Number the leaves by their position in the order, so that the tree belongs to sorted rows.
    position = np.concatenate([np.argsort(leaves), np.arange(len(leaves), 2 * len(leaves))])
    tree[:, :2] = position[tree[:, :2].astype(int)]
    return tree, [matrix.index[leaf] for leaf in leaves]


def match_mechanisms(
    matrix: pd.DataFrame, mechanism: dict[str, str], *, has_reference: bool = False
) -> tuple[int, float, float]:
    """Compare the mechanism of every treatment with that of its nearest neighbor.

    Args:
        matrix: from `similarity_matrix`.
        mechanism: mechanism of each treatment; treatments without one do not count.
        has_reference: the columns are treatments of a reference table.

    Returns:
        Number of treatments that have a possible match, the fraction of them whose nearest neighbor
        has their mechanism, and the fraction expected for a random neighbor.
    """
    labels = np.array([mechanism.get(name, "") for name in matrix.columns])
    matched, chance = [], []
    for number, name in enumerate(matrix.index):
        values = np.where(labels != "", matrix.iloc[number].to_numpy(dtype=float), np.nan)
        if not has_reference:
            values[number] = np.nan
        same = labels == mechanism.get(name, "")
        candidates = np.isfinite(values)
        if name in mechanism and (same & candidates).any():
            matched.append(same[np.nanargmax(values)])
            chance.append(same[candidates].mean())
    if not matched:
        return 0, math.nan, math.nan
    return len(matched), float(np.mean(matched)), float(np.mean(chance))


def mechanism_scores(
    wells: Wells, mechanism: dict[str, str], batch_column: str = ""
) -> dict[str, tuple[int, float, float]]:
    """Compute NSC and NSCB: does the nearest neighbor have the same mechanism?

    NSC (not same compound) compares the consensus profile of a treatment with those of other
    compounds. NSCB (not same compound or batch) compares it with other compounds that share no
    batch with the treatment. Treatments without a possible match do not count.

    Args:
        wells: profiles of a screen.
        mechanism: mechanism of each treatment; treatments without one do not count.
        batch_column: metadata column with the batch; without it there is no NSCB.

    Returns:
        Measure -> result of `match_mechanisms`.

    Source: NSC: Ljosa et al. 2013, J Biomol Screen 18, 1321. NSCB: Ando et al. 2017, bioRxiv
    161422.
    """
    matrix = similarity_matrix(wells)
    scores = {"NSC": match_mechanisms(matrix, mechanism)}
    if batch_column:
        batches = metadata_column(wells.metadata, batch_column, "restriction").to_numpy()
        # Number of wells of each treatment in each batch.
        counts = pd.crosstab(wells.treatment.to_numpy(), batches).loc[matrix.index].to_numpy()
        scores["NSCB"] = match_mechanisms(matrix.mask(counts @ counts.T > 0), mechanism)
    return scores


def mechanism_enrichment(
    neighbors: pd.DataFrame, mechanism: dict[str, str], candidates: Sequence[str] | None = None
) -> pd.DataFrame:
    """Test whether the neighbors of a treatment share a mechanism more often than by chance.

    Args:
        neighbors: from `neighbor_table`.
        mechanism: mechanism of each treatment; treatments without one do not count.
        candidates: treatments that can be neighbors; by default those of `mechanism`.

    Returns:
        One row per treatment and mechanism found among its neighbors: `treatment`, `mechanism`,
        `own` (it is the treatment's own mechanism), `neighbors` (number with it), `p`
        (hypergeometric) and `q` (Benjamini-Hochberg).
    """
    names = set(mechanism if candidates is None else candidates) & set(mechanism)
    counts = pd.Series({name: mechanism[name] for name in names}, dtype=object).value_counts()
    rows = []
    for name, group in neighbors.groupby("treatment", sort=True):
        labels = [mechanism[n] for n in group["neighbor"] if n in mechanism]
        own = mechanism.get(str(name))
        for label, hits in pd.Series(labels, dtype=object).value_counts().items():
            # A treatment cannot be a neighbor of the same treatment.
            others = len(names) - (name in names)
            members = int(counts[label]) - (own == label and name in names)
            # P(at least `hits` neighbors with this mechanism) if neighbors were drawn at random.
            p = float(hypergeom.sf(hits - 1, others, members, len(labels)))
            rows.append((name, label, own == label, int(hits), p))
    table = pd.DataFrame(rows, columns=["treatment", "mechanism", "own", "neighbors", "p"])
    table["q"] = false_discovery_control(table["p"]) if len(table) else math.nan
    return table

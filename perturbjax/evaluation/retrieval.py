"""Retrieval scores of features without a classifier: replicates and shared mechanisms.

Replicates. For each well (query), all other wells are ranked by cosine similarity. The average
precision (AP) is high if the wells of the same perturbation rank before the negative controls of
the plate (phenotypic activity) or before other perturbations (distinctness). The mean over the
wells of a perturbation is its mAP (Kalinin et al. 2025, Nature Communications 16, 5181; package
copairs).

Null distribution. AP of random rankings depends on the numbers of positives and negatives. It is
simulated: positions of the positives are drawn without replacement, 10,000 rankings for each pair
of numbers. Queries with equal numbers share these rankings, as in copairs, because replicates
retrieve each other and their APs are not independent. p is the fraction of null mAPs that reach the
observed one, with 1 added to both counts; q is its Benjamini-Hochberg correction.

Mechanisms. NSC and NSCB: does the most similar well of another compound (and batch) have the same
mechanism? (Ljosa et al. 2013, J Biomol Screen 18, 1321; Ando et al. 2017, bioRxiv 161422.)

`RESTRICTIONS` excludes wells that share plate, position or layout with the query (MorphoHELM,
arXiv 2605.15383). Queries are compared in blocks, so that memory is linear in the number of wells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from perturbjax.core.errors import InputError
from perturbjax.core.files import write_csv
from perturbjax.core.plates import COMPOUND, plate_layouts
from perturbjax.dataset import PLATE, WELL
from perturbjax.evaluation.negative_controls import negative_controls
from perturbjax.evaluation.ranking import (
    TOP,
    average_precision,
    random_precision,
    recall_at_top,
    similarity_blocks,
)

MOA = "Metadata_moa"
#: Property that a query and the retrieved wells must not share, by name of the restriction.
RESTRICTIONS = {
    "NR": "no restriction",
    "NSB": "not from the same plate",
    "NSS": "not from the same plate position",
    "NSL": "not from a plate of the same layout",
}
#: Minimum number of distinct rankings; fewer cannot give p < 0.01.
_MIN_RANKINGS = 100
#: (rows) -> (positives, negatives) of a block of queries.
Pairs = Callable[[Int[np.ndarray, " q"]], tuple[Bool[np.ndarray, "q n"], Bool[np.ndarray, "q n"]]]


def replicate_retrieval(
    features: Float[np.ndarray, "n d"],
    metadata: pd.DataFrame,
    is_control: Bool[np.ndarray, " n"],
    *,
    label_column: str = COMPOUND,
    against: str = "controls",
    restriction: str = "NR",
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the mean average precision with which the wells of each perturbation are retrieved.

    Args:
        features: one row per well.
        metadata: `Metadata_Plate` and `label_column` of each row; `Metadata_Well` and a compound
            column if `restriction` requires them.
        is_control: negative controls.
        label_column: column that defines replicates.
        against: "controls" ranks replicates against the negative controls of the query's plate,
            "others" against the wells of all other perturbations.
        restriction: name in `RESTRICTIONS`; applies to positives and other perturbations, not to
            the controls.
        draws: random rankings for each p-value.
        seed: seed of the random numbers.

    Returns:
        One row per perturbation with at least two wells: `label`, `wells` (number of queries),
        `map`, `recall` (among the nearest 1 %), `chance` (mean AP of random rankings), `p` (NaN
        with too few rankings) and `q` (Benjamini-Hochberg).

    Raises:
        InputError: the restriction needs layouts and there is no compound column.
    """
    from scipy.stats import false_discovery_control

    labels = pd.factorize(metadata[label_column].astype(str))[0]
    plates = pd.factorize(metadata[PLATE].astype(str))[0]
    groups, treated = _restricted_groups(metadata, restriction), ~is_control

    def pairs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Boolean arrays (queries, wells). Controls are neither queries nor positives.
        same = (labels[rows, None] == labels) & treated[rows, None] & treated
        allowed = groups[rows, None] != groups
        positives = same & allowed
        # A query must not retrieve the query well.
        positives[np.arange(len(rows)), rows] = False
        if against == "controls":
            return positives, (plates[rows, None] == plates) & is_control & treated[rows, None]
        return positives, ~same & treated & treated[rows, None] & allowed

    queries = _queries(features, pairs).assign(label=metadata[label_column].astype(str).to_numpy())
    # Rows without positives or without negatives are not queries.
    queries = queries[queries["ap"].notna()]
    rng = np.random.default_rng(seed)
    # One simulation for each pair of numbers, used by all queries with these numbers.
    nulls = {
        size: random_precision(*size, draws, rng)
        for size in sorted(set(zip(queries["p"], queries["n"], strict=True)))
    }
    rows = [
        _perturbation(str(label), group, nulls)
        for label, group in queries.groupby("label", sort=True)
    ]
    table = pd.DataFrame(rows, columns=["label", "wells", "map", "recall", "chance", "p"])
    tested = table["p"].notna()
    table.loc[tested, "q"] = false_discovery_control(table.loc[tested, "p"]) if tested.any() else []
    return table


def _queries(features: Float[np.ndarray, "n d"], pairs: Pairs) -> pd.DataFrame:
    """Compute average precision, recall and the numbers of positives and negatives of each row."""
    parts = []
    for rows, similarity in similarity_blocks(features):
        positives, negatives = pairs(rows)
        columns = {
            "ap": average_precision(similarity, positives, negatives),
            "recall": recall_at_top(similarity, positives, negatives),
            "p": positives.sum(axis=1),
            "n": negatives.sum(axis=1),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _restricted_groups(metadata: pd.DataFrame, restriction: str) -> Int[np.ndarray, " n"]:
    """Number the groups within which nothing may be retrieved.

    Raises:
        InputError: layouts are needed and there is no compound column.
    """
    plates = metadata[PLATE].astype(str)
    if restriction == "NSB":
        return pd.factorize(plates)[0]
    if restriction == "NSS":
        return pd.factorize(metadata[WELL].astype(str))[0]
    if restriction == "NSL":
        return pd.factorize(plates.map(plate_layouts(metadata)))[0]
    return np.arange(len(metadata))


def _perturbation(
    label: str, queries: pd.DataFrame, nulls: dict[tuple[int, int], np.ndarray]
) -> dict[str, object]:
    """Compare the mAP of one perturbation with random rankings."""
    # Average draw by draw over the queries, as mAP averages AP: shape (draws,).
    null = np.mean([nulls[size] for size in zip(queries["p"], queries["n"], strict=True)], axis=0)
    value = queries["ap"].mean()
    p = (1 + (null >= value).sum()) / (1 + len(null))
    return {
        "label": label,
        "wells": len(queries),
        "map": value,
        "recall": queries["recall"].mean(),
        "chance": null.mean(),
        "p": p if _count_rankings(queries) >= _MIN_RANKINGS else np.nan,
    }


def _count_rankings(queries: pd.DataFrame) -> float:
    """Count the possible rankings of positives and negatives, for the query with most."""
    from scipy.special import gammaln

    p, n = queries["p"], queries["n"]
    return float(
        # Binomial coefficient (p + n over p), limited to avoid an overflow of exp.
        np.exp(np.minimum(gammaln(p + n + 1) - gammaln(p + 1) - gammaln(n + 1), 100).max())
    )


def match_mechanisms(
    features: Float[np.ndarray, "n d"],
    compounds: Shaped[np.ndarray, " n"],
    mechanisms: Shaped[np.ndarray, " n"],
    batches: Shaped[np.ndarray, " n"] | None = None,
) -> dict[str, float]:
    """Compute the accuracy of 1-nearest-neighbor mechanism matching (cosine, other compounds).

    NSC (not same compound), or NSCB with `batches` (not same compound or batch). The convention
    of BBBC021 is one median profile per compound and concentration, without controls. Rows whose
    mechanism does not occur among the allowed rows are not counted.

    Returns:
        `accuracy`, `chance` (accuracy of a random allowed row) and `rows` (number counted).
    """
    nearest = nearest_mechanisms(features, compounds, mechanisms, batches)
    counted = nearest[nearest["chance"] > 0]
    if counted.empty:
        return {"accuracy": float("nan"), "chance": float("nan"), "rows": 0}
    return {
        "accuracy": float(counted["right"].mean()),
        "chance": float(counted["chance"].mean()),
        "rows": len(counted),
    }


def nearest_mechanisms(
    features: Float[np.ndarray, "n d"],
    compounds: Shaped[np.ndarray, " n"],
    mechanisms: Shaped[np.ndarray, " n"],
    batches: Shaped[np.ndarray, " n"] | None = None,
) -> pd.DataFrame:
    """Find the nearest allowed row of each row; arguments as in `match_mechanisms`.

    Returns:
        `nearest` (row number), `right` (whether it has the same mechanism) and `chance` (fraction
        of allowed rows with that mechanism; 0 if the row cannot be matched).
    """
    compound, mechanism = pd.factorize(compounds)[0], pd.factorize(mechanisms)[0]
    batch = None if batches is None else pd.factorize(batches)[0]
    parts = []
    for rows, similarity in similarity_blocks(features):
        allowed = compound[rows, None] != compound
        if batch is not None:
            allowed &= batch[rows, None] != batch
        # Without any allowed row, argmax returns 0. Such rows have chance 0 and are not counted.
        nearest = np.where(allowed, similarity, -np.inf).argmax(axis=1)
        same = (allowed & (mechanism[rows, None] == mechanism)).sum(axis=1)
        chance = same / np.maximum(allowed.sum(axis=1), 1)
        right = mechanism[nearest] == mechanism[rows]
        parts.append(pd.DataFrame({"nearest": nearest, "right": right, "chance": chance}))
    return pd.concat(parts, ignore_index=True)


def well_profiles(table: pd.DataFrame) -> tuple[pd.DataFrame, Float[np.ndarray, "wells d"]]:
    """Average the features of each (plate, well), and standardize each feature over the wells.

    Args:
        table: `Metadata_*` columns and numeric feature columns; one row per site or well.

    Raises:
        InputError: there is no plate, well or feature column, or a feature is not finite.
    """
    metadata_columns = [column for column in table.columns if column.startswith("Metadata_")]
    names = [
        column
        for column in table.columns.drop(metadata_columns)
        if pd.api.types.is_numeric_dtype(table[column])
    ]
    for column in (PLATE, WELL):
        if column not in table.columns:
            raise InputError(f"features: no column {column}; it is needed to group sites by well")
    if not names:
        raise InputError("features: no numeric column except Metadata_*")
    if not np.isfinite(values := table[names].to_numpy(dtype=np.float64)).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"features: row {row}, column {names[column]!r} is not finite; drop it or extract again"
        )
    groups = table.groupby([PLATE, WELL], sort=False)
    features = groups[names].mean().to_numpy()
    # With sort=False, groups are in order of first occurrence, which is also the order of head(1).
    metadata = groups[metadata_columns].head(1).reset_index(drop=True)
    deviation = features.std(axis=0)
    # A constant feature cannot be standardized and is dropped.
    varying = deviation > 0
    return metadata, (features[:, varying] - features.mean(axis=0)[varying]) / deviation[varying]


def evaluate_retrieval(
    table: pd.DataFrame, out: Path, *, label_column: str = COMPOUND, seed: int = 0
) -> pd.DataFrame:
    """Compute all retrieval scores; write `retrieval.csv` and `retrieval_per_class.csv`.

    Args:
        table: as in `well_profiles`; test sites only if the features were trained.
        out: folder.
        label_column: column that defines replicates.
        seed: seed of the random rankings.

    Returns:
        Content of `retrieval.csv`: `measure`, `value`, `chance`, `n`. Measures without the
        necessary controls, replicates or mechanisms are absent.

    Raises:
        InputError: as `well_profiles`, or `label_column` is missing.
    """
    # Retrieval compares wells: sites of one well would retrieve each other.
    metadata, features = well_profiles(table)
    if label_column not in metadata.columns:
        raise InputError(
            f"features: no column {label_column}; choose the column that defines replicates"
        )
    controls = negative_controls(metadata, label_column)
    summary: list[tuple[str, float, float | None, str]] = []
    perturbations = []
    # Restrictions apply to the comparison with other perturbations only.
    for against, restriction in (("controls", "NR"), *(("others", name) for name in RESTRICTIONS)):
        try:
            scores = replicate_retrieval(
                features,
                metadata,
                controls,
                label_column=label_column,
                against=against,
                restriction=restriction,
                seed=seed,
            )
        except InputError:  # without a compound column, layouts are unknown
            continue
        if len(scores):
            perturbations.append(scores.assign(against=against, restriction=restriction))
            summary += _replicate_rows(scores, against, restriction)
    if {MOA, COMPOUND} <= set(metadata.columns):
        summary += _mechanism_rows(features, metadata, controls)
    result = pd.DataFrame(summary, columns=["measure", "value", "chance", "n"]).astype(
        {"value": float, "chance": float}
    )
    write_csv(Path(out) / "retrieval.csv", result)
    if perturbations:
        write_csv(Path(out) / "retrieval_per_class.csv", pd.concat(perturbations))
    return result


def _replicate_rows(
    scores: pd.DataFrame, against: str, restriction: str
) -> Iterator[tuple[str, float, float | None, str]]:
    n = f"{len(scores)} perturbations, {scores['wells'].sum()} wells"
    setting = f"against {against}" + ("" if restriction == "NR" else f", {restriction}")
    yield f"replicates, mAP {setting}", scores["map"].mean(), scores["chance"].mean(), n
    if against == "others":
        yield f"replicates, recall at 1 % {setting}", scores["recall"].mean(), TOP, n
    tested = scores["q"].notna()
    measure = f"fraction retrieved {setting} (q < 0.05)"
    if not tested.any():
        yield f"{measure}: too few replicates for a p-value", float("nan"), None, n
        return
    untested = (~tested).sum()
    few = f"; {untested} more have too few replicates for a p-value" if untested else ""
    fraction = (scores.loc[tested, "q"] < 0.05).mean()
    yield measure, fraction, None, f"{tested.sum()} perturbations{few}"


def _mechanism_rows(
    features: np.ndarray, metadata: pd.DataFrame, controls: np.ndarray
) -> list[tuple[str, float, float, str]]:
    annotated = metadata[MOA].notna() & (metadata[MOA].astype(str) != "")
    # Controls have no mechanism to predict.
    keep = ~controls & annotated.to_numpy()
    compounds, mechanisms, plates = (
        metadata[column].astype(str).to_numpy()[keep] for column in (COMPOUND, MOA, PLATE)
    )
    rows = []
    # The table has no column of batches, so each plate counts as a batch.
    for name, batches in (("NSC", None), ("NSCB, a batch a plate", plates)):
        match = match_mechanisms(features[keep], compounds, mechanisms, batches)
        if match["rows"]:
            measure = f"mechanism of the nearest well, {name}"
            rows.append((measure, match["accuracy"], match["chance"], f"{match['rows']} wells"))
    return rows

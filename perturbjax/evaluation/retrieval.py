"""What features say without a classifier: do replicates find each other, and compounds their mechanism?

Mean average precision of replicates follows Kalinin et al. 2025 (Nature Communications 16, 5181; the package copairs),
matching of mechanisms Ljosa et al. 2013 (J Biomol Screen 18, 1321) and Ando et al. 2017 (bioRxiv 161422). What may be
retrieved can be kept apart from the query as MorphoHELM does (arXiv 2605.15383): see `RESTRICTIONS`.

Queries are compared in blocks, so that memory grows with the number of wells and not with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from scipy.special import gammaln
from scipy.stats import false_discovery_control

from perturbjax.core.errors import InputError
from perturbjax.core.files import write_csv
from perturbjax.core.plates import plate_layouts
from perturbjax.dataset import PLATE, WELL

MOA, COMPOUND, CONTROL_TYPE = "Metadata_moa", "Metadata_pert_iname", "Metadata_control_type"
NEGATIVE_CONTROL = "negcon"
#: Names of the vehicle, where no column tells the controls.
_VEHICLES = ("dmso", "negcon", "negative control")
#: What a query may not share with what it retrieves, by the name of the measure.
RESTRICTIONS = {
    "NR": "no restriction",
    "NSB": "not from the same plate",
    "NSS": "not from the same place on a plate",
    "NSL": "not from a plate of the same layout",
}
#: Queries at a time, and share of what may be retrieved that recall looks at.
_BLOCK, _TOP = 256, 0.01
#: With fewer rankings than this no p could be below 0.01.
_LEAST_RANKINGS = 100
#: Which rows a block of queries may retrieve, and which of these are right: (rows) → (positives, negatives).
Pairs = Callable[[Int[np.ndarray, " q"]], tuple[Bool[np.ndarray, "q n"], Bool[np.ndarray, "q n"]]]


def unit_rows(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length 1, whose products are cosines; a row of zeros stays, and is similar to nothing (0)."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def average_precision(
    similarity: Float[np.ndarray, "q n"],
    positives: Bool[np.ndarray, "q n"],
    negatives: Bool[np.ndarray, "q n"],
) -> Float[np.ndarray, " q"]:
    """How well each row ranks its positives before its negatives, by similarity.

    AP = mean over the positives of (rank among positives) / (rank among positives and negatives): the mean precision
    at the rank of each positive. Of equally similar rows the negatives come first. NaN where either set is empty.
    """
    found = np.full(len(similarity), np.nan)
    for row in np.flatnonzero(positives.any(axis=1) & negatives.any(axis=1)):
        good = np.sort(similarity[row, positives[row]])[::-1]
        bad = np.sort(similarity[row, negatives[row]])
        before = len(bad) - np.searchsorted(bad, good, side="left")  # negatives at least as similar
        rank = np.arange(1, len(good) + 1)
        found[row] = (rank / (rank + before)).mean()
    return found


def recall_at_top(
    similarity: Float[np.ndarray, "q n"],
    positives: Bool[np.ndarray, "q n"],
    negatives: Bool[np.ndarray, "q n"],
) -> Float[np.ndarray, " q"]:
    """Share of each row's positives among the most similar 1 % of what it may retrieve (one at least).

    NaN where either set is empty.
    """
    found = np.full(len(similarity), np.nan)
    for row in np.flatnonzero(positives.any(axis=1) & negatives.any(axis=1)):
        pool = positives[row] | negatives[row]
        top = max(1, int(np.ceil(_TOP * pool.sum())))
        near = np.argpartition(-np.where(pool, similarity[row], -np.inf), top - 1)[:top]
        found[row] = positives[row, near].sum() / positives[row].sum()
    return found


def _blocks(
    features: Float[np.ndarray, "n d"],
) -> Iterator[tuple[Int[np.ndarray, " q"], Float[np.ndarray, "q n"]]]:
    """Rows, and their similarity to all, some at a time."""
    unit = unit_rows(features)
    for start in range(0, len(unit), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(unit)))
        yield rows, unit[rows] @ unit.T


def _null(
    positives: int, negatives: int, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, " draws"]:
    """Average precision of random rankings."""
    places = np.sort(_places(positives, positives + negatives, draws, rng), axis=1) + 1
    return (np.arange(1, positives + 1) / places).mean(axis=1)


def _places(
    few: int, of: int, draws: int, rng: np.random.Generator
) -> Int[np.ndarray, "draws few"]:
    """So many different numbers below `of`, drawn anew for each row."""
    if few * few > of:
        return np.stack([rng.choice(of, few, replace=False, shuffle=False) for _ in range(draws)])
    places = rng.integers(of, size=(draws, few))
    while True:  # few rows have a number twice
        ordered = np.sort(places, axis=1)
        twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(twice):
            return places
        places[twice] = rng.integers(of, size=(len(twice), few))


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
    """Mean average precision with which the wells of each perturbation retrieve each other.

    Args:
        features: one row a well.
        metadata: `Metadata_Plate` and `label_column` of each row; `Metadata_Well` and a compound's column where
            `restriction` goes by them.
        is_control: the negative controls.
        label_column: what makes wells replicates.
        against: "controls" ranks replicates against the negative controls of the query's own plate, "others" against
            the wells of all other perturbations (phenotypic activity, and distinctness).
        restriction: of `RESTRICTIONS`: what is retrieved, right or wrong, may not share this with the query. Controls
            are those of the query's own plate whatever it is.
        draws: random rankings behind each p-value.
        seed: of those.

    Returns:
        one row a perturbation with at least two wells: `label`, `wells` (queries with positives and negatives), `map`
        (mean of their average precisions), `recall` (mean share of replicates among the nearest 1 %), `chance` (mean
        average precision of random rankings), `p` (share of random rankings at least as good; NaN where there are too
        few rankings for one) and `q` (Benjamini-Hochberg over those that have a p).

    Raises:
        InputError: `restriction` goes by layouts and no column names a compound.
    """
    labels = pd.factorize(metadata[label_column].astype(str))[0]
    plates = pd.factorize(metadata[PLATE].astype(str))[0]
    shared, treated = _shared(metadata, restriction), ~is_control

    def pairs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        same = (labels[rows, None] == labels) & treated[rows, None] & treated
        apart = shared[rows, None] != shared
        positives = same & apart
        positives[np.arange(len(rows)), rows] = False
        if against == "controls":
            return positives, (plates[rows, None] == plates) & is_control & treated[rows, None]
        return positives, ~same & treated & treated[rows, None] & apart

    queries = _queries(features, pairs).assign(label=metadata[label_column].astype(str).to_numpy())
    queries = queries[queries["ap"].notna()]
    rng = np.random.default_rng(seed)
    nulls = {
        size: _null(*size, draws, rng)
        for size in sorted(set(zip(queries["p"], queries["n"], strict=True)))
    }
    found = [
        _perturbation(str(label), group, nulls)
        for label, group in queries.groupby("label", sort=True)
    ]
    table = pd.DataFrame(found, columns=["label", "wells", "map", "recall", "chance", "p"])
    tested = table["p"].notna()
    table.loc[tested, "q"] = false_discovery_control(table.loc[tested, "p"]) if tested.any() else []
    return table


def _queries(features: Float[np.ndarray, "n d"], pairs: Pairs) -> pd.DataFrame:
    """Average precision, recall and the numbers of positives and negatives of each row."""
    parts = []
    for rows, similarity in _blocks(features):
        positives, negatives = pairs(rows)
        columns = {"ap": average_precision, "recall": recall_at_top}
        part = pd.DataFrame(
            {name: measure(similarity, positives, negatives) for name, measure in columns.items()}
        )
        parts.append(part.assign(p=positives.sum(axis=1), n=negatives.sum(axis=1)))
    return pd.concat(parts, ignore_index=True)


def _shared(metadata: pd.DataFrame, restriction: str) -> Int[np.ndarray, " n"]:
    """A number of each row that a query and what it retrieves may not have in common.

    Raises:
        InputError: layouts are asked for and no column names a compound.
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
    """One perturbation's mean average precision beside that of random rankings.

    Queries of the same size share their random rankings, as in copairs: replicates retrieve each other, so their
    average precisions are no independent draws, and taking them as such would call too many perturbations active.
    """
    null = np.mean([nulls[size] for size in zip(queries["p"], queries["n"], strict=True)], axis=0)
    value, chance = queries["ap"].mean(), null.mean()
    p = (
        (1 + (null >= value).sum()) / (1 + len(null))
        if _rankings(queries) >= _LEAST_RANKINGS
        else np.nan
    )
    recall = queries["recall"].mean()
    return {
        "label": label,
        "wells": len(queries),
        "map": value,
        "recall": recall,
        "chance": chance,
        "p": p,
    }


def _rankings(queries: pd.DataFrame) -> float:
    """In how many ways the query that has most could have ranked its positives among all."""
    p, n = queries["p"], queries["n"]
    return float(
        np.exp(np.minimum(gammaln(p + n + 1) - gammaln(p + 1) - gammaln(n + 1), 100).max())
    )


def match_mechanisms(
    features: Float[np.ndarray, "n d"],
    compounds: Shaped[np.ndarray, " n"],
    mechanisms: Shaped[np.ndarray, " n"],
    batches: Shaped[np.ndarray, " n"] | None = None,
) -> dict[str, float]:
    """Share of rows whose most similar row of ANOTHER compound has the same mechanism (1-nearest neighbour, cosine).

    NSC (not same compound); with `batches` NSCB (not same compound or batch). Rows are what the caller makes them; the
    convention of BBBC021 is one median profile a compound and concentration, controls left out. Rows without any
    allowed row of their mechanism cannot be matched and do not count.

    Returns:
        `accuracy`, `chance` (of a random allowed row) and `rows` that count.
    """
    found = nearest_mechanisms(features, compounds, mechanisms, batches)
    counts = found["chance"] > 0
    if not counts.any():
        return {"accuracy": float("nan"), "chance": float("nan"), "rows": 0}
    return {
        "accuracy": float(found.loc[counts, "right"].mean()),
        "chance": float(found.loc[counts, "chance"].mean()),
        "rows": int(counts.sum()),
    }


def nearest_mechanisms(
    features: Float[np.ndarray, "n d"],
    compounds: Shaped[np.ndarray, " n"],
    mechanisms: Shaped[np.ndarray, " n"],
    batches: Shaped[np.ndarray, " n"] | None = None,
) -> pd.DataFrame:
    """Row by row what `match_mechanisms` counts: `nearest` (its position), `right` (it has the row's mechanism), and
    `chance`, the share of allowed rows that have it: 0 where the row cannot be matched."""
    compound, mechanism = pd.factorize(compounds)[0], pd.factorize(mechanisms)[0]
    batch = None if batches is None else pd.factorize(batches)[0]
    parts = []
    for rows, similarity in _blocks(features):
        allowed = compound[rows, None] != compound
        if batch is not None:
            allowed &= batch[rows, None] != batch
        nearest = np.where(allowed, similarity, -np.inf).argmax(axis=1)
        chance = (allowed & (mechanism[rows, None] == mechanism)).sum(axis=1) / np.maximum(
            allowed.sum(axis=1), 1
        )
        right = mechanism[nearest] == mechanism[rows]
        parts.append(pd.DataFrame({"nearest": nearest, "right": right, "chance": chance}))
    return pd.concat(parts, ignore_index=True)


def negative_controls(
    metadata: pd.DataFrame, label_column: str = COMPOUND
) -> Bool[np.ndarray, " n"]:
    """The wells that `Metadata_control_type` calls negcon; without any, those whose label names the vehicle."""
    if (
        CONTROL_TYPE in metadata.columns
        and (marked := metadata[CONTROL_TYPE] == NEGATIVE_CONTROL).any()
    ):
        return marked.to_numpy()
    return metadata[label_column].astype(str).str.lower().isin(_VEHICLES).to_numpy()


def well_profiles(table: pd.DataFrame) -> tuple[pd.DataFrame, Float[np.ndarray, "wells d"]]:
    """Mean features of each (plate, well), each feature to mean 0 and deviation 1 over the wells.

    Args:
        table: `Metadata_*` columns and one number column a feature; a row a site or a well.

    Raises:
        InputError: there is no plate, no well or no feature, or features are not all finite.
    """
    names = [
        c
        for c in table.columns
        if not c.startswith("Metadata_") and pd.api.types.is_numeric_dtype(table[c])
    ]
    for column in (PLATE, WELL):
        if column not in table.columns:
            raise InputError(f"features: no column {column}; wells cannot be told apart")
    if not names:
        raise InputError(
            "features: no numeric column beside Metadata_*; nothing to compare wells by"
        )
    if not np.isfinite(values := table[names].to_numpy(dtype=np.float64)).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"features: row {row}, column {names[column]!r} is not finite; drop it or extract again"
        )
    groups = table.groupby([PLATE, WELL], sort=False)
    features = groups[names].mean().to_numpy()
    metadata = (
        groups[[c for c in table.columns if c.startswith("Metadata_")]]
        .head(1)
        .reset_index(drop=True)
    )
    deviation = features.std(axis=0)
    varying = deviation > 0
    return metadata, (features[:, varying] - features.mean(axis=0)[varying]) / deviation[varying]


def evaluate_retrieval(
    table: pd.DataFrame, out: Path, *, label_column: str = COMPOUND, seed: int = 0
) -> pd.DataFrame:
    """All that can be retrieved from a table of features; writes `retrieval.csv` and `retrieval_per_class.csv`.

    Args:
        table: as `well_profiles` takes it; only rows that are to be judged (held-out ones for trained features).
        out: folder to write to.
        label_column: what makes wells replicates.

    Returns:
        the summary, as in `retrieval.csv`: `measure`, `value`, `chance`, `n`. Measures that the data does not allow
        (no controls, no replicates, no mechanisms) are left out.

    Raises:
        InputError: as `well_profiles`, or `label_column` is missing.
    """
    metadata, features = well_profiles(table)
    if label_column not in metadata.columns:
        raise InputError(
            f"features: no column {label_column}; choose the column that tells replicates"
        )
    controls = negative_controls(metadata, label_column)
    summary: list[tuple[str, float, float | None, str]] = []
    perturbations = []
    for against, restriction in (("controls", "NR"), *(("others", name) for name in RESTRICTIONS)):
        try:
            found = replicate_retrieval(
                features,
                metadata,
                controls,
                label_column=label_column,
                against=against,
                restriction=restriction,
                seed=seed,
            )
        except InputError:  # no column names a compound, so plates have no layouts to be told apart
            continue
        if len(found):
            perturbations.append(found.assign(against=against, restriction=restriction))
            summary += _replicate_rows(found, against, restriction)
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
    found: pd.DataFrame, against: str, restriction: str
) -> Iterator[tuple[str, float, float | None, str]]:
    n = f"{len(found)} perturbations, {found['wells'].sum()} wells"
    of = f"against {against}" if restriction == "NR" else f"against {against}, {restriction}"
    yield f"replicates, mAP {of}", found["map"].mean(), found["chance"].mean(), n
    if against == "others":
        yield f"replicates, recall at 1 % {of}", found["recall"].mean(), _TOP, n
    tested = found["q"].notna()
    if tested.any():
        few = f"; {(~tested).sum()} more have too few replicates for a p" if (~tested).any() else ""
        share = (found.loc[tested, "q"] < 0.05).mean()
        yield f"share retrieved {of} (q < 0.05)", share, None, f"{tested.sum()} perturbations{few}"
    else:
        yield f"share retrieved {of}: too few replicates for a p", float("nan"), None, n


def _mechanism_rows(
    features: np.ndarray, metadata: pd.DataFrame, controls: np.ndarray
) -> list[tuple[str, float, float, str]]:
    known = (
        ~controls & metadata[MOA].notna().to_numpy() & (metadata[MOA].astype(str) != "").to_numpy()
    )
    compounds, mechanisms, plates = (
        metadata[c].astype(str).to_numpy()[known] for c in (COMPOUND, MOA, PLATE)
    )
    rows = []
    for name, batches in (("NSC", None), ("NSCB, a batch a plate", plates)):
        found = match_mechanisms(features[known], compounds, mechanisms, batches)
        if found["rows"]:
            n = f"{found['rows']} wells"
            rows.append(
                (f"mechanism of the nearest well, {name}", found["accuracy"], found["chance"], n)
            )
    return rows

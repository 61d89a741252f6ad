"""What features say without a classifier: do replicates find each other, and compounds their mechanism?

Mean average precision of replicates follows Kalinin et al. 2025 (Nature Communications 16, 5181; the package copairs),
matching of mechanisms Ljosa et al. 2013 (J Biomol Screen 18, 1321) and Ando et al. 2017 (bioRxiv 161422).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control

from perturbjax.console import InputError
from perturbjax.dataset import PLATE, WELL
from perturbjax.files import atomic

MOA, COMPOUND, CONTROL_TYPE = "Metadata_moa", "Metadata_pert_iname", "Metadata_control_type"
NEGATIVE_CONTROL = "negcon"
#: Names of the vehicle, where no column tells the controls.
_VEHICLES = ("dmso", "negcon", "negative control")


def cosine_similarity(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    """Cosine of the angle between each two rows; a row of zeros is similar to nothing (0)."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(length > 0, length, 1)
    return unit @ unit.T


def average_precision(
    similarity: Float[np.ndarray, "q n"], positives: Bool[np.ndarray, "q n"], negatives: Bool[np.ndarray, "q n"]
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


def _null(positives: int, negatives: int, draws: int, rng: np.random.Generator) -> Float[np.ndarray, " draws"]:
    """Average precision of random rankings."""
    order = rng.random((draws, positives + negatives)).argpartition(positives - 1, axis=1)[:, :positives]
    places = np.sort(order, axis=1) + 1
    return (np.arange(1, positives + 1) / places).mean(axis=1)


def replicate_retrieval(
    features: Float[np.ndarray, "n d"],
    metadata: pd.DataFrame,
    is_control: Bool[np.ndarray, " n"],
    *,
    label_column: str = COMPOUND,
    against: str = "controls",
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean average precision with which the wells of each perturbation retrieve each other.

    Args:
        features: one row a well.
        metadata: `Metadata_Plate` and `label_column` of each row.
        is_control: the negative controls.
        label_column: what makes wells replicates.
        against: "controls" ranks replicates against the negative controls of the query's own plate, "others" against
            the wells of all other perturbations (phenotypic activity, and distinctness).
        draws: random rankings behind each p-value.
        seed: of those.

    Returns:
        one row a perturbation with at least two wells: `label`, `wells` (queries with positives and negatives), `map`
        (mean of their average precisions), `chance` (of random rankings), `p` (share of random rankings at least as
        good) and `q` (Benjamini-Hochberg).
    """
    labels = metadata[label_column].astype(str).to_numpy()
    plates = metadata[PLATE].astype(str).to_numpy()
    treated = ~is_control
    same = (labels[:, None] == labels) & treated[:, None] & treated
    positives = same & ~np.eye(len(labels), dtype=bool)
    if against == "controls":
        negatives = (plates[:, None] == plates) & is_control & treated[:, None]
    else:
        negatives = ~same & treated & treated[:, None]
    precision = average_precision(cosine_similarity(features), positives, negatives)
    rows = pd.DataFrame({"label": labels, "ap": precision, "p": positives.sum(axis=1), "n": negatives.sum(axis=1)})
    rows = rows[rows["ap"].notna()]
    rng = np.random.default_rng(seed)
    nulls = {size: _null(*size, draws, rng) for size in sorted(set(zip(rows["p"], rows["n"], strict=True)))}
    found = [_perturbation(label, group, nulls) for label, group in rows.groupby("label", sort=True)]
    table = pd.DataFrame(found, columns=["label", "wells", "map", "chance", "p"])
    return table.assign(q=false_discovery_control(table["p"]) if len(table) else [])


def _perturbation(label: str, queries: pd.DataFrame, nulls: dict[tuple[int, int], np.ndarray]) -> dict[str, object]:
    """One perturbation's mean average precision beside that of random rankings.

    Queries of the same size share their random rankings, as in copairs: replicates retrieve each other, so their
    average precisions are no independent draws, and taking them as such would call too many perturbations active.
    """
    null = np.mean([nulls[size] for size in zip(queries["p"], queries["n"], strict=True)], axis=0)
    value = queries["ap"].mean()
    p = (1 + (null >= value).sum()) / (1 + len(null))
    return {"label": label, "wells": len(queries), "map": value, "chance": null.mean(), "p": p}


def match_mechanisms(
    features: Float[np.ndarray, "n d"],
    compounds: np.ndarray,
    mechanisms: np.ndarray,
    batches: np.ndarray | None = None,
) -> dict[str, float]:
    """Share of rows whose most similar row of ANOTHER compound has the same mechanism (1-nearest neighbour, cosine).

    NSC (not same compound); with `batches` NSCB (not same compound or batch). Rows are what the caller makes them; the
    convention of BBBC021 is one median profile a compound and concentration, controls left out. Rows without any
    allowed row of their mechanism cannot be matched and do not count.

    Returns:
        `accuracy`, `chance` (of a random allowed row) and `rows` that count.
    """
    allowed = compounds[:, None] != compounds
    if batches is not None:
        allowed &= batches[:, None] != batches
    same = (mechanisms[:, None] == mechanisms) & allowed
    counts = same.any(axis=1)
    if not counts.any():
        return {"accuracy": float("nan"), "chance": float("nan"), "rows": 0}
    nearest = np.where(allowed, cosine_similarity(features), -np.inf).argmax(axis=1)
    right = mechanisms[nearest] == mechanisms
    chance = same[counts].sum(axis=1) / allowed[counts].sum(axis=1)
    return {"accuracy": float(right[counts].mean()), "chance": float(chance.mean()), "rows": int(counts.sum())}


def negative_controls(metadata: pd.DataFrame, label_column: str = COMPOUND) -> Bool[np.ndarray, " n"]:
    """The wells that `Metadata_control_type` calls negcon; without any, those whose label names the vehicle."""
    if CONTROL_TYPE in metadata.columns and (marked := metadata[CONTROL_TYPE] == NEGATIVE_CONTROL).any():
        return marked.to_numpy()
    return metadata[label_column].astype(str).str.lower().isin(_VEHICLES).to_numpy()


def well_profiles(table: pd.DataFrame) -> tuple[pd.DataFrame, Float[np.ndarray, "wells d"]]:
    """Mean features of each (plate, well), each feature to mean 0 and deviation 1 over the wells.

    Args:
        table: `Metadata_*` columns and one number column a feature; a row a site or a well.

    Raises:
        InputError: there is no plate, no well or no feature, or features are not all finite.
    """
    names = [c for c in table.columns if not c.startswith("Metadata_") and pd.api.types.is_numeric_dtype(table[c])]
    for column in (PLATE, WELL):
        if column not in table.columns:
            raise InputError(f"features: no column {column}; wells cannot be told apart")
    if not names:
        raise InputError("features: no numeric column beside Metadata_*; nothing to compare wells by")
    if not np.isfinite(values := table[names].to_numpy(dtype=np.float64)).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise InputError(f"features: row {row}, column {names[column]!r} is not finite; drop it or extract again")
    groups = table.groupby([PLATE, WELL], sort=False)
    features = groups[names].mean().to_numpy()
    metadata = groups[[c for c in table.columns if c.startswith("Metadata_")]].head(1).reset_index(drop=True)
    deviation = features.std(axis=0)
    varying = deviation > 0
    return metadata, (features[:, varying] - features.mean(axis=0)[varying]) / deviation[varying]


def evaluate_retrieval(table: pd.DataFrame, out: Path, *, label_column: str = COMPOUND, seed: int = 0) -> pd.DataFrame:
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
        raise InputError(f"features: no column {label_column}; choose the column that tells replicates")
    controls = negative_controls(metadata, label_column)
    summary, perturbations = [], []
    for against in ("controls", "others"):
        found = replicate_retrieval(features, metadata, controls, label_column=label_column, against=against, seed=seed)
        if found.empty:
            continue
        perturbations.append(found.assign(against=against))
        n = f"{len(found)} perturbations, {found['wells'].sum()} wells"
        summary.append((f"replicates, mAP against {against}", found["map"].mean(), found["chance"].mean(), n))
        summary.append((f"share retrieved against {against} (q < 0.05)", (found["q"] < 0.05).mean(), None, n))
    if {MOA, COMPOUND} <= set(metadata.columns):
        summary += _mechanism_rows(features, metadata, controls)
    result = pd.DataFrame(summary, columns=["measure", "value", "chance", "n"])
    with atomic(Path(out) / "retrieval.csv") as temporary:
        result.to_csv(temporary, index=False)
    if perturbations:
        with atomic(Path(out) / "retrieval_per_class.csv") as temporary:
            pd.concat(perturbations).to_csv(temporary, index=False)
    return result


def _mechanism_rows(
    features: np.ndarray, metadata: pd.DataFrame, controls: np.ndarray
) -> list[tuple[str, float, float, str]]:
    known = ~controls & metadata[MOA].notna().to_numpy() & (metadata[MOA].astype(str) != "").to_numpy()
    compounds, mechanisms, plates = (metadata[c].astype(str).to_numpy()[known] for c in (COMPOUND, MOA, PLATE))
    rows = []
    for name, batches in (("NSC", None), ("NSCB, a batch a plate", plates)):
        found = match_mechanisms(features[known], compounds, mechanisms, batches)
        if found["rows"]:
            n = f"{found['rows']} wells"
            rows.append((f"mechanism of the nearest well, {name}", found["accuracy"], found["chance"], n))
    return rows

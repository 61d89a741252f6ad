"""Tables of predictions: columns, writing, reading and checks.

Columns: `Metadata_*`, `site_id`, `part` (train, test or new), `label` (true class, empty if
unknown), `predicted`, and one `prob_<class>` per class. Networks and classifiers write the same
table. Networks add their prediction sets, see `run_sets.set_columns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.core.errors import InputError
from perturbjax.core.files import read_parquet, write_csv, write_parquet
from perturbjax.data.splits import TEST, TRAIN, VALIDATION
from perturbjax.evaluation.scores import check_probabilities
from perturbjax.evaluation.wells import aggregate_wells, well_ids

#: Values of `part`, of which the first one among its sites is that of a well.
_PARTS = (TRAIN, VALIDATION, TEST, "new")
#: Start of the names of probability columns.
PROBABILITY = "prob_"


def predictions_table(
    index: pd.DataFrame,
    probabilities: Float[np.ndarray, "n classes"],
    class_names: Sequence[str],
    *,
    part: Any,
    label: pd.Series | str = "",
    sets: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Build the table of predictions, one row per row of `index`, with float32 probabilities.

    Args:
        index: `site_id` and the `Metadata_*` columns.
        probabilities: one row per site.
        class_names: classes in the order of the probabilities.
        part: train, test or new, for each row or for all.
        label: true class of each row; empty if unknown.
        sets: columns of prediction sets, one row per site.
    """
    names = np.asarray(class_names, dtype=object)
    columns = [column for column in index.columns if column.startswith("Metadata_")]
    predictions = pd.DataFrame(
        {
            "site_id": index["site_id"].to_numpy(),
            "part": part,
            "label": label if isinstance(label, str) else label.astype(str).to_numpy(),
            "predicted": names[probabilities.argmax(axis=1)],
        }
    )
    wide = pd.DataFrame(
        probabilities.astype(np.float32), columns=[PROBABILITY + name for name in class_names]
    )
    own = [] if sets is None else [sets.reset_index(drop=True)]
    return pd.concat([index[columns].reset_index(drop=True), predictions, *own, wide], axis=1)


def average_predictions(table: pd.DataFrame) -> pd.DataFrame:
    """Average the probabilities of the sites of each well, as evaluations do.

    Args:
        table: predictions of sites.

    Returns:
        One row for each well: `Metadata_*` columns that are the same for all sites of a well,
        `Metadata_Site_Count`, `part` (train if any site is), `label` (empty if the sites differ),
        `predicted` and probabilities. Prediction sets of sites are left out.
    """
    names, wells = predicted_class_names(table), well_ids(table)
    values = table[[PROBABILITY + name for name in names]].to_numpy(dtype=np.float32)
    # The same class for all sites, because the average needs no labels.
    _, means = aggregate_wells(wells, np.zeros(len(table), int), values)
    sites = table.groupby(wells, sort=True)
    metadata = table[[name for name in table.columns if name.startswith("Metadata_")]]
    same = (metadata.groupby(wells).nunique(dropna=False) <= 1).all()
    index = (
        sites[list(same.index[same])].first().assign(Metadata_Site_Count=sites.size(), site_id="")
    )
    label = sites["label"].agg(lambda labels: labels.iloc[0] if labels.nunique() == 1 else "")
    part = sites["part"].agg(lambda parts: min(parts, key=_PARTS.index))
    averaged = predictions_table(index, means, names, part=part.to_numpy(), label=label)
    return averaged.drop(columns="site_id")


def write_predictions(path: Path, table: pd.DataFrame) -> None:
    """Write the table atomically, as CSV if the name ends in .csv, otherwise as parquet."""
    (write_csv if path.suffix == ".csv" else write_parquet)(path, table)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read a parquet table of predictions.

    Raises:
        InputError: the file cannot be read or lacks a column.
    """
    table = read_parquet(path, "run predict again")
    for column in ("site_id", "part", "label", "predicted"):
        if column not in table.columns:
            raise InputError(f"{path}: not a table of predictions (no column {column!r})")
    columns = [column for column in table.columns if column.startswith(PROBABILITY)]
    is_number = all(pd.api.types.is_numeric_dtype(table[column]) for column in columns)
    if not columns or not is_number or table["site_id"].duplicated().any():
        raise InputError(
            f"{path}: is damaged (probabilities are missing or no numbers, or a site occurs "
            "twice); run predict again"
        )
    return table


def predicted_class_names(table: pd.DataFrame) -> list[str]:
    """List the classes of a table of predictions, in the order of the columns."""
    columns = [column for column in table.columns if column.startswith(PROBABILITY)]
    return [column.removeprefix(PROBABILITY) for column in columns]


def drop_probabilities(table: pd.DataFrame) -> pd.DataFrame:
    """Remove the probability columns."""
    return table[[column for column in table.columns if not column.startswith(PROBABILITY)]]


def labels_and_probabilities(
    table: pd.DataFrame, class_names: Sequence[str]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n classes"]]:
    """Extract true class numbers and probabilities, in the order of the rows.

    Raises:
        InputError: a class has no column, a label is not in `class_names`, or probabilities are
            invalid.
    """
    columns = [PROBABILITY + name for name in class_names]
    for column in ("site_id", "label", *columns):
        if column not in table.columns:
            raise InputError(
                f"predictions: no column {column!r}; run predict again with the classes of the run"
            )
    labels = encode_labels(table["label"], class_names, "predictions")
    probabilities = table[columns].to_numpy(dtype=np.float32)
    check_probabilities(labels, probabilities, list(table["site_id"]))
    return labels, probabilities


def select_predictions(
    table: pd.DataFrame, index: pd.DataFrame, class_names: Sequence[str], *, part: str = TEST
) -> tuple[pd.Series, Float[np.ndarray, "n classes"]]:
    """Select and check the predictions of one part, in the order of `index`.

    Args:
        table: `site_id`, `label`, `prob_<class>` of every class; `part` is optional.
        index: sites of that part, with `site_id`.
        class_names: classes in the order of the probabilities.
        part: rows of `table` to select.

    Returns:
        True class (name) and probabilities of each row of `index`.

    Raises:
        InputError: a column is missing; a site is repeated, missing or not of this part; a label
            is not in `class_names`; or probabilities are invalid.
    """
    if "site_id" not in table.columns:
        raise InputError("predictions: no column 'site_id'; run predict again")
    if "part" in table.columns:
        table = table[table["part"] == part]
    # Duplicates would make the selection by site ambiguous.
    _check_unique(table["site_id"], "predictions")
    _check_unique(index["site_id"], "index")
    if missing := sorted(set(index["site_id"]) - set(table["site_id"])):
        raise InputError(
            f"predictions: {len(missing)} {part} sites are missing (first: {missing[0]}); run "
            "predict again"
        )
    if extra := sorted(set(table["site_id"]) - set(index["site_id"])):
        raise InputError(
            f"predictions: {len(extra)} sites are not in the {part} set (first: {extra[0]})"
        )
    # The rows follow `index`, whatever the order of the file.
    rows = table.set_index("site_id", drop=False).loc[index["site_id"]].reset_index(drop=True)
    _, probabilities = labels_and_probabilities(rows, class_names)
    return rows["label"], probabilities


def encode_labels(
    labels: pd.Series, class_names: Sequence[str], table: str
) -> Int[np.ndarray, " n"]:
    """Convert class names to class numbers.

    Raises:
        InputError: a label is not in `class_names`; the message names `table`.
    """
    numbers = labels.map({name: number for number, name in enumerate(class_names)})
    if numbers.isna().any():
        unknown = labels[numbers.isna().to_numpy()].iloc[0]
        raise InputError(
            f"{table}: label {unknown!r} is not one of the {len(class_names)} classes of the run "
            "(labels.json)"
        )
    return numbers.to_numpy(dtype=int)


def _check_unique(site_ids: pd.Series, table: str) -> None:
    if (repeated := site_ids.duplicated()).any():
        raise InputError(f"{table}: site {site_ids[repeated].iloc[0]} occurs more than once")

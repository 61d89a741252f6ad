"""The table of predictions: its columns, how it is written, and how what stands in it is checked and read.

`Metadata_*`, then `site_id`, `part`, `label` (the true class, empty where it is not known), `predicted`, and one
`prob_<class>` a class. Networks and classical models write the same.
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
from perturbjax.data.splits import TEST
from perturbjax.evaluation.scores import check_probabilities

_PROBABILITY = "prob_"


def predictions_table(
    index: pd.DataFrame,
    probabilities: Float[np.ndarray, "n classes"],
    class_names: Sequence[str],
    *,
    part: Any,
    label: pd.Series | str = "",
) -> pd.DataFrame:
    """One row a row of `index`, probabilities as float32.

    Args:
        index: `site_id` and the `Metadata_*` columns.
        class_names: in the order of the probabilities.
        part: of each row, or of all.
        label: the true class of each row; empty where it is not known.
    """
    names = np.asarray(class_names, dtype=object)
    metadata = index[
        [column for column in index.columns if column.startswith("Metadata_")]
    ].reset_index(drop=True)
    answers = pd.DataFrame(
        {
            "site_id": index["site_id"].to_numpy(),
            "part": part,
            "label": label if isinstance(label, str) else label.astype(str).to_numpy(),
            "predicted": names[probabilities.argmax(axis=1)],
        }
    )
    wide = pd.DataFrame(
        probabilities.astype(np.float32), columns=[_PROBABILITY + name for name in class_names]
    )
    return pd.concat([metadata, answers, wide], axis=1)


def write_predictions(path: Path, table: pd.DataFrame) -> None:
    """Write the table, atomically: as text where the name ends in .csv, else as parquet."""
    (write_csv if path.suffix == ".csv" else write_parquet)(path, table)


def read_predictions(path: Path) -> pd.DataFrame:
    """The table as it was written.

    Raises:
        InputError: the file cannot be read, or lacks a column.
    """
    table = read_parquet(path, "predict again")
    for column in ("site_id", "part", "label", "predicted"):
        if column not in table.columns:
            raise InputError(f"{path}: no column {column!r}; it is no table of predictions")
    return table


def predicted_class_names(table: pd.DataFrame) -> list[str]:
    """The classes that a table has probabilities of, in their order."""
    return [
        column.removeprefix(_PROBABILITY)
        for column in table.columns
        if column.startswith(_PROBABILITY)
    ]


def drop_probabilities(table: pd.DataFrame) -> pd.DataFrame:
    """What is known of the rows, and what was predicted."""
    return table[[column for column in table.columns if not column.startswith(_PROBABILITY)]]


def labels_and_probabilities(
    table: pd.DataFrame, class_names: Sequence[str]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n classes"]]:
    """True classes as numbers, and probabilities, of the rows as they stand.

    Raises:
        InputError: a class has no column, a label is not one of `class_names`, or probabilities are none.
    """
    columns = [_PROBABILITY + name for name in class_names]
    for column in ("site_id", "label", *columns):
        if column not in table.columns:
            raise InputError(
                f"predictions: no column {column!r}; predict again with the run's own classes"
            )
    labels = encode_labels(table["label"], class_names, "predictions")
    probabilities = table[columns].to_numpy(dtype=np.float32)
    check_probabilities(labels, probabilities, list(table["site_id"]))
    return labels, probabilities


def select_predictions(
    table: pd.DataFrame, index: pd.DataFrame, class_names: Sequence[str], *, part: str = TEST
) -> tuple[pd.Series, Float[np.ndarray, "n classes"]]:
    """The predictions of one part, checked, in the order of `index`.

    Args:
        table: `site_id`, `label`, `prob_<class name>` for every class, and `part` (all rows are taken if absent).
        index: the sites of that part, `site_id` among its columns.
        class_names: classes in logit order.
        part: rows of `table` to take.

    Returns:
        true class (by name) and probabilities of each row of `index`.

    Raises:
        InputError: a column is missing, a site occurs twice, is missing or is not of this part, a label is not one of
            `class_names`, or probabilities are not probabilities.
    """
    if "site_id" not in table.columns:
        raise InputError("predictions: no column 'site_id'; predict again")
    if "part" in table.columns:
        table = table[table["part"] == part]
    _refuse_repeated(table["site_id"], "predictions")
    _refuse_repeated(index["site_id"], "index")
    if missing := sorted(set(index["site_id"]) - set(table["site_id"])):
        raise InputError(
            f"predictions: none for {part} site {missing[0]} ({len(missing)} missing); predict again"
        )
    if foreign := sorted(set(table["site_id"]) - set(index["site_id"])):
        raise InputError(
            f"predictions: site {foreign[0]} is not in the {part} part ({len(foreign)} such sites)"
        )
    rows = table.set_index("site_id", drop=False).loc[index["site_id"]].reset_index(drop=True)
    _, probabilities = labels_and_probabilities(rows, class_names)
    return rows["label"], probabilities


def encode_labels(
    labels: pd.Series, class_names: Sequence[str], table: str
) -> Int[np.ndarray, " n"]:
    """Class names as numbers in logit order.

    Raises:
        InputError: a label is not one of `class_names`; the message names `table`.
    """
    numbers = labels.map({name: number for number, name in enumerate(class_names)})
    if numbers.isna().any():
        unknown = labels[numbers.isna().to_numpy()].iloc[0]
        raise InputError(
            f"{table}: label {unknown!r} is not one of the run's {len(class_names)} classes (labels.json)"
        )
    return numbers.to_numpy(dtype=int)


def _refuse_repeated(site_ids: pd.Series, table: str) -> None:
    if (repeated := site_ids.duplicated()).any():
        raise InputError(
            f"{table}: site {site_ids[repeated].iloc[0]} occurs more than once; every site counts once"
        )

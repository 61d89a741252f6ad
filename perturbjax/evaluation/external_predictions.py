"""Predictions of any model for the sites of a dataset: reading, checks, and training sites.

The true classes come from the dataset, never from the table. Training sites of the model, which
also train the baselines, are found by the first rule that applies:

1. The split file, or the column `part` of the table, names them.
2. The training sites are unknown. Baselines use the labelled sites of all wells without
   predictions, if these contain every class of the evaluated sites.
3. Otherwise baselines are cross-fitted: five parts of the evaluated sites, divided by the strictest
   split that the data allow, are each predicted from the other four.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int

from perturbjax.core.csv_tables import read_table
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_parquet
from perturbjax.core.messages import csv_value
from perturbjax.core.plates import PLATE, SITE, WELL, in_empty_wells, normalize_well
from perturbjax.core.text_tables import clean_columns
from perturbjax.data.split_choice import choose_split, infer_split
from perturbjax.data.splits import TEST, TRAIN, VALIDATION, make_split, read_split
from perturbjax.dataset import Dataset
from perturbjax.evaluation.evaluate import Fold, ModelPredictions
from perturbjax.evaluation.evaluation_result import MODEL, UNKNOWN_TRAINING
from perturbjax.evaluation.predictions import (
    PROBABILITY,
    encode_labels,
    predicted_class_names,
    predictions_table,
)
from perturbjax.evaluation.scores import check_probabilities
from perturbjax.evaluation.wells import well_ids

#: Value of `part` for sites that are not in the split of a run.
_NEW = "new"
#: Column of the dataset -> its other name in a table, in lower case.
_KEYS = {PLATE: "plate", WELL: "well", SITE: "site"}
#: Number of parts of cross-fitted baselines.
_FOLDS = 5
_ADVICE = "correct the table"


@dataclass(frozen=True)
class ExternalPredictions:
    """Predictions of a model, matched with the sites of a dataset.

    Attributes:
        label_column: column of the dataset with the true classes.
        class_names: classes in the order of the probabilities.
        model: probabilities for the test and training sites of each fold.
        folds: training and test sites; several only for cross-fitted baselines.
        split: policy that the parts follow, or `UNKNOWN_TRAINING`.
        note: one sentence about the training sites.
    """

    label_column: str
    class_names: list[str]
    model: ModelPredictions
    folds: list[Fold]
    split: str
    note: str

    def table(self) -> pd.DataFrame:
        """Return the table of predictions with the true classes, as `predict` writes it."""
        model, fold = self.pooled()
        parts = [(TEST, fold.test, model.test[0])]
        parts += [(TRAIN, fold.train, values) for values in model.train]
        tables = [
            predictions_table(rows, values, self.class_names, part=part, label=rows["label"])
            for part, rows, values in parts
        ]
        return pd.concat(tables, ignore_index=True)

    def pooled(self) -> tuple[ModelPredictions, Fold]:
        """Return predictions and sites of all folds as one fold."""
        test = pd.concat([fold.test for fold in self.folds], ignore_index=True)
        model = ModelPredictions(MODEL, (np.concatenate(self.model.test),), self.model.train)
        return model, Fold(MODEL, self.folds[0].train, test)


def match_external_predictions(
    path: Path, dataset: Dataset, split_file: Path | None = None, seed: int = 0
) -> ExternalPredictions:
    """Read a table of predictions, and match it with the sites of a dataset.

    Args:
        path: parquet or CSV file with `prob_<class>` for each class, and `site_id` or plate, well
            and site. Without sites, each row predicts all sites of a well. `part` is optional.
        dataset: dataset with the true classes.
        split_file: split of the training, which replaces `part`.
        seed: seed of the folds of cross-fitted baselines.

    Raises:
        InputError: a column is missing, a site is unknown or occurs twice, a class has no column,
            probabilities are invalid, or no site is evaluated.
    """
    table = _read_columns(path)
    if not (class_names := predicted_class_names(table)):
        raise InputError(
            f"{path}: no probability columns; add {PROBABILITY}<class> for every class"
        )
    rows, positions = _match_sites(table, dataset, path)
    parts = _parts(table.iloc[rows], positions, dataset, split_file, path)
    # Probability rows and parts by dataset position; -1 without a prediction.
    row_of = np.full(len(dataset), -1)
    row_of[positions] = rows
    predicted = row_of >= 0
    test = _labelled(dataset) & predicted & (parts == TEST)
    if not test.any():
        raise InputError(f"{path}: no sites to evaluate; none is a test site or new")
    label_column = _label_column(dataset, class_names, test, path)
    index = dataset.index.assign(label=dataset.column(label_column).astype(str))
    values = table[[PROBABILITY + name for name in class_names]].to_numpy(dtype=np.float32)
    usable = _labelled(dataset) & index["label"].isin(class_names).to_numpy()
    train = usable & (parts == TRAIN)
    scored = predicted & (test | train)
    check_probabilities(
        encode_labels(index["label"][scored], class_names, str(path)),
        values[row_of[scored]],
        list(index["site_id"][scored]),
        where=str(path),
        advice=_ADVICE,
    )
    model_train: tuple[np.ndarray, ...] = ()
    if train.any():
        folds = [_fold(MODEL, index, train, test)]
        split = infer_split(folds[0].train, folds[0].test, "label")
        note = f"{train.sum()} training sites from {split_file or f'column part of {path}'}"
        if predicted[train].all():
            model_train = (values[row_of[train]],)
    else:
        split = UNKNOWN_TRAINING
        try:
            folds, note = _folds_without_training_sites(index, usable & ~predicted, test, seed)
        except InputError as error:
            raise InputError(
                f"{path}: baselines need training sites; add the column part or a split file "
                f"({error})"
            ) from error
    order = [_positions(dataset, fold.test) for fold in folds]
    model = ModelPredictions(MODEL, tuple(values[row_of[one]] for one in order), model_train)
    return ExternalPredictions(label_column, class_names, model, folds, split, note)


def _positions(dataset: Dataset, rows: pd.DataFrame) -> Int[np.ndarray, " n"]:
    return dataset.positions(rows["site_id"].tolist())


def _read_columns(path: Path) -> pd.DataFrame:
    """Read keys as text and probabilities as numbers; damaged numbers are NaN."""
    is_parquet = path.suffix == ".parquet"
    table = read_parquet(path, _ADVICE) if is_parquet else read_table(path)
    table.columns = table.columns.astype(str)
    columns = [name for name in table.columns if name.startswith(PROBABILITY)]
    numbers = table[columns].apply(pd.to_numeric, errors="coerce")
    keys = clean_columns(table.drop(columns=columns))[0]
    return pd.concat([keys if is_parquet else keys.map(csv_value), numbers], axis=1)


def _match_sites(
    table: pd.DataFrame, dataset: Dataset, path: Path
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Match rows of the table with sites of the dataset.

    Returns:
        Row of the table, and position in the dataset, of each predicted site.
    """
    if "site_id" in table.columns:
        keys, sites = table["site_id"], dataset.index["site_id"].astype(str)
    else:
        columns = _key_columns(table, path)
        keys = _join_keys(table[list(columns.values())])
        sites = _join_keys(dataset.index[list(columns)])
    if (repeated := keys.duplicated()).any():
        raise InputError(f"{path}: site {keys[repeated].iloc[0]!r} occurs twice; {_ADVICE}")
    if (unknown := ~keys.isin(sites)).any():
        raise InputError(
            f"{path}: site {keys[unknown].iloc[0]!r} is not in {dataset.path}; remove the row, or "
            "pass the dataset that contains it"
        )
    # A key without a site is a well, and predicts each of its sites.
    rows = pd.Index(keys).get_indexer(sites)
    positions = np.flatnonzero(rows >= 0)
    return rows[positions], positions


def _key_columns(table: pd.DataFrame, path: Path) -> dict[str, str]:
    """Return column of the dataset -> column of the table."""
    # Metadata_Well, well and Well are one column.
    names = {re.sub("^metadata_", "", name.lower()): name for name in reversed(table.columns)}
    columns = {key: names[short] for key, short in _KEYS.items() if short in names}
    for key in (PLATE, WELL):
        if key not in columns:
            raise InputError(f"{path}: no column site_id, and no column {key}; add one of them")
    return columns


def _join_keys(table: pd.DataFrame) -> pd.Series:
    """Spell plate, well and site as one text, such as P1 A01 1."""
    plates, wells, *sites = (table[name].astype(str) for name in table.columns)
    # Site 01 is site 1.
    numbers = [one.str.replace(r"^0+(?=\d)", "", regex=True) for one in sites]
    return plates.str.cat([wells.map(normalize_well), *numbers], sep=" ")


def _parts(
    rows: pd.DataFrame,
    positions: Int[np.ndarray, " n"],
    dataset: Dataset,
    split_file: Path | None,
    path: Path,
) -> np.ndarray:
    """Return the part of each site of the dataset: train, validation, test, or empty."""
    parts = np.full(len(dataset), "", object)
    if "part" in rows.columns:
        named = rows["part"].to_numpy()
        if unknown := set(named) - {TRAIN, VALIDATION, TEST, _NEW, ""}:
            raise InputError(
                f"{path}: part {min(unknown)!r} is unknown; use {TRAIN}, {VALIDATION}, {TEST} or "
                f"{_NEW}"
            )
        parts[positions] = named
    parts[positions] = np.where(np.isin(parts[positions], (_NEW, "")), TEST, parts[positions])
    if split_file is None:
        return parts
    manifest = read_split(split_file, dataset.index)
    split = np.full(len(dataset), "", object)
    split[_positions(dataset, manifest)] = manifest["part"].to_numpy()
    missing = (split == TEST) & ~np.isin(np.arange(len(dataset)), positions)
    differs = (split == TEST) & (parts == TRAIN)
    for wrong, problem in (
        (missing, "have no prediction; predict all of them"),
        (differs, f"are training sites in the table; {_ADVICE}"),
    ):
        if wrong.any():
            site = dataset.index["site_id"].iloc[int(np.argmax(wrong))]
            raise InputError(
                f"{path}: {wrong.sum()} test sites of {split_file} (first: {site}) {problem}"
            )
    return split


def _labelled(dataset: Dataset) -> np.ndarray:
    """True for sites with a treatment: not in empty wells, and with a label."""
    filled = ~in_empty_wells(dataset.index)
    if not dataset.label_column:
        return filled
    return filled & (dataset.index[dataset.label_column].astype(str) != "").to_numpy()


def _label_column(dataset: Dataset, class_names: list[str], test: np.ndarray, path: Path) -> str:
    """Return the label column of the dataset, or another one that the predicted classes fit."""
    columns = [name for name in dataset.index.columns if name.startswith("Metadata_")]
    fits = [c for c in columns if set(dataset.index[c][test].astype(str)) <= set(class_names)]
    label = dataset.label_column
    if label in fits or (not fits and not label):
        return dataset.column(label).name
    if len(fits) == 1:
        return fits[0]
    labels = dataset.column(label)[test].astype(str)
    absent = labels[~labels.isin(class_names)]
    raise InputError(
        f"{path}: no column {PROBABILITY + absent.iloc[0]!r}, although {absent.iloc[0]!r} is the "
        f"{label} of {(absent == absent.iloc[0]).sum()} predicted sites; add one column for every "
        "class"
    )


def _fold(name: str, index: pd.DataFrame, train: np.ndarray, test: np.ndarray) -> Fold:
    return Fold(name, index[train].reset_index(drop=True), index[test].reset_index(drop=True))


def _folds_without_training_sites(
    index: pd.DataFrame, remaining: np.ndarray, test: np.ndarray, seed: int
) -> tuple[list[Fold], str]:
    """Choose training sites of the baselines: rules 2 and 3 of this module."""
    wells = well_ids(index)
    # Other sites of a predicted well would give its label to the position-only baseline.
    remaining &= ~np.isin(wells, wells[test])
    start = "training sites of the model are unknown; baselines are fitted on"
    if set(index["label"][test]) <= set(index["label"][remaining]):
        return [_fold(MODEL, index, remaining, test)], (
            f"{start} the {remaining.sum()} labelled sites of wells without predictions"
        )
    tested = index[test].reset_index(drop=True)
    policy, _ = choose_split(tested, "label", _FOLDS)
    folds = []
    for number in range(_FOLDS):
        manifest = make_split(tested, policy, label="label", folds=_FOLDS, fold=number, seed=seed)
        own = (manifest["part"] == TEST).to_numpy()
        folds.append(_fold(f"fold_{number}", tested, ~own, own))
    return folds, f"{start} the predicted sites, cross-fitted in {_FOLDS} parts by {policy}"

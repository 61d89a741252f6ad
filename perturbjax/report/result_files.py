"""Guarded readers of the files of an evaluation: a damaged file is one line that names it.

Each reader checks all values that the report uses, so that the sections can rely on them.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json, read_parquet
from perturbjax.core.messages import csv_value
from perturbjax.core.recipe_files import recipe_from_dict
from perturbjax.evaluation.class_attribution import CLASS_ATTRIBUTION
from perturbjax.training.run_directory import is_list_of_text

_ADVICE = "Run `perturbjax evaluate` again."
#: Maximum size of a table of scores in bytes; one row per class is about 100 bytes.
LARGEST_TABLE = 1 << 26


class ScoreTable(NamedTuple):
    """Columns of a CSV file of the evaluation; other columns are text.

    Attributes:
        key: columns whose combination identifies a row.
        counts: columns of whole numbers.
        numbers: columns of numbers, in which empty cells are NaN.
    """

    key: tuple[str, ...]
    counts: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


SCORE_TABLES = {
    "per_class.csv": ScoreTable(
        ("class",), ("sites", "wells", "predicted"), ("recall", "precision", "f1")
    ),
    CLASS_ATTRIBUTION: ScoreTable(
        ("class", "compartment", "channel"), ("sites",), ("fraction", "loss")
    ),
    "retrieval.csv": ScoreTable(("measure", "n"), (), ("value", "chance")),
    "retrieval_per_class.csv": ScoreTable(
        ("label", "against", "restriction"), (), ("map", "q", "recall", "chance", "p")
    ),
}


def read_score_table(file: Path) -> pd.DataFrame:
    """Read one of `SCORE_TABLES`.

    Raises:
        InputError: a column is missing, a value is not valid, or the file cannot be read.
    """
    columns = SCORE_TABLES[file.name]
    table = _read_text_table(file)
    try:
        for name in columns.counts:
            table[name] = table[name].astype(np.int64)
            if (table[name] < 0).any():
                raise ValueError(f"{name} is negative")
        for name in columns.numbers:
            table[name] = table[name].replace("", "nan").astype(float)
        if table.duplicated(list(columns.key)).any():
            raise ValueError(f"a row of {columns.key[0]} occurs twice")
    except KeyError as error:
        raise InputError(f"{file}: column {error} is missing. {_ADVICE}") from error
    except (ValueError, OverflowError) as error:
        raise InputError(f"{file}: is damaged ({error}). {_ADVICE}") from error
    # Remove the apostrophes that prevent spreadsheet formulas.
    return table.map(csv_value)


def read_confusion_counts(file: Path) -> tuple[list[str], np.ndarray]:
    """Read a confusion matrix.

    Returns:
        Names of the classes, and counts with shape (classes, classes), int64.

    Raises:
        InputError: the file is not a square table of counts.
    """
    table = _read_text_table(file)
    try:
        matrix = table.iloc[:, 1:].to_numpy().astype(np.int64)
        if matrix.shape[0] != matrix.shape[1] or (matrix < 0).any():
            raise ValueError(f"counts of shape {matrix.shape}")
    except (ValueError, OverflowError) as error:
        raise InputError(f"{file}: is not a confusion matrix ({error}). {_ADVICE}") from error
    return [str(csv_value(name)) for name in table.columns[1:]], matrix


def read_features(file: Path, predictions: pd.DataFrame | None) -> pd.DataFrame:
    """Read the features of an evaluation.

    Raises:
        InputError: the file cannot be read, or does not belong to the predictions.
    """
    table = read_parquet(file, _ADVICE)
    sites = table.get("Metadata_site_id")
    if sites is None:
        raise InputError(f"{file}: column Metadata_site_id is missing. {_ADVICE}")
    values = table[[name for name in table.columns if not name.startswith("Metadata_")]]
    try:
        is_finite = bool(np.isfinite(values.to_numpy(dtype=np.float64)).all())
    except (ValueError, TypeError):
        is_finite = False
    if not is_finite:
        raise InputError(f"{file}: contains values that are not finite numbers. {_ADVICE}")
    if predictions is not None and not sites.isin(predictions["site_id"]).all():
        raise InputError(f"{file}: contains sites without predictions. {_ADVICE}")
    return table


def read_config(file: Path) -> dict[str, Any]:
    """Read the `config.json` of a run; an empty mapping if there is none.

    Raises:
        InputError: it is not the file of a run.
    """
    if not file.is_file():
        return {}
    config = read_json(file)
    try:
        if "recipe" in config:
            recipe_from_dict(config["recipe"])
        data = config.get("data") or []
        if not isinstance(data, str) and not is_list_of_text(data):
            raise TypeError("data is not a path")
        sections = ("facts", "begun", "versions")
        wrong = [name for name in sections if not isinstance(config.get(name, {}), dict)]
        if wrong:
            raise TypeError(f"{wrong[0]} is not a mapping")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: is not the config.json of a run ({error!r})") from error
    return config


def _read_text_table(file: Path) -> pd.DataFrame:
    """Read a CSV file as text, without missing values: a class can have the name NA."""
    try:
        if file.stat().st_size > LARGEST_TABLE:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        text = file.read_text(encoding="utf-8")
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        if not rows or "\0" in text:
            raise ValueError("it is empty, or contains a NUL byte")
        header, *cells = rows
        if {len(row) for row in rows} != {len(set(header))}:
            raise ValueError("rows differ in length, or a column occurs twice")
        return pd.DataFrame(cells, columns=header, dtype=object)
    except (ValueError, OSError, csv.Error) as error:
        raise InputError(f"{file}: is not a CSV table ({error}). {_ADVICE}") from error

"""Simulated plates with known labels, and predictions of adjustable accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbjax.evaluation.evaluate import evaluate_predictions, match_run_predictions
from perturbjax.evaluation.evaluation_result import EvaluationResult
from perturbjax.evaluation.score_tables import write_run_evaluation

CLASSES = ["DMSO", *(f"compound {letter}" for letter in "ABCDEFG")]


def make_index(
    plates: int = 3, rows: int = 4, columns: int = 6, sites: int = 3, seed: int = 0
) -> pd.DataFrame:
    """Simulate plates with all classes at random positions; cell counts are uninformative."""
    rng = np.random.default_rng(seed)
    wells = [
        f"{'ABCDEFGHIJKLMNOP'[row]}{column + 1:02d}"
        for row in range(rows)
        for column in range(columns)
    ]
    tables = []
    for plate in range(plates):
        labels = rng.permutation(np.resize(CLASSES, len(wells)))
        tables += [
            {
                "Metadata_Plate": f"P{plate}",
                "Metadata_Well": well,
                "Metadata_Site": str(site),
                "label": label,
                "site_id": f"P{plate}_{well}_{site}",
            }
            for well, label in zip(wells, labels, strict=True)
            for site in range(sites)
        ]
    index = pd.DataFrame(tables)
    index["n_cells"] = rng.integers(20, 60, len(index))
    index["mask_area"] = index["n_cells"] * rng.integers(80, 120, len(index))
    return index


def make_predictions(
    index: pd.DataFrame, *, skill: float, seed: int = 0, part: str = "test"
) -> pd.DataFrame:
    """Simulate random probabilities with `skill` added to the logit of the true class."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(index), len(CLASSES)))
    labels = index["label"].map({name: i for i, name in enumerate(CLASSES)}).to_numpy()
    logits[np.arange(len(index)), labels] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = index[["Metadata_Plate", "Metadata_Well", "Metadata_Site", "site_id"]].assign(
        part=part,
        label=index["label"],
        predicted=np.asarray(CLASSES, dtype=object)[probabilities.argmax(axis=1)],
    )
    for i, name in enumerate(CLASSES):
        table[f"prob_{name}"] = probabilities[:, i].astype(np.float32)
    return table


def evaluate_run(
    predictions: pd.DataFrame,
    train: pd.DataFrame,
    test: pd.DataFrame,
    *,
    split: str = "plate",
    class_names=CLASSES,
    out: Path | None = None,
    **options,
) -> EvaluationResult:
    """Evaluate a table of predictions as `perturbjax evaluate` does."""
    model, fold = match_run_predictions(predictions, train, test, class_names)
    evaluation = evaluate_predictions(
        [model], [fold], class_names, split=split, **{"replicates": 200, **options}
    )
    if out is not None:
        write_run_evaluation(evaluation, model, fold, class_names, out)
    return evaluation


@pytest.fixture
def screen() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Training index, test index and predictions of a plate split."""
    index = make_index()
    test = index[index["Metadata_Plate"] == "P2"].reset_index(drop=True)
    train = index[index["Metadata_Plate"] != "P2"].reset_index(drop=True)
    return train, test, make_predictions(test, skill=2.0)

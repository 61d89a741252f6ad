"""Everything a report is made from, read from a run directory and its dataset."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from perturbjax.core.errors import InputError
from perturbjax.core.files import describe_path, read_json
from perturbjax.data.splits import TEST
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.evaluation.apply import EVALUATION, FEATURES
from perturbjax.evaluation.evaluation_result import EvaluationResult, read_evaluation
from perturbjax.evaluation.predictions import (
    labels_and_probabilities,
    predicted_class_names,
    read_predictions,
)
from perturbjax.report.result_files import read_config, read_features, read_score_table
from perturbjax.training.run_directory import CONFIG, dataset_paths, read_metrics

#: Result of `perturbjax audit --run RUN --out RUN/audit`, relative to the run.
AUDIT = "audit/audit.json"


@dataclass(frozen=True)
class TestPredictions:
    """Predictions for the test sites, one row per site.

    Attributes:
        table: `Metadata_*`, `site_id`, `label`, `predicted`.
        class_names: classes in the order of the probabilities.
        labels: number of the true class.
        probabilities: one column per class.
    """

    __test__ = False  # not a test class of pytest

    table: pd.DataFrame
    class_names: list[str]
    labels: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n classes"]

    @functools.cached_property
    def predicted(self) -> Int[np.ndarray, " n"]:
        """Number of the most probable class."""
        return self.probabilities.argmax(axis=1)

    @functools.cached_property
    def confidence(self) -> Float[np.ndarray, " n"]:
        """Probability of the predicted class."""
        return self.probabilities.max(axis=1)

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Whether the prediction is correct."""
        return self.predicted == self.labels

    @functools.cached_property
    def true_class_probability(self) -> Float[np.ndarray, " n"]:
        """Probability of the true class."""
        return self.probabilities[np.arange(len(self.labels)), self.labels]


@dataclass(frozen=True)
class RunResults:
    """Results of a run, or of one classifier of `perturbjax classify`.

    Attributes:
        path: run directory, or folder of the classifier.
        folder: location of scores and tables.
        evaluation: scores; None if the run was not evaluated.
        config: `config.json`, or empty.
        metrics: rows of `metrics.jsonl`.
        predictions: predictions of all sites, or None.
        features: features of the network, or None.
        dataset: dataset of the predictions, or None.
        dataset_error: why there is no dataset.
    """

    path: Path
    folder: Path
    evaluation: EvaluationResult | None
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    predictions: pd.DataFrame | None
    features: pd.DataFrame | None
    dataset: Dataset | None
    dataset_error: str

    @functools.cached_property
    def test(self) -> TestPredictions | None:
        """Predictions for the test sites, or None."""
        if self.predictions is None:
            return None
        table = self.predictions[self.predictions["part"] == TEST].reset_index(drop=True)
        if table.empty:
            return None
        names = predicted_class_names(table)
        return TestPredictions(table, names, *labels_and_probabilities(table, names))

    @functools.cached_property
    def positions(self) -> dict[str, int]:
        """Dataset row of each site."""
        if self.dataset is None:
            return {}
        return {site: row for row, site in enumerate(self.dataset.index["site_id"])}

    @property
    def audit_sentences(self) -> list[str]:
        """Headline and sentences of the audit of the run; empty without one."""
        return [*self._audit("headline"), *self._audit("sentences")]

    @property
    def audit_advice(self) -> list[str]:
        """Advice of the audit of the run; empty without one."""
        return self._audit("advice")

    def _audit(self, part: str) -> list[str]:
        file = self.path / AUDIT
        if not file.is_file():
            return []
        try:
            value = read_json(file)["verdict"][part]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{file}: is not an audit ({error!r}). Run `perturbjax audit` again, or remove it."
            ) from error
        return [value] if isinstance(value, str) else [str(sentence) for sentence in value]

    def csv(self, name: str) -> pd.DataFrame | None:
        """Read a table of the evaluation, one of `SCORE_TABLES`; None if it does not exist.

        Raises:
            InputError: the file is damaged.
        """
        file = self.folder / name
        return read_score_table(file) if file.is_file() else None


def evaluation_folder(run: Path) -> Path:
    """Return the folder with scores.json: `evaluation` of a run, or the folder of a classifier."""
    # The folder of a classifier contains scores.json without the subfolder `evaluation`.
    has_folder = (run / EVALUATION).is_dir() or not (run / "scores.json").is_file()
    return run / EVALUATION if has_folder else run


def read_run_results(run: Path) -> RunResults:
    """Read all results that exist.

    Args:
        run: run directory, or folder of one classifier of `perturbjax classify`.

    Raises:
        InputError: there are neither metrics nor scores, or a file cannot be read.
    """
    run = Path(run)
    folder = evaluation_folder(run)
    scores = folder / "scores.json"
    evaluation = read_evaluation(scores) if scores.is_file() else None
    metrics = read_metrics(run)
    if evaluation is None and not metrics:
        raise InputError(
            f"{run}: {describe_path(Path(run))}; it has neither metrics nor scores. Run "
            "`perturbjax evaluate --run RUN` first."
        )
    # Predictions of a run, or of one classifier of `perturbjax classify`.
    files = (
        folder / "predictions.parquet",
        folder.parent.parent / "predictions" / f"{folder.name}.parquet",
    )
    features = folder / FEATURES
    predictions = next((read_predictions(file) for file in files if file.is_file()), None)
    results = RunResults(
        path=run,
        folder=folder,
        evaluation=evaluation,
        config=read_config(run / CONFIG),
        metrics=metrics,
        predictions=predictions,
        features=read_features(features, predictions) if features.is_file() else None,
        dataset=None,
        dataset_error="",
    )
    dataset, error = _open_dataset(results)
    return dataclasses.replace(results, dataset=dataset, dataset_error=error)


def _open_dataset(results: RunResults) -> tuple[Dataset | None, str]:
    """The dataset of the predictions, or the reason why there is none."""
    paths = dataset_paths(results.config) if results.config.get("data") else ()
    if not paths:
        return None, "the results name no dataset of images"
    try:
        dataset = open_dataset(paths)
    except InputError:
        names = " and ".join(path.name for path in paths)
        return None, f"the dataset {names} was moved or changed"
    predictions = results.predictions
    sites = dataset.index["site_id"]
    if predictions is not None and not predictions["site_id"].isin(sites).all():
        return None, f"the dataset {dataset.path.name} does not contain the predicted sites"
    return dataset, ""

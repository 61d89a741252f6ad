"""All that a report is made of, read from a run directory and from the dataset it was trained on."""

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
from perturbjax.core.files import read_json
from perturbjax.core.messages import csv_value
from perturbjax.data.splits import TEST
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.evaluation.apply import EVALUATION, FEATURES
from perturbjax.evaluation.evaluation_result import EvaluationResult, read_evaluation
from perturbjax.evaluation.predictions import (
    labels_and_probabilities,
    predicted_class_names,
    read_predictions,
)
from perturbjax.training.run_directory import CONFIG, dataset_paths, read_metrics

#: Where an audit of a run is looked for.
AUDIT = "audit/audit.json"


@dataclass(frozen=True)
class Answers:
    """What a network or a model said of sites that judge it, one row a site."""

    table: pd.DataFrame
    """`Metadata_*`, `site_id`, `label`, `predicted`."""
    class_names: list[str]
    labels: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, "n classes"]

    @functools.cached_property
    def predicted(self) -> Int[np.ndarray, " n"]:
        """The most probable class of each site."""
        return self.probabilities.argmax(axis=1)

    @functools.cached_property
    def confidence(self) -> Float[np.ndarray, " n"]:
        """The probability of it."""
        return self.probabilities.max(axis=1)

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        return self.predicted == self.labels

    @functools.cached_property
    def of_truth(self) -> Float[np.ndarray, " n"]:
        """The probability of the true class."""
        return self.probabilities[np.arange(len(self.labels)), self.labels]


@dataclass(frozen=True)
class Evidence:
    """A run directory, or the folder of one model of `perturbjax classify`; what is missing is None or empty."""

    path: Path
    folder: Path
    """Where its scores and tables are."""
    evaluation: EvaluationResult | None
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    predictions: pd.DataFrame | None
    """Of every part that was predicted."""
    features: pd.DataFrame | None
    dataset: Dataset | None
    no_dataset: str
    """Why there is none."""

    @functools.cached_property
    def answers(self) -> Answers | None:
        """Of the sites that judge."""
        if self.predictions is None:
            return None
        table = self.predictions[self.predictions["part"] == TEST].reset_index(drop=True)
        names = predicted_class_names(table)
        return (
            Answers(table, names, *labels_and_probabilities(table, names)) if len(table) else None
        )

    @functools.cached_property
    def positions(self) -> dict[str, int]:
        """Where sites stand in the dataset."""
        if self.dataset is None:
            return {}
        return {site: at for at, site in enumerate(self.dataset.index["site_id"])}

    @property
    def audited(self) -> list[str]:
        """What `perturbjax audit --run RUN --out RUN/audit` says of the run, if it was asked."""
        return [*self._audit("headline"), *self._audit("sentences")]

    @property
    def advised(self) -> list[str]:
        """What that audit advises."""
        return self._audit("advice")

    def _audit(self, part: str) -> list[str]:
        file = self.path / AUDIT
        if not file.is_file():
            return []
        try:
            said = read_json(file)["verdict"][part]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{file}: is no audit ({error!r}); run `perturbjax audit` again, or remove it"
            ) from error
        return [said] if isinstance(said, str) else [str(sentence) for sentence in said]

    def csv(self, name: str, *shares: str) -> pd.DataFrame | None:
        """A table of the evaluation, text as text; an empty share is NaN."""
        if not (self.folder / name).is_file():
            return None
        gaps = dict.fromkeys(shares, "")
        texts = {"class": str, "label": str}
        table = pd.read_csv(self.folder / name, dtype=texts, keep_default_na=False, na_values=gaps)
        return table.map(csv_value)


def read_evidence(run: Path) -> Evidence:
    """Everything that is there.

    Raises:
        InputError: the run was neither trained nor evaluated here, or a file of it cannot be read.
    """
    run = Path(run)
    folder = (
        run / EVALUATION
        if (run / EVALUATION).is_dir() or not (run / "scores.json").is_file()
        else run
    )
    evaluation = (
        read_evaluation(folder / "scores.json") if (folder / "scores.json").is_file() else None
    )
    config = read_json(run / CONFIG) if (run / CONFIG).is_file() else {}
    metrics = read_metrics(run)
    if evaluation is None and not metrics:
        raise InputError(
            f"{run}: holds neither metrics nor scores; run `perturbjax evaluate --run {run}` first"
        )
    beside = (
        folder / "predictions.parquet",
        folder.parent.parent / "predictions" / f"{folder.name}.parquet",
    )
    predictions = next((read_predictions(file) for file in beside if file.is_file()), None)
    features = pd.read_parquet(folder / FEATURES) if (folder / FEATURES).is_file() else None
    found = Evidence(run, folder, evaluation, config, metrics, predictions, features, None, "")
    dataset, why = _dataset(found)
    return dataclasses.replace(found, dataset=dataset, no_dataset=why)


def _dataset(found: Evidence) -> tuple[Dataset | None, str]:
    """The dataset that was judged, where it is still there, or why it is not."""
    paths = dataset_paths(found.config) if found.config.get("data") else ()
    if not paths:
        return None, "no dataset of images is known"
    try:
        dataset = open_dataset(paths)
    except InputError:
        return (
            None,
            f"the dataset {' and '.join(path.name for path in paths)} is not where it was, or was changed",
        )
    if (
        found.predictions is not None
        and not found.predictions["site_id"].isin(dataset.index["site_id"]).all()
    ):
        return None, f"the dataset {dataset.path.name} does not hold the sites that were judged"
    return dataset, ""

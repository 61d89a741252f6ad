"""A run's network applied to a dataset: predictions as a table, and the judgement of them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.files import make_folder, read_parquet, write_parquet
from perturbjax.core.messages import console
from perturbjax.core.options import (
    python_only,
    renamed_from,
    require,
    require_output,
    require_sound,
)
from perturbjax.data.batches import PipelineChoice
from perturbjax.data.splits import TEST, TRAIN, fingerprint
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.evaluation import score_tables as views
from perturbjax.evaluation.attribution import forget, write_attribution
from perturbjax.evaluation.evaluate import evaluate_predictions, match_run_predictions
from perturbjax.evaluation.evaluation_result import (
    MODEL,
    EvaluationResult,
    format_estimate,
    read_evaluation,
)
from perturbjax.evaluation.predictions import encode_labels, predictions_table, write_predictions
from perturbjax.evaluation.retrieval import COMPOUND, evaluate_retrieval
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.inference import BATCH_SIZE, Network, feature_names, load_network
from perturbjax.training.apply_network import Predictions
from perturbjax.training.checkpoint import CheckpointConfig
from perturbjax.training.devices import ComputeConfig, open_devices
from perturbjax.training.processes import (
    HostsConfig,
    connect,
    is_first_process,
    require_supported_job,
)
from perturbjax.training.run_directory import SPLIT_FILE, Run, open_run

EVALUATION, PREDICTIONS, FEATURES = "evaluation", "predictions.parquet", "features.parquet"
#: Where in a run's directory the linear baseline of its split is looked for.
LINEAR = "linear"


@dataclass(frozen=True)
class ApplyConfig:
    """Application of a run's network."""

    chosen: CheckpointConfig
    batch_size: int = BATCH_SIZE
    """Sites in a device call."""
    feed: PipelineChoice = python_only("auto")
    """Batch pipeline. resident: dataset on the device. streamed: decode during the computation."""
    compute: ComputeConfig = ComputeConfig()
    hosts: HostsConfig = python_only(HostsConfig())

    def __post_init__(self) -> None:
        require_sound(self)
        require("batch-size", self.batch_size, self.batch_size >= 1, "at least 1")


@dataclass(frozen=True)
class PredictConfig:
    """Predict the classes of all sites of a dataset."""

    apply: ApplyConfig
    data: tuple[Path, ...]
    """Dataset directories with the channels of the run."""
    out: Path
    """Table to write (.parquet or .csv): metadata, site_id, part, label, predicted and one probability per class."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".parquet", ".csv")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a run on its own split."""

    apply: ApplyConfig
    data: tuple[Path, ...] = ()
    """Dataset directories; by default those of the training."""
    replicates: int = 2000
    """Bootstrap resamples of whole wells for each interval."""
    training_sites: bool = True
    """Evaluate the training sites too, for their scores and features."""
    attribution: bool = renamed_from(True, "look")
    """Compute attribution maps; runs the network three more times with other masks."""
    json: bool = False
    """Print scores.json instead of tables."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("replicates", self.replicates, self.replicates >= 1, "at least 1")


def open_network(run: Run, dataset: Dataset, config: ApplyConfig) -> Network:
    """The run's network on the devices, for this dataset.

    Raises:
        InputError: the dataset's channels or pixel type are not those the run was trained on, or no checkpoint fits.
    """
    connect(config.hosts)
    require_supported_job(config.feed, config.compute.devices, config.batch_size)
    return load_network(
        run,
        config.chosen.which,
        config.chosen.epoch,
        placement=open_devices(config.compute),
        dataset=dataset,
        batch_size=config.batch_size,
    )


def predict(config: PredictConfig) -> Path:
    """Predict every site of a dataset, known to the run or not, and write the table (parquet).

    Of several processes the first writes.

    Raises:
        InputError: the run or dataset cannot be used, they do not fit, or --out cannot be written.
    """
    run, dataset, out = open_run(config.apply.chosen.run), open_dataset(config.data), config.out
    make_folder(out.parent)
    network = open_network(run, dataset, config.apply)
    answers = network.apply_to_dataset(dataset, np.arange(len(dataset)), feed=config.apply.feed)
    if not is_first_process():
        return out
    write_predictions(
        out, run_predictions_table(run, dataset.index, answers, run.parts(dataset.index["site_id"]))
    )
    console.print(f"{len(dataset)} sites predicted: {out}")
    return out


def run_predictions_table(
    run: Run, index: pd.DataFrame, answers: Predictions, part: Any
) -> pd.DataFrame:
    """The table of predictions (see `predictions.py`) of the sites of an index, whose parts are given."""
    label = index[run.label_column] if run.label_column in index.columns else ""
    return predictions_table(index, answers.probabilities, run.class_names, part=part, label=label)


def evaluate(config: EvaluateConfig) -> EvaluationResult | None:
    """Judge a run on its own split: write `evaluation/` (predictions, features, scores, tables).

    Nothing is computed of labels that the run does not know, and nothing written before all is judged. Of several
    processes the first judges and writes; the others return None.

    Raises:
        InputError: the run or its dataset cannot be used.
    """
    run = open_run(config.apply.chosen.run)
    dataset = run.open_data(config.data)
    manifest = run.manifest(dataset.index)
    positions, part = dataset.positions(manifest["site_id"].tolist()), manifest["part"].to_numpy()
    rows = dataset.index.iloc[positions].reset_index(drop=True)
    encode_labels(
        dataset.column(run.label_column).iloc[positions], run.class_names, str(dataset.path)
    )
    rows["label"] = rows[run.label_column].astype(str)
    asked = (part == TEST) | config.training_sites
    network = open_network(run, dataset, config.apply)
    answers = network.apply_to_dataset(dataset, positions[asked], feed=config.apply.feed)
    if not is_first_process():
        return None
    table = run_predictions_table(run, rows[asked], answers, part[asked])
    features = features_table(run, rows[asked], part[asked], answers.features)
    subject, fold = match_run_predictions(
        table, rows[part == TRAIN], rows[part == TEST], run.class_names
    )
    evaluation = evaluate_predictions(
        [subject],
        [fold],
        run.class_names,
        split=run.recipe.split.split_file or run.recipe.split.split,
        seed=run.recipe.seed,
        replicates=config.replicates,
    )

    out = make_folder(run.path / EVALUATION)
    write_predictions(out / PREDICTIONS, table)
    write_parquet(out / FEATURES, features)
    replicates_of = COMPOUND if COMPOUND in rows.columns else run.label_column
    evaluate_retrieval(features[part[asked] == TEST], out, label_column=replicates_of)
    views.write_run_evaluation(evaluation, subject, fold, run.class_names, out)
    forget(out)
    if config.attribution and network.placement.processes == 1:
        judged = encode_labels(rows["label"][part == TEST], run.class_names, "test sites")
        write_attribution(
            network,
            dataset,
            positions[part == TEST],
            judged,
            answers.probabilities[part[asked] == TEST],
            out,
        )
    return evaluation


def describe_linear_baseline(config: EvaluateConfig) -> str:
    """What the linear baseline reaches on the run's split, or the command that finds out; empty without a dataset.

    Raises:
        InputError: the run cannot be read, or its baseline is no judgement.
    """
    run = open_run(config.apply.chosen.run)
    data, split, out = config.data or run.data, run.path / SPLIT_FILE, run.path / LINEAR
    if not data or not split.is_file():
        return ""
    found = next(out.glob(f"{EVALUATION}/*/scores.json"), None)
    if found is not None and _sides(out / SPLIT_FILE) == _sides(split):
        scores = read_evaluation(found)["site"][MODEL].scores
        words = ", ".join(
            f"{METRICS[name].words} {format_estimate(scores[name])}"
            for name in ("accuracy", HEADLINE)
        )
        return f"the linear baseline on this split, by site: {words} ({out})"
    options = [
        "--data",
        *data,
        "--split-file",
        split,
        "--label-column",
        run.label_column,
        "--out",
        out,
    ]
    command = shlex.join(["perturbjax", "classify", "--preset", "linear", *map(str, options)])
    return f"next, what a linear model on photographs' features reaches on this split: {command}"


def _sides(manifest: Path) -> str:
    """Who trains and who judges, whatever else stands in the file."""
    return fingerprint(read_parquet(manifest, "run the same `perturbjax classify` again"))


def features_table(
    run: Run, index: pd.DataFrame, part: np.ndarray, features: np.ndarray
) -> pd.DataFrame:
    """`Metadata_*` (site and part among them) first, then one column a feature of the network."""
    metadata = index[[column for column in index.columns if column.startswith("Metadata_")]]
    metadata = metadata.assign(Metadata_site_id=index["site_id"], Metadata_part=part).reset_index(
        drop=True
    )
    names = feature_names([run.recipe.model.model], features.shape[1])
    return pd.concat([metadata, pd.DataFrame(features, columns=names)], axis=1)

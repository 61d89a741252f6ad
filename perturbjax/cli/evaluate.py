"""Commands `evaluate` and `predict`: apply the network of a run to a dataset."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.files import (
    describe_path,
    make_folder,
    read_parquet,
    write_json,
    write_parquet,
)
from perturbjax.core.messages import console
from perturbjax.core.options import (
    python_only,
    renamed_from,
    require,
    require_output,
    require_sound,
)
from perturbjax.core.plates import COMPOUND
from perturbjax.core.progress import announce
from perturbjax.data.batches import PipelineChoice
from perturbjax.data.splits import TEST, TRAIN, fingerprint, split_name
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.evaluation.apply import (
    EVALUATION,
    FEATURES,
    PREDICTIONS,
    features_table,
    run_predictions_table,
)
from perturbjax.evaluation.attribution import remove_attribution, write_attribution
from perturbjax.evaluation.evaluate import (
    Fold,
    ModelPredictions,
    evaluate_predictions,
    match_run_predictions,
)
from perturbjax.evaluation.evaluation_result import (
    MODEL,
    EvaluationResult,
    format_estimate,
    read_evaluation,
)
from perturbjax.evaluation.external_predictions import match_external_predictions
from perturbjax.evaluation.predictions import average_predictions, encode_labels, write_predictions
from perturbjax.evaluation.retrieval import evaluate_retrieval
from perturbjax.evaluation.run_sets import (
    calibrate_run,
    describe_dataset,
    predict_sets,
    read_calibration,
    write_calibration,
)
from perturbjax.evaluation.score_tables import write_run_evaluation
from perturbjax.evaluation.scores import HEADLINE, METRICS
from perturbjax.inference import BATCH_SIZE, Network, load_network
from perturbjax.report.result_files import read_config
from perturbjax.training.checkpoint import CheckpointConfig
from perturbjax.training.devices import ComputeConfig, open_devices
from perturbjax.training.processes import (
    HostsConfig,
    connect,
    is_first_process,
    require_supported_job,
)
from perturbjax.training.run_directory import CONFIG, SPLIT_FILE, Run, open_run

#: Folder in a run directory with the linear baseline of the same split.
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
    """Table to write (.parquet or .csv): metadata, site_id, part, label, predicted, prediction set
    and one probability per class."""
    level: Literal["site", "well"] = "site"
    """Row of the table; well: mean probabilities of the sites of a well."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".parquet", ".csv")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a run on its own split, or the predictions of any model."""

    apply: ApplyConfig
    data: tuple[Path, ...] = ()
    """Dataset directories; by default those of the training."""
    predictions: tuple[Path, ...] = ()
    """In place of --run: table of predictions of any model; a split file may follow."""
    out: Path | None = None
    """Folder for the results of --predictions; those of a run are written into it."""
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
        _require_source(self)
        require("replicates", self.replicates, self.replicates >= 1, "at least 1")


def _require_source(options: EvaluateConfig) -> None:
    """Check that either a run or a table of predictions is evaluated.

    Raises:
        InputError: both or neither are given, or a flag of one is used with the other.
    """
    if not options.predictions:
        if options.apply.chosen.run is None:
            raise InputError(
                "--run is missing: pass a run directory, or --predictions with --data and --out"
            )
        if options.out is not None:
            raise InputError("--out: is used with --predictions; a run contains its results")
        return
    if options.apply.chosen.run is not None:
        raise InputError("--predictions: is used in place of --run; pass one of them")
    if not options.data or options.out is None:
        raise InputError("--predictions: needs --data DATASET and --out DIR")
    require_output(options.out)
    count = len(options.predictions)
    require("predictions", options.predictions, count <= 2, "a table, or a table and a split file")


def open_network(run: Run, dataset: Dataset, config: ApplyConfig) -> Network:
    """Load the network of a run onto the devices, for this dataset.

    Raises:
        InputError: the channels or the pixel type differ from the training data, or no checkpoint
            matches.
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
    """Predict every site of a dataset and write the table (first process only).

    Raises:
        InputError: run or dataset cannot be used, or --out cannot be written.
    """
    run, dataset, out = open_run(config.apply.chosen.folder), open_dataset(config.data), config.out
    make_folder(out.parent)
    network = open_network(run, dataset, config.apply)
    sites = np.arange(len(dataset))
    predictions = network.apply_to_dataset(dataset, sites, feed=config.apply.feed)
    if is_first_process():
        part = run.parts(dataset.index["site_id"])
        stored = read_calibration(run, network.facts["epoch"])
        sets = predict_sets(stored, dataset.index["site_id"], predictions, run.class_names)
        for message in describe_dataset(run, dataset, stored, sets):
            console.print(message)
        table = run_predictions_table(run, dataset.index, predictions, part, sets)
        write_predictions(out, average_predictions(table) if config.level == "well" else table)
        console.print(f"{len(dataset)} sites predicted: {out}")
    return out


def evaluate(config: EvaluateConfig) -> EvaluationResult | None:
    """Evaluate a run on its test set and write `evaluation/`: predictions, features, scores.

    Labels are checked before anything is computed, and files are written after the evaluation is
    complete. Of several processes, the first evaluates and writes; the others return None.

    Raises:
        InputError: run or dataset cannot be used.
    """
    run = open_run(config.apply.chosen.folder)
    dataset = run.open_data(config.data)
    manifest = run.manifest(dataset.index)
    positions, part = dataset.positions(manifest["site_id"].tolist()), manifest["part"].to_numpy()
    rows = dataset.index.iloc[positions].reset_index(drop=True)
    # Unknown labels are reported before the network runs.
    labels = encode_labels(
        dataset.column(run.label_column).iloc[positions], run.class_names, str(dataset.path)
    )
    rows["label"] = rows[run.label_column].astype(str)
    test = part == TEST
    # Validation sites calibrate the prediction sets.
    predicted = (part != TRAIN) | config.training_sites
    network = open_network(run, dataset, config.apply)
    predictions = network.apply_to_dataset(dataset, positions[predicted], feed=config.apply.feed)
    if not is_first_process():
        return None
    with announce("info: calibrating prediction sets"):
        sets = calibrate_run(
            rows[predicted].reset_index(drop=True),
            labels[predicted],
            part[predicted],
            predictions,
            run.class_names,
            epoch=network.facts["epoch"],
            seed=run.recipe.seed,
        )
    table = run_predictions_table(run, rows[predicted], predictions, part[predicted], sets.columns)
    features = features_table(run, rows[predicted], part[predicted], predictions.features)
    model, fold = match_run_predictions(table, rows[part == TRAIN], rows[test], run.class_names)
    with announce("info: scoring the run and its baselines"):
        split = split_name(run.recipe.split, manifest)
        evaluation = _score(run, model, fold, split, config.replicates)
    skipped = evaluation.skipped
    if sets.unavailable:
        skipped = {**skipped, "prediction sets": sets.unavailable}
    evaluation = dataclasses.replace(evaluation, prediction_sets=sets.summary, skipped=skipped)

    out = make_folder(run.path / EVALUATION)
    write_predictions(out / PREDICTIONS, table)
    write_parquet(out / FEATURES, features)
    write_calibration(out, sets.stored)
    # Replicates are wells of one compound, also if the run predicts mechanisms.
    label_column = COMPOUND if COMPOUND in rows.columns else run.label_column
    with announce("info: measuring the retrieval of replicates"):
        evaluate_retrieval(features[test[predicted]], out, label_column=label_column)
    write_run_evaluation(evaluation, model, fold, run.class_names, out)
    remove_attribution(out)
    # In a job of several processes all but the first have returned, so the network cannot run
    # again.
    if config.attribution and network.placement.processes == 1:
        probabilities = predictions.probabilities[test[predicted]]
        write_attribution(network, dataset, positions[test], labels[test], probabilities, out)
    return evaluation


def evaluate_table(options: EvaluateConfig) -> EvaluationResult:
    """Evaluate a table of predictions, and write `evaluation/` and `config.json` into --out.

    Raises:
        InputError: the table does not match the dataset, or --out contains other files.
    """
    table, *more = options.predictions
    split_file = more[0] if more else None
    out, dataset = Path(options.out or ""), open_dataset(options.data)
    config = read_config(out / CONFIG)
    if out.is_dir() and any(out.iterdir()) and "predictions" not in config:
        raise InputError(f"--out {out}: {describe_path(out)}; choose a new folder")
    matched = match_external_predictions(table, dataset, split_file)
    console.print(f"info: true classes from {matched.label_column}; {matched.note}")
    with announce("info: scoring the predictions and the baselines"):
        evaluation = evaluate_predictions(
            [matched.model],
            matched.folds,
            matched.class_names,
            split=matched.split,
            replicates=options.replicates,
        )
    model, fold = matched.pooled()
    folder = make_folder(out / EVALUATION)
    write_predictions(folder / PREDICTIONS, matched.table())
    write_run_evaluation(evaluation, model, fold, matched.class_names, folder)
    write_json(
        out / CONFIG,
        {
            "predictions": table.name,
            "data": [str(path.absolute()) for path in dataset.paths],
            "facts": {"label_column": matched.label_column, "training sites": matched.note},
        },
    )
    return evaluation


def _score(
    run: Run, model: ModelPredictions, fold: Fold, split: str, replicates: int
) -> EvaluationResult:
    """Score the predictions of a run and all baselines."""
    return evaluate_predictions(
        [model],
        [fold],
        run.class_names,
        split=split,
        seed=run.recipe.seed,
        replicates=replicates,
    )


def describe_linear_baseline(config: EvaluateConfig) -> str:
    """Describe the linear baseline on the run's split, or the command that computes it.

    Returns:
        One sentence; empty without a dataset or a split.

    Raises:
        InputError: the run or its baseline cannot be read.
    """
    run = open_run(config.apply.chosen.folder)
    data, split, out = config.data or run.data, run.path / SPLIT_FILE, run.path / LINEAR
    if not data or not split.is_file():
        return ""
    file = next(out.glob(f"{EVALUATION}/*/scores.json"), None)
    # A baseline on another split is not comparable.
    if file is not None and _checksum(out / SPLIT_FILE) == _checksum(split):
        scores = read_evaluation(file)["site"][MODEL].scores
        words = ", ".join(
            f"{METRICS[name].words} {format_estimate(scores[name])}"
            for name in ("accuracy", HEADLINE)
        )
        return f"info: linear baseline on this split, by site: {words} ({out})"
    options = ["--data", *data, "--split-file", split, "--label-column", run.label_column]
    command = shlex.join(
        ["perturbjax", "classify", "--preset", "linear", *map(str, options), "--out", str(out)]
    )
    return f"Next, compare with the linear baseline on ImageNet features: {command}"


def _checksum(manifest: Path) -> str:
    """Checksum of the train/test assignment, without other columns."""
    return fingerprint(read_parquet(manifest, "run the same `perturbjax classify` again"))

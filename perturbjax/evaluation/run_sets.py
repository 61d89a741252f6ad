"""Prediction sets of a run: calibration in `evaluate`, storage, and use in `predict`.

Calibration sites are the validation groups (`--validation-fraction`). A run without a validation
set uses its test groups. Its coverage is then cross-fitted: the sets of one half of the test wells
are calibrated on the other half. With `--checkpoint best` the validation groups have also chosen
the checkpoint, so that their scores are slightly too good.
"""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.data.splits import TEST, TRAIN, VALIDATION
from perturbjax.dataset import PLATE, Dataset
from perturbjax.evaluation.apply import EVALUATION
from perturbjax.evaluation.calibration import halves_of_wells
from perturbjax.evaluation.prediction_sets import (
    LEVEL,
    MIN_UNLIKE_GROUPS,
    UNLIKE,
    Calibration,
    Scored,
    SetSummary,
    TooFewGroups,
    calibrate,
    cross_fitted_sets,
    format_sets,
    plate_difference,
    site_uniform,
    summarize,
)
from perturbjax.evaluation.training_reference import (
    MANY_UNLIKE,
    TrainingReference,
    fit_reference,
)
from perturbjax.evaluation.wells import well_ids
from perturbjax.training.apply_network import Predictions
from perturbjax.training.run_directory import Run

#: File in the evaluation folder of a run.
CALIBRATION_FILE = "prediction_sets.npz"
#: Columns of a table of predictions.
SET, SIZE, DISTANCE = "prediction_set", "set_size", "training_distance"


@dataclass(frozen=True)
class RunCalibration:
    """Thresholds and training images of one checkpoint of a run.

    Attributes:
        epoch: epoch of the checkpoint.
        calibration: thresholds; None with too few groups.
        reference: training images; None if they were not predicted.
    """

    epoch: int
    calibration: Calibration | None
    reference: TrainingReference | None


@dataclass(frozen=True)
class RunSets:
    """Prediction sets of the sites of a run.

    Attributes:
        stored: calibration for other sites.
        columns: `prediction_set`, `set_size` and `training_distance` of each site.
        summary: coverage on the test sites; None if there are no sets.
        unavailable: reason why there are none; empty if there are.
    """

    stored: RunCalibration
    columns: pd.DataFrame
    summary: SetSummary | None
    unavailable: str


def calibrate_run(
    rows: pd.DataFrame,
    labels: Int[np.ndarray, " n"],
    part: np.ndarray,
    predictions: Predictions,
    class_names: list[str],
    *,
    epoch: int,
    seed: int,
) -> RunSets:
    """Calibrate prediction sets on held-out sites, and measure their coverage on test sites.

    Args:
        rows: rows of the index.
        labels: class of each site.
        part: part of each site in the split.
        predictions: probabilities and features of each site.
        class_names: classes in the order of the probabilities.
        epoch: epoch of the checkpoint.
        seed: seed of the cross-fitting.
    """
    train, test = part == TRAIN, part == TEST
    reference = None
    if train.any():
        reference = fit_reference(predictions.features[train], labels[train], rows[train])
    sites = score_sites(rows, labels, predictions, reference)
    source = VALIDATION if (part == VALIDATION).any() else TEST
    try:
        calibration = calibrate(sites.take(part == source))
        members = calibration.sets_of(sites)
        if source == TEST:
            tested = sites.take(test)
            halves = halves_of_wells(well_ids(rows[test]), seed)
            members[test] = cross_fitted_sets(tested, halves)
    except TooFewGroups as reason:
        stored = RunCalibration(epoch, None, reference)
        return RunSets(stored, pd.DataFrame(index=rows.index), None, str(reason))
    # Plates of calibration and test sites are compared together.
    difference = plate_difference(sites.take(test | (part == source)))
    summary = summarize(sites.take(test), members[test], calibration, source, difference)
    columns = set_columns(members, sites.distance, class_names, reference)
    return RunSets(RunCalibration(epoch, calibration, reference), columns, summary, "")


def score_sites(
    rows: pd.DataFrame,
    labels: Int[np.ndarray, " n"],
    predictions: Predictions,
    reference: TrainingReference | None,
) -> Scored:
    """Combine the predictions of sites with everything that prediction sets depend on."""
    distance = np.zeros(len(rows))
    if reference is not None:
        distance = reference.distance(predictions.features)
    return Scored(
        predictions.probabilities,
        labels,
        site_uniform(rows["site_id"].tolist()),
        distance,
        well_ids(rows),
        pd.factorize(rows[PLATE].astype(str))[0],
    )


def set_columns(
    members: Bool[np.ndarray, "n classes"],
    distance: Float[np.ndarray, " n"],
    class_names: list[str],
    reference: TrainingReference | None,
) -> pd.DataFrame:
    """Return the columns of a table of predictions."""
    columns = {SET: format_sets(members, class_names), SIZE: members.sum(axis=1)}
    if reference is not None:
        columns[DISTANCE] = distance.astype(np.float32)
    return pd.DataFrame(columns)


def write_calibration(folder: Path, stored: RunCalibration) -> None:
    """Write `prediction_sets.npz` into the evaluation folder of a run."""
    arrays: dict[str, np.ndarray] = {"epoch": np.array(stored.epoch)}
    for part in (stored.calibration, stored.reference):
        if part is not None:
            values = {one.name: getattr(part, one.name) for one in dataclasses.fields(part)}
            arrays |= {name: np.asarray(value) for name, value in values.items()}
    with atomic(folder / CALIBRATION_FILE) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_calibration(run: Run, epoch: int) -> RunCalibration | None:
    """Read the calibration of a checkpoint; None if it was not evaluated.

    Raises:
        InputError: the file is damaged.
    """
    file = run.path / EVALUATION / CALIBRATION_FILE
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        if int(arrays["epoch"]) != epoch:
            return None
        calibration = reference = None
        if "threshold" in arrays:
            calibration = Calibration(
                float(arrays["threshold"]),
                float(arrays["unlike_threshold"]),
                int(arrays["groups"]),
                "plate" if str(arrays["unit"]) == "plate" else "well",
            )
        if "center" in arrays:
            reference = TrainingReference(
                arrays["center"],
                arrays["whitening"],
                arrays["means"],
                tuple(map(str, arrays["columns"])),
                arrays["low"],
                arrays["high"],
            )
    # MemoryError: the header of a damaged array can claim any size.
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        MemoryError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(
            f"{file}: is damaged ({error}). Run `perturbjax evaluate --run {run.path}` again."
        ) from error
    return RunCalibration(epoch, calibration, reference)


def predict_sets(
    stored: RunCalibration | None,
    site_ids: pd.Series,
    predictions: Predictions,
    class_names: list[str],
) -> pd.DataFrame:
    """Return the columns of prediction sets; none without a calibration.

    Args:
        stored: calibration of the checkpoint, or None.
        site_ids: name of each site.
        predictions: probabilities and features of each site.
        class_names: classes in the order of the probabilities.
    """
    if stored is None or stored.calibration is None:
        return pd.DataFrame(index=site_ids.index)
    distance = np.zeros(len(site_ids))
    if stored.reference is not None:
        distance = stored.reference.distance(predictions.features)
    uniform = site_uniform(site_ids.tolist())
    members = stored.calibration.sets(predictions.probabilities, uniform, distance)
    return set_columns(members, distance, class_names, stored.reference)


def describe_dataset(
    run: Run, dataset: Dataset, stored: RunCalibration | None, sets: pd.DataFrame
) -> list[str]:
    """Compare a dataset with the training sites of a run, and describe its prediction sets.

    Args:
        run: run that predicts the dataset.
        dataset: predicted dataset.
        stored: calibration of the checkpoint, or None.
        sets: columns of `predict_sets`.

    Returns:
        Messages that start with "info:" or "warning:".
    """
    messages = size_warnings(run, dataset)
    if stored is None:
        messages.append(
            "info: no prediction sets, because this checkpoint was not evaluated: perturbjax "
            f"evaluate --run {run.path}"
        )
        return messages
    if stored.reference is not None:
        messages += [f"warning: {one}" for one in stored.reference.range_warnings(dataset.index)]
    calibration = stored.calibration
    if calibration is None:
        return [
            *messages,
            "info: no prediction sets, because the run has too few calibration wells",
        ]
    empty = float((sets[SIZE] == 0).mean())
    if empty > MANY_UNLIKE:
        messages.append(
            f"warning: {empty:.0%} of the sites are unlike the training images (at most "
            f"{UNLIKE:.0%} expected); do not use their predictions"
        )
    elif calibration.groups < MIN_UNLIKE_GROUPS:
        messages.append(
            f"info: unlike images are not detected, because this needs {MIN_UNLIKE_GROUPS} "
            f"calibration {calibration.unit}s"
        )
    messages.append(
        f"info: prediction sets ({LEVEL:.0%}) contain {sets[SIZE].mean():.2f} of "
        f"{len(run.class_names)} classes on average"
    )
    return messages


def size_warnings(run: Run, dataset: Dataset) -> list[str]:
    """Warn if the sites have another size in pixels than the training sites."""
    # Unknown for imported networks; networks on cells take sites of any size.
    if (trained := run.facts.get("image_size")) is None:
        return []
    if (size := list(dataset.image_size)) == list(trained):
        return []
    crop = run.recipe.augment.crop
    return [
        f"warning: sites of {size[0]} × {size[1]} pixels, but the run was trained on "
        f"{trained[0]} × {trained[1]}; all are resized to {crop} × {crop}, so cells appear "
        f"{trained[0] / size[0]:.2g} times as large"
    ]

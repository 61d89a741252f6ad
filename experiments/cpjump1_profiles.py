"""Predict the compound of each well from CellProfiler profiles of four CPJUMP1 plates.

    python -m experiments.cpjump1_profiles --data DIR/cpjump1_profiles --out runs/cpjump1

Each plate is the test plate once. Preparation, model and its setting are chosen by accuracy in
leave-one-plate-out cross-validation over the three training plates. All plates share one layout, so
that the well position determines the compound. Two controls measure the influence of position:

- classify the position of DMSO wells (chance 1/64);
- for compounds in two wells, train on the same well or on the other well of the training plates,
  with equal numbers of rows.

Cost: 5 minutes (one core). An interrupted run is resumed. Result over the four test plates (1,536
wells, 303 classes): accuracy 0.552 [0.53, 0.58], balanced accuracy 0.517 [0.50, 0.54]. Position of
DMSO wells: 0.285 [0.23, 0.34]. Compounds in two wells: 0.750 [0.62, 0.87] from the same well, 0.562
[0.38, 0.74] from the other. All scores: docs/results.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.cli import parse_options
from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import atomic, make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.core.options import require_sound
from perturbjax.data import splits
from perturbjax.dataset import PLATE, WELL
from perturbjax.evaluation import figures
from perturbjax.evaluation import score_tables as views
from perturbjax.evaluation.bootstrap import Estimate, resample
from perturbjax.evaluation.evaluate import Fold, ModelPredictions, evaluate_predictions
from perturbjax.evaluation.predictions import (
    drop_probabilities,
    labels_and_probabilities,
    predicted_class_names,
    read_predictions,
)
from perturbjax.evaluation.scores import count
from perturbjax.profiles.classify import classify
from perturbjax.profiles.profile_options import ClassifyConfig, Preparation, ProfileConfig
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.profile_table import Profiles

LABEL = "Metadata_pert_iname"
CHOSEN = "chosen by inner cross-validation"
ROBUST = Preparation(normalize="robustize", outliers="arcsinh")
#: Models without tuning. They are reported, but not among the choices.
UNTUNED = ("standardized, logistic", "standardized, lda")
#: Preparation and model of each candidate.
CANDIDATES: dict[str, tuple[Preparation, str]] = {
    UNTUNED[0]: (Preparation(), "logistic"),
    UNTUNED[1]: (Preparation(), "lda"),
    "standardized, plda": (Preparation(), "plda"),
    "robust, plda": (ROBUST, "plda"),
    "robust, decorrelated, plda": (dataclasses.replace(ROBUST, select=True), "plda"),
    "robust, sphered to controls, plda": (dataclasses.replace(ROBUST, sphere="negcon"), "plda"),
}


@dataclass(frozen=True)
class Config:
    """Classify the wells of CPJUMP1 profiles, leaving each plate out in turn."""

    data: Path
    """Folder of `*.csv.gz` profiles, one file per plate."""
    out: Path
    """Output folder. Finished candidates are not fitted again."""

    def __post_init__(self) -> None:
        require_sound(self)


def main(options: Config) -> None:
    """Evaluate every candidate and the chosen one on every plate, then the position controls."""
    files = tuple(sorted(options.data.glob("*.csv.gz")))
    if len(files) < 4:
        raise InputError(
            f"--data {options.data}: has {len(files)} profile files (*.csv.gz), needs at least 4"
        )
    make_folder(options.out)
    plates = sorted(read_profiles(files).column(PLATE).unique())
    folds, predictions, choices = zip(
        *(run_plate(files, plate, options.out / plate) for plate in plates), strict=True
    )
    class_names = read_json(options.out / plates[0] / "robust_plda" / "labels.json")
    models = [_join_folds(name, predictions) for name in predictions[0]]
    evaluation = evaluate_predictions(models, folds, class_names, split="plate")
    views.print_evaluation(evaluation)
    with atomic(options.out / "table.csv") as temporary:
        views.ranking_table(evaluation).to_csv(temporary, index=False)
    title = f"CPJUMP1: leave one of {len(plates)} plates out"
    figures.plot_ranking(evaluation, options.out / "scores.png", title)
    write_json(options.out / "choices.json", dict(zip(plates, choices, strict=True)))
    for plate, choice in zip(plates, choices, strict=True):
        setting = f"{choice['candidate']}, {choice['setting']}"
        console.print(f"info: {plate}: {setting}, inner accuracy {choice['score']:.3f}")
    position = pd.DataFrame(
        [*classify_positions(files, options.out), *compare_wells(files, options.out)]
    )
    with atomic(options.out / "position.csv") as temporary:
        position.to_csv(temporary, index=False)
    print(position.to_string(index=False))


#: Probabilities of the training and the test rows of one fold.
Parts = dict[str, np.ndarray]


def _join_folds(name: str, predictions: tuple[dict[str, Parts], ...]) -> ModelPredictions:
    """Collect the probabilities of one candidate for all test plates."""
    parts = [by_name[name] for by_name in predictions]
    return ModelPredictions(
        name, *(tuple(one[part] for one in parts) for part in (splits.TEST, splits.TRAIN))
    )


def run_plate(
    files: tuple[Path, ...], plate: str, out: Path
) -> tuple[Fold, dict[str, Parts], dict]:
    """Fit all candidates with one test plate; choose one by inner cross-validation."""
    predictions: dict[str, Parts] = {}
    inner: dict[str, tuple[float, str]] = {}
    for candidate, (preparation, model) in CANDIDATES.items():
        folder = out / candidate.replace(", ", "_").replace(" ", "_")
        if not (folder / "config.json").exists():  # written last, so the results are complete
            classify(
                ClassifyConfig(
                    profiles=ProfileConfig(files, label_column=LABEL),
                    out=folder,
                    models=model,
                    hold_out=plate,
                    preparation=preparation,
                    tune=candidate not in UNTUNED,
                    tune_by="accuracy",
                    replicates=200,
                )
            )
        row = pd.read_csv(folder / "table.csv").set_index(["level", "model"]).loc[("site", model)]
        table = read_predictions(folder / "predictions" / f"{model}.parquet")
        tables = {part: rows for part, rows in table.groupby("part")}
        predictions[candidate] = {
            part: labels_and_probabilities(rows, predicted_class_names(rows))[1]
            for part, rows in tables.items()
        }
        if candidate not in UNTUNED:
            inner[candidate] = float(row["inner_score"]), row["setting"]
    best = max(inner, key=lambda name: inner[name][0])
    predictions[CHOSEN] = predictions[best]
    index = {part: _with_negcon(rows) for part, rows in tables.items()}
    choice = {"candidate": best, "score": inner[best][0], "setting": inner[best][1]}
    return Fold(plate, index[splits.TRAIN], index[splits.TEST]), predictions, choice


def _with_negcon(predictions: pd.DataFrame) -> pd.DataFrame:
    negcon = predictions["Metadata_control_type"] == "negcon"
    return drop_probabilities(predictions).assign(negcon=negcon).reset_index(drop=True)


def classify_positions(files: tuple[Path, ...], out: Path) -> list[dict]:
    """Classify the position of the DMSO wells of each test plate."""
    profiles = read_profiles(files)
    controls = profiles.take((profiles.column("Metadata_control_type") == "negcon").to_numpy())
    path = out / "controls.parquet"
    with atomic(path) as temporary:
        controls.frame().to_parquet(temporary, index=False)
    evaluation = classify(
        ClassifyConfig(
            profiles=ProfileConfig((path,), label_column=WELL),
            out=out / "position_controls",
            models="plda",
            hold_out="each",
            preparation=ROBUST,
        )
    )
    return [
        _as_row("position of DMSO wells", name, evaluation["site"][name].scores["accuracy"])
        for name in ("plda", "chance")
    ]


def compare_wells(files: tuple[Path, ...], out: Path) -> list[dict]:
    """Classify compounds in two wells, trained on the same or on the other well."""
    profiles = read_profiles(files)
    rows = []
    for source in ("same", "other"):
        tables = []
        for plate in sorted(profiles.column(PLATE).unique()):
            for half in (0, 1):
                name = f"{plate}_{source}_{half}"
                path = out / "position_compounds" / f"{name}.split.parquet"
                manifest, ids = _one_well_manifest(profiles, plate, half, same=source == "same")
                splits.write_split(manifest, path)
                folder = out / "position_compounds" / name
                classify(
                    ClassifyConfig(
                        profiles=ProfileConfig(files, label_column=LABEL),
                        out=folder,
                        models="plda",
                        split=SplitConfig(split_file=str(path)),
                        preparation=ROBUST,
                        replicates=100,
                    )
                )
                predictions = read_predictions(folder / "predictions" / "plda.parquet")
                tables.append(predictions[predictions["site_id"].isin(ids)])
        rows.append(
            _as_row("compounds in two wells", f"trained on the {source} well", _pooled(tables))
        )
    return rows


def _one_well_manifest(
    profiles: Profiles, plate: str, half: int, *, same: bool
) -> tuple[pd.DataFrame, pd.Series]:
    """Make the split for one well of each compound in two wells.

    The test set is the whole plate, because all wells of a plate are needed to scale it.

    Args:
        profiles: all plates.
        plate: test plate.
        half: number of the well to classify, 0 or 1.
        same: train these compounds on the same well, otherwise on the other well.

    Returns:
        The split, and the ids of the wells to classify.
    """
    wells = profiles.metadata.groupby(LABEL)[WELL].agg(lambda column: sorted(column.unique()))
    pairs = {label: pair for label, pair in wells.items() if len(pair) == 2}
    label, test = profiles.column(LABEL), profiles.column(PLATE) == plate
    twice = label.isin(pairs)
    chosen = profiles.column(WELL) == [pairs[one][half] if one in pairs else "" for one in label]
    train = ~test & (~twice | (chosen if same else ~chosen))
    part = np.where(test, splits.TEST, splits.TRAIN)
    ids = profiles.metadata["site_id"]
    manifest = pd.DataFrame({"site_id": ids, "group": profiles.column(PLATE), "part": part})
    return manifest[train | test].reset_index(drop=True), ids[test & twice & chosen]


def _pooled(tables: list[pd.DataFrame]) -> Estimate:
    table = pd.concat(tables, ignore_index=True)
    labels, probabilities = labels_and_probabilities(table, predicted_class_names(table))
    # Wells of one compound are resampled together, because their errors are correlated.
    compounds = pd.factorize(table["label"])[0]
    return resample({"plda": count(labels, probabilities, compounds)}).scores("plda")["accuracy"]


def _as_row(control: str, model: str, estimate: Estimate) -> dict:
    numbers = {"accuracy": estimate.value, "low": estimate.low, "high": estimate.high}
    rounded = {name: round(number, 3) for name, number in numbers.items()}
    return {"control": control, "model": model, **rounded}


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__)))

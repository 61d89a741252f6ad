"""Which compound was this well given? Classical models on the CellProfiler profiles of four CPJUMP1 plates.

    python -m experiments.cpjump1_profiles --data ../shared/data/cpjump1_profiles --out runs/cpjump1

Every plate is held out in turn and the other three train. For each held-out plate the preparation, the model and its
setting are those with the best accuracy in leave-one-plate-out over the three training plates. Then two questions about
position, since all four plates carry the same layout and a plate map learned by heart answers every well:

- can the well be told from negative controls alone? (label: the well; rows: DMSO wells; chance 1/64)
- of compounds that stand in two wells: is one well recognised from the OTHER well on the training plates as often as
  from the same well, with as many training rows?

Cost: about 5 minutes of one core that is free; run again, it goes on where it was stopped.

Measured over the four held-out plates (1,536 wells, 303 classes; 95 % intervals over wells). Inner cross-validation
chose robust scaling and PLDA, once with correlated features dropped: accuracy 0.552 [0.53, 0.58], of wells that are not
DMSO 0.530 [0.50, 0.56], balanced accuracy 0.517 [0.50, 0.54], macro-F1 0.525, top 5 0.766 [0.75, 0.79]. LDA on
standardized features: 0.498, 0.438, 0.416, 0.436, 0.715. Logistic regression on standardized features: 0.395
[0.37, 0.42], 0.279 [0.25, 0.30], 0.256, 0.266, 0.669. Always DMSO: 0.167. Position alone: 1.000.

A DMSO well is told from the other 63 in 0.285 [0.23, 0.34] of cases (chance 0.016): profiles carry their position. Of
compounds in two wells 0.562 [0.38, 0.74] are recognised from the other well, 0.750 [0.62, 0.87] from the same well: so
most of the score is the compound's, and some of it the well's.
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
#: Models as they are: not tuned, and not among those that compete.
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
    """Folder of `*.csv.gz` profiles, one file a plate."""
    out: Path
    """Folder to write to. Candidates that are finished there are not fitted again."""

    def __post_init__(self) -> None:
        require_sound(self)


def main(options: Config) -> None:
    """Run every candidate on every held-out plate, choose, judge, and ask about position."""
    files = tuple(sorted(options.data.glob("*.csv.gz")))
    if len(files) < 4:
        raise InputError(
            f"{options.data}: {len(files)} profile files (*.csv.gz); this needs at least four plates"
        )
    make_folder(options.out)
    plates = sorted(read_profiles(files).column(PLATE).unique())
    folds, answers, choices = zip(
        *(run_plate(files, plate, options.out / plate) for plate in plates), strict=True
    )
    class_names = read_json(options.out / plates[0] / "robust_plda" / "labels.json")
    model_names = [_over_folds(name, answers) for name in answers[0]]
    evaluation = evaluate_predictions(model_names, folds, class_names, split="plate")
    views.print_evaluation(evaluation)
    with atomic(options.out / "table.csv") as temporary:
        views.ranking_table(evaluation).to_csv(temporary, index=False)
    title = f"CPJUMP1: leave one of {len(plates)} plates out"
    figures.plot_ranking(evaluation, options.out / "scores.png", title)
    write_json(options.out / "choices.json", dict(zip(plates, choices, strict=True)))
    for plate, choice in zip(plates, choices, strict=True):
        console.print(
            f"{plate}: {choice['candidate']}, {choice['setting']}, inner accuracy {choice['score']:.3f}"
        )
    position = pd.DataFrame(
        [*well_from_controls(files, options.out), *other_well(files, options.out)]
    )
    with atomic(options.out / "position.csv") as temporary:
        position.to_csv(temporary, index=False)
    print(position.to_string(index=False))


#: Probabilities of one fold's training and test rows.
Sides = dict[str, np.ndarray]


def _over_folds(name: str, answers: tuple[dict[str, Sides], ...]) -> ModelPredictions:
    """A candidate's probabilities on every plate that was held out in turn."""
    sides = [of_plate[name] for of_plate in answers]
    return ModelPredictions(
        name, *(tuple(side[part] for side in sides) for part in (splits.TEST, splits.TRAIN))
    )


def run_plate(
    files: tuple[Path, ...], plate: str, out: Path
) -> tuple[Fold, dict[str, Sides], dict]:
    """All candidates with one plate held out, and the one that the other plates choose."""
    answers: dict[str, Sides] = {}
    inner: dict[str, tuple[float, str]] = {}
    for candidate, (preparation, model) in CANDIDATES.items():
        folder = out / candidate.replace(", ", "_").replace(" ", "_")
        if not (folder / "config.json").exists():  # written last: what is there is whole
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
        sides = {part: rows for part, rows in table.groupby("part")}
        answers[candidate] = {
            part: labels_and_probabilities(rows, predicted_class_names(rows))[1]
            for part, rows in sides.items()
        }
        if candidate not in UNTUNED:
            inner[candidate] = float(row["inner_score"]), row["setting"]
    best = max(inner, key=lambda name: inner[name][0])
    answers[CHOSEN] = answers[best]
    index = {part: _with_negcon(rows_of) for part, rows_of in sides.items()}
    choice = {"candidate": best, "score": inner[best][0], "setting": inner[best][1]}
    return Fold(plate, index[splits.TRAIN], index[splits.TEST]), answers, choice


def _with_negcon(predictions: pd.DataFrame) -> pd.DataFrame:
    negcon = predictions["Metadata_control_type"] == "negcon"
    return drop_probabilities(predictions).assign(negcon=negcon).reset_index(drop=True)


def well_from_controls(files: tuple[Path, ...], out: Path) -> list[dict]:
    """How often a DMSO well's place is recognised on a plate that was not there: pure position."""
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
    question = "which of the DMSO wells is it?"
    return [
        _answer(question, name, evaluation["site"][name].scores["accuracy"])
        for name in ("plda", "chance")
    ]


def other_well(files: tuple[Path, ...], out: Path) -> list[dict]:
    """Compounds in two wells: recognised from the same well of other plates, and from the other well of those."""
    profiles = read_profiles(files)
    found = []
    for source in ("same", "other"):
        tables = []
        for plate in sorted(profiles.column(PLATE).unique()):
            for half in (0, 1):
                name = f"{plate}_{source}_{half}"
                path = out / "position_compounds" / f"{name}.split.parquet"
                manifest, asked = _one_well_manifest(profiles, plate, half, same=source == "same")
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
                tables.append(predictions[predictions["site_id"].isin(asked)])
        found.append(
            _answer("compounds in two wells", f"trained on the {source} well", _pooled(tables))
        )
    return found


def _one_well_manifest(
    profiles: Profiles, plate: str, half: int, *, same: bool
) -> tuple[pd.DataFrame, pd.Series]:
    """`plate` judges, whole, since it is scaled by all its wells; and the ids of the wells that are asked about.

    Asked about is one well of each compound that has two. Of these compounds the same, or the other well trains.
    """
    wells = profiles.metadata.groupby(LABEL)[WELL].agg(lambda column: sorted(column.unique()))
    pairs = {label: pair for label, pair in wells.items() if len(pair) == 2}
    label, well, test = (
        profiles.column(LABEL),
        profiles.column(WELL),
        profiles.column(PLATE) == plate,
    )
    twice, at = (
        label.isin(pairs),
        well == [pairs[one][half] if one in pairs else "" for one in label],
    )
    train = ~test & (~twice | (at if same else ~at))
    part = np.where(test, splits.TEST, splits.TRAIN)
    ids = profiles.metadata["site_id"]
    manifest = pd.DataFrame({"site_id": ids, "group": profiles.column(PLATE), "part": part})
    return manifest[train | test].reset_index(drop=True), ids[test & twice & at]


def _pooled(tables: list[pd.DataFrame]) -> Estimate:
    together = pd.concat(tables, ignore_index=True)
    labels, probabilities = labels_and_probabilities(together, predicted_class_names(together))
    compounds = pd.factorize(together["label"])[
        0
    ]  # a compound's wells on four plates are resampled together
    return resample({"plda": count(labels, probabilities, compounds)}).scores("plda")["accuracy"]


def _answer(question: str, subject: str, found: Estimate) -> dict:
    value, low, high = (round(number, 3) for number in (found.value, found.low, found.high))
    return {"question": question, "subject": subject, "accuracy": value, "low": low, "high": high}


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__)))

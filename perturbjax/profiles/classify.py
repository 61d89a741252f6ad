"""Classical classifiers on profiles, dealt and judged as the networks are."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, write_csv, write_json
from perturbjax.core.messages import console
from perturbjax.core.progress import track
from perturbjax.data import splits
from perturbjax.data.exclusion import apply_exclusions, read_rules
from perturbjax.data.splits import TEST, TRAIN
from perturbjax.dataset import PLATE
from perturbjax.evaluation import figures
from perturbjax.evaluation import score_tables as views
from perturbjax.evaluation.evaluate import Fold, ModelPredictions, evaluate_predictions
from perturbjax.evaluation.evaluation_result import EvaluationResult
from perturbjax.evaluation.predictions import predictions_table, write_predictions
from perturbjax.profiles.dataset_features import read_source
from perturbjax.profiles.profile_options import EACH, ClassifyConfig, Preparation, ProfileConfig
from perturbjax.profiles.profile_table import Profiles, aggregate_to_wells, read_profiles

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

#: Greatest number of parts in which tuning deals the training groups.
_TUNING_FOLDS = 5


def classify(config: ClassifyConfig) -> EvaluationResult:
    """Fit every model on the training rows, predict both parts, judge, and write tables, predictions and a figure.

    All that is fitted (gaps, scales, selection, sphering, components, the model, its tuning) sees training rows only;
    see `normalize.Scaler` for plates that are new. Classes that occur in the test part only are judged, and never
    right.

    Writes `table.csv` (see `views.ranking_table`), with `seconds` (fitting, all folds), and where tuned `setting` (one a
    fold) and `inner_score` (mean over folds of what tuning maximised, on training rows alone).

    Raises:
        InputError: a file, column, plate or flag cannot be used; nothing can be learned; or no model could be fitted.
    """
    from perturbjax.profiles.classifiers import parse_models

    names = parse_models(config.models)
    profiles, negcon, label = load_profiles(config.profiles)
    labels = profiles.column(label)
    manifests = _manifests(config, profiles, label)
    class_names = sorted(labels.unique())
    index = profiles.metadata.assign(label=labels.to_numpy(), negcon=negcon)
    if profiles.measured is not None:  # for the baselines that look at cells and light
        index = pd.concat([index, profiles.measured], axis=1)
    make_folder(config.out)

    jobs = [(fold, manifest, name) for fold, manifest in manifests.items() for name in names]
    fitted: dict[str, dict[str, _Fitted]] = {fold: {} for fold in manifests}
    failed: dict[str, str] = {}
    task = _Task(
        config,
        profiles,
        negcon,
        labels.map({c: i for i, c in enumerate(class_names)}).to_numpy(int),
    )
    for fold, manifest, name in track(jobs, total=len(jobs), label="classify", unit="fits"):
        if name in failed:
            continue
        try:
            fitted[fold][name] = task.fit(name, manifest, len(class_names))
        except (ValueError, np.linalg.LinAlgError) as error:
            failed[name] = " ".join(str(error).split())
            console.print(f"{name}: left out ({failed[name]})")
    if len(failed) == len(names):
        raise InputError(
            f"--models {config.models}: none could be fitted ({next(iter(failed.values()))})"
        )
    for note in dict.fromkeys((*profiles.notes, *task.notes)):
        console.print(f"features: {note}")

    kept = [name for name in names if name not in failed]
    folds = [_fold(fold, manifest, index) for fold, manifest in manifests.items()]
    model_names = [_subject(name, [of_fold[name] for of_fold in fitted.values()]) for name in kept]
    _say_unknown_classes(folds)
    evaluation = evaluate_predictions(
        model_names,
        folds,
        class_names,
        split=policy_of(config),
        seed=config.seed,
        replicates=config.replicates,
    )
    table = views.ranking_table(evaluation).merge(_costs(fitted, kept), on="model", how="left")
    _write(config, evaluation, model_names, folds, class_names, label)
    for fold, manifest in manifests.items():
        splits.write_split(
            manifest, config.out / ("split.parquet" if len(folds) == 1 else f"split_{fold}.parquet")
        )
    write_csv(config.out / "table.csv", table)
    write_json(config.out / "labels.json", class_names)
    write_json(config.out / "config.json", _plain(dataclasses.asdict(config)))
    return evaluation


def load_profiles(config: ProfileConfig) -> tuple[Profiles, np.ndarray, str]:
    """Profiles with a label, which of them are negative controls (n,) bool, and the label's column.

    Raises:
        InputError: as `read_profiles`; the label column is missing or empty; `negcon` is not COLUMN=VALUE.
    """
    profiles = read_source(config.source) if config.source.data else read_profiles(config.features)
    if not (label := config.label_column or profiles.label_column):
        raise InputError(
            "--label-column: is required, since --data was built for no label, or for several"
        )
    if config.aggregate != "none":
        profiles = aggregate_to_wells(profiles, config.aggregate)
    empty = (profiles.column(label) == "").to_numpy()
    if empty.all():
        raise InputError(f"{config.where}: column {label} is empty; choose another --label-column")
    if empty.any():
        console.print(f"features: {empty.sum()} rows without {label} left out")
        profiles = profiles.take(~empty)
    column, _, value = config.negcon.partition("=")
    if column not in profiles.metadata.columns:
        return profiles, np.zeros(len(profiles), dtype=bool), label
    return profiles, (profiles.metadata[column] == value).to_numpy(), label


def _manifests(config: ClassifyConfig, profiles: Profiles, label: str) -> dict[str, pd.DataFrame]:
    """Who trains and who judges, by the name of the fold."""
    split = config.split
    if config.hold_out:
        plates = sorted(profiles.column(PLATE).unique())
        chosen = plates if config.hold_out == EACH else [config.hold_out]
        if unknown := [plate for plate in chosen if plate not in plates]:
            raise InputError(
                f"--hold-out {unknown[0]}: no such plate; choose {EACH} or one of {', '.join(plates)}"
            )
        kept, said = apply_exclusions(profiles.metadata, read_rules(split.exclude), label)
        out = profiles.metadata["site_id"][~kept]
        found = {plate: splits.remove_sites(_hold_out(profiles, plate), out) for plate in chosen}
        found[chosen[0]].attrs["excluded"] = said
    elif config.all_folds:
        every = [dataclasses.replace(split, fold=fold) for fold in range(split.folds)]
        found = {
            f"fold_{one.fold}": splits.create_manifest(
                profiles.metadata, one, label=label, seed=config.seed
            )
            for one in every
        }
    else:
        one = splits.create_manifest(profiles.metadata, split, label=label, seed=config.seed)
        found = {"split_file" if split.split_file else f"fold_{split.fold}": one}
    for sentence in next(iter(found.values())).attrs["excluded"]:
        console.print(sentence)
    for fold, manifest in found.items():
        _require_two_classes(fold, manifest, profiles, label)
    if not any(
        _classes(one, profiles, label, TRAIN) & _classes(one, profiles, label, TEST)
        for one in found.values()
    ):
        raise InputError(
            f"{config.profiles.features[0]}: no class of column {label} is both in training and judged, so nothing can "
            "be learned; choose another --label-column or split"
        )
    return found


def _hold_out(profiles: Profiles, plate: str) -> pd.DataFrame:
    groups = profiles.column(PLATE)
    part = np.where(groups == plate, TEST, TRAIN)
    manifest = pd.DataFrame(
        {"site_id": profiles.metadata["site_id"], "group": groups, "part": part}
    )
    splits.require_no_overlap(manifest, f"--hold-out {plate}")
    return manifest


def _require_two_classes(fold: str, manifest: pd.DataFrame, profiles: Profiles, label: str) -> None:
    classes = _classes(manifest, profiles, label, TRAIN)
    if len(classes) < 2:
        raise InputError(
            f"{fold}: column {label} has one class ({classes.pop()}) in training; a classifier needs two: choose "
            "another --label-column or split"
        )


def _classes(manifest: pd.DataFrame, profiles: Profiles, label: str, part: str) -> set[str]:
    rows = profiles.metadata["site_id"].isin(manifest.loc[manifest["part"] == part, "site_id"])
    return set(profiles.column(label)[rows])


@dataclasses.dataclass
class _Fitted:
    train: np.ndarray
    test: np.ndarray
    seconds: float
    setting: str
    inner_score: float


class _Prepared(NamedTuple):
    """Of one fold: rows and features of each part, and the inner parts that tuning judges by."""

    rows: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    inner: list[tuple[np.ndarray, ...]]


class _Task:
    """Fits models on the training rows of a manifest; rows are prepared once a fold."""

    def __init__(
        self, config: ClassifyConfig, profiles: Profiles, negcon: np.ndarray, labels: np.ndarray
    ):
        from perturbjax.profiles.preparation import as_table

        self.config, self.labels = config, labels
        self.table = as_table(profiles, negcon)
        self.position = pd.Series(np.arange(len(profiles)), index=profiles.metadata["site_id"])
        self.notes: list[str] = []
        self._fold: tuple[pd.DataFrame, _Prepared] | None = None

    def fit(self, name: str, manifest: pd.DataFrame, classes: int) -> _Fitted:
        """Probabilities of the training and of the test rows, in the manifest's order."""
        from perturbjax.profiles.classifiers import CLASSIFIERS, probabilities

        rows, arrays, inner = self._prepare(manifest)
        labels = self.labels[rows[TRAIN]]
        start = time.monotonic()
        recipe = CLASSIFIERS[name]
        model = recipe.make(len(labels), len(np.unique(labels)), self.config.seed)
        chosen, score = (
            _tune(model, recipe.grid, inner, self.config.tune_by)
            if inner and recipe.grid
            else ({}, float("nan"))
        )
        model.set_params(**chosen)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(arrays[TRAIN], labels)
        self.notes += [
            f"{name}: {str(w.message).splitlines()[0]}"
            for w in caught
            if "onverge" in str(w.message)
        ]
        setting = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        train, test = (probabilities(model, arrays[part], classes) for part in (TRAIN, TEST))
        return _Fitted(train, test, time.monotonic() - start, setting, score)

    def _prepare(self, manifest: pd.DataFrame) -> _Prepared:
        if self._fold is None or self._fold[0] is not manifest:
            rows = {
                part: self.position[manifest.loc[manifest["part"] == part, "site_id"]].to_numpy()
                for part in (TRAIN, TEST)
            }
            groups = manifest.loc[manifest["part"] == TRAIN, "group"].to_numpy()
            steps, train = self._prepared(rows[TRAIN], groups)
            self.notes += notes_of(steps)
            arrays = {TRAIN: train, TEST: steps.transform(self.table.iloc[rows[TEST]])}
            inner = list(self._inner(rows[TRAIN], groups)) if self.config.tune else []
            self._fold = (manifest, _Prepared(rows, arrays, inner))
        return self._fold[1]

    def _inner(self, rows: np.ndarray, groups: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """(features, labels, judged features, judged labels) of each part of the training rows."""
        from sklearn.model_selection import GroupKFold

        parts = min(_TUNING_FOLDS, len(np.unique(groups)))
        if parts < 2:
            raise InputError(
                "--tune: the training rows are one group; tuning needs two: choose another --split"
            )
        for fit, held in GroupKFold(parts).split(rows, groups=groups):
            steps, x = self._prepared(rows[fit], groups[fit])
            z = steps.transform(self.table.iloc[rows[held]])
            yield x, self.labels[rows[fit]], z, self.labels[rows[held]]

    def _prepared(self, rows: np.ndarray, groups: np.ndarray) -> tuple[Pipeline, np.ndarray]:
        return prepared(
            self.table.iloc[rows],
            self.config.preparation,
            self.config.seed,
            self.labels[rows],
            groups,
        )


def prepared(
    table: pd.DataFrame, config: Preparation, seed: int, labels: np.ndarray, groups: np.ndarray
) -> tuple[Pipeline, np.ndarray]:
    """The preparation fitted on these rows, and their features (n, d).

    `labels` are class numbers and `groups` what the split keeps whole: `--relative auto` asks for them.
    """
    from perturbjax.profiles.control_relative import GROUP
    from perturbjax.profiles.preparation import preparation

    steps = preparation(config, seed=seed)
    return steps, steps.fit_transform(table.assign(**{GROUP: groups}), labels)


def notes_of(steps: Pipeline) -> list[str]:
    """What the steps of a fitted preparation did and chose, one sentence each."""
    return [
        note
        for step in steps.named_steps.values()
        if hasattr(step, "notes")
        for note in step.notes()
    ]


def _tune(
    model: Any, grid: tuple[dict[str, Any], ...], inner: list, criterion: str
) -> tuple[dict[str, Any], float]:
    """The setting with the best mean score over the inner parts (the first of equals), and that score."""
    from sklearn.base import clone
    from sklearn.metrics import accuracy_score, recall_score

    def one(
        setting: dict[str, Any], x: np.ndarray, y: np.ndarray, z: np.ndarray, truth: np.ndarray
    ) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predicted = clone(model).set_params(**setting).fit(x, y).predict(z)
        if criterion == "accuracy":
            return accuracy_score(truth, predicted)
        return recall_score(
            truth, predicted, labels=np.unique(truth), average="macro", zero_division=0
        )

    scores = [float(np.mean([one(setting, *part) for part in inner])) for setting in grid]
    best = int(np.argmax(scores))
    return grid[best], scores[best]


def _fold(name: str, manifest: pd.DataFrame, index: pd.DataFrame) -> Fold:
    by_id = index.set_index("site_id", drop=False)
    sides = [by_id.loc[manifest.loc[manifest["part"] == part, "site_id"]] for part in (TRAIN, TEST)]
    return Fold(name, *(side.reset_index(drop=True) for side in sides))


def _subject(name: str, of_folds: list[_Fitted]) -> ModelPredictions:
    return ModelPredictions(
        name, tuple(one.test for one in of_folds), tuple(one.train for one in of_folds)
    )


def _say_unknown_classes(folds: list[Fold]) -> None:
    for fold in folds:
        unknown = fold.test.loc[~fold.test["label"].isin(fold.train["label"]), "label"]
        if len(unknown):
            console.print(
                f"{fold.name}: {unknown.nunique()} classes stand in the test part only (first: {unknown.iloc[0]}); "
                f"their {len(unknown)} rows are judged and never right"
            )


def _costs(fitted: dict[str, dict[str, _Fitted]], names: list[str]) -> pd.DataFrame:
    """Seconds, setting and inner score of each model, over the folds."""
    rows = []
    for name in names:
        every = [of_fold[name] for of_fold in fitted.values()]
        row = {"model": name, "seconds": sum(one.seconds for one in every)}
        row["setting"] = "; ".join(one.setting for one in every if one.setting)
        row["inner_score"] = float(np.mean([one.inner_score for one in every]))
        rows.append(row)
    return pd.DataFrame(rows)


def _write(
    config: ClassifyConfig,
    evaluation: EvaluationResult,
    model_names: list[ModelPredictions],
    folds: list[Fold],
    class_names: list[str],
    label: str,
) -> None:
    """Each subject's predictions (of a single fold those of its training part too) and scores, and the figure."""
    out, single = Path(config.out), len(folds) == 1
    for subject in model_names:
        tables = [
            predictions_table(index, values, class_names, part=part, label=index["label"])
            for at, fold in enumerate(folds)
            for part, index, values in (
                *([(TRAIN, fold.train, subject.train[at])] if single else []),
                (TEST, fold.test, subject.test[at]),
            )
        ]
        write_predictions(
            out / "predictions" / f"{subject.name}.parquet", pd.concat(tables, ignore_index=True)
        )
        if single:
            alone = evaluation.for_model(subject.name)
            views.write_run_evaluation(
                alone, subject, folds[0], class_names, out / "evaluation" / subject.name
            )
    what = f"{len(class_names)} classes, {evaluation.n.site} rows judged"
    title = f"{label}, split by {evaluation.split_name}: {what}"
    figures.plot_ranking(evaluation, out / "scores.png", title)


def policy_of(config: ClassifyConfig) -> str:
    """How rows were dealt: a policy of `splits`, or the name of a split file."""
    if config.hold_out:
        return "plate"
    return config.split.split_file or config.split.split


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value

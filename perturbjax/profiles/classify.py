"""Fit classical classifiers to profiles, and evaluate them like networks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from perturbjax.evaluation import figures, score_tables
from perturbjax.evaluation.evaluate import Fold, ModelPredictions, evaluate_predictions
from perturbjax.evaluation.evaluation_result import EvaluationResult
from perturbjax.evaluation.predictions import predictions_table, write_predictions
from perturbjax.profiles.classifiers import CLASSIFIERS, parse_models, probabilities
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import EACH, ClassifyConfig
from perturbjax.profiles.profile_table import Profiles

#: Maximum number of inner folds of tuning.
_TUNING_FOLDS = 5


def classify(config: ClassifyConfig) -> EvaluationResult:
    """Fit classifiers on training rows, evaluate them on test rows, and write the results.

    Everything that is fitted (medians, scales, feature selection, sphering, components, classifier,
    tuning) uses training rows only; see `preparation.Scaler` for new plates. Test rows whose class
    has no training row count as wrong.

    Writes to `config.out`: `table.csv` (see `score_tables.ranking_table`, plus `seconds` of fitting
    over all folds, `setting` chosen by tuning per fold and its mean `inner_score`), `scores.png`,
    predictions and the split.

    Returns:
        Scores of all classifiers and baselines.

    Raises:
        InputError: A file, column, plate or flag cannot be used, or no classifier could be fitted.
    """
    names = parse_models(config.models)
    profiles, negcon, label = load_profiles(config.profiles)
    # Check all folds before the first fit, which can take minutes.
    manifests = _split(config, profiles, label)
    class_names = sorted(profiles.column(label).unique())
    index = profiles.metadata.assign(label=profiles.column(label).to_numpy(), negcon=negcon)
    if profiles.measured is not None:  # for the cell-count-only and intensity-only baselines
        index = pd.concat([index, profiles.measured], axis=1)
    make_folder(config.out)

    fitted = _fit_models(config, profiles, negcon, index["label"], manifests, names)
    folds = [_fold(name, manifest, index) for name, manifest in manifests.items()]
    models = [
        ModelPredictions(name, tuple(one.test for one in fits), tuple(one.train for one in fits))
        for name, fits in fitted.items()
    ]
    _report_unknown_classes(folds)
    evaluation = evaluate_predictions(
        models,
        folds,
        class_names,
        split=_split_name(config, next(iter(manifests.values()))),
        seed=config.seed,
        replicates=config.replicates,
    )
    _write_results(config, evaluation, models, folds, class_names, label)
    for name, manifest in manifests.items():
        file = "split.parquet" if len(folds) == 1 else f"split_{name}.parquet"
        splits.write_split(manifest, config.out / file)
    table = score_tables.ranking_table(evaluation).merge(_costs(fitted), on="model", how="left")
    write_csv(config.out / "table.csv", table)
    write_json(config.out / "labels.json", class_names)
    # default=str writes paths as text.
    settings = json.dumps(dataclasses.asdict(config), default=str)
    write_json(config.out / "config.json", json.loads(settings))
    return evaluation


def _split(config: ClassifyConfig, profiles: Profiles, label: str) -> dict[str, pd.DataFrame]:
    """Return the split manifest of each fold, by the name of the fold."""
    split, seed = config.split, config.seed
    if config.hold_out:
        plates = sorted(profiles.column(PLATE).unique())
        chosen = plates if config.hold_out == EACH else [config.hold_out]
        if unknown := [plate for plate in chosen if plate not in plates]:
            raise InputError(
                f"--hold-out {unknown[0]}: no such plate (available: {EACH}, {', '.join(plates)})"
            )
        included, notes = apply_exclusions(profiles.metadata, read_rules(split.exclude), label)
        out = profiles.metadata["site_id"][~included]
        manifests = {
            plate: splits.remove_sites(_hold_out(profiles, plate), out) for plate in chosen
        }
    else:
        numbers = range(split.folds) if config.all_folds else [split.fold]
        manifests = {
            f"fold_{fold}": splits.create_manifest(
                profiles.metadata, dataclasses.replace(split, fold=fold), label=label, seed=seed
            )
            for fold in numbers
        }
        if split.split_file and not config.all_folds:
            manifests = {"split_file": manifests.popitem()[1]}
        notes = next(iter(manifests.values())).attrs["notes"]
    for sentence in notes:
        console.print(sentence)
    _check_classes(config, manifests, profiles, label)
    return manifests


def _hold_out(profiles: Profiles, plate: str) -> pd.DataFrame:
    groups = profiles.column(PLATE)
    part = np.where(groups == plate, TEST, TRAIN)
    columns = {"site_id": profiles.metadata["site_id"], "group": groups, "part": part}
    manifest = pd.DataFrame(columns)
    splits.require_no_overlap(manifest, f"--hold-out {plate}")
    return manifest


def _check_classes(
    config: ClassifyConfig, manifests: dict[str, pd.DataFrame], profiles: Profiles, label: str
) -> None:
    """Require two classes in each training set, and a fold whose test set shares one of them."""
    labels = profiles.column(label).set_axis(profiles.metadata["site_id"])
    learnable = False
    for fold, manifest in manifests.items():
        train, test = (
            set(labels[manifest.loc[manifest["part"] == part, "site_id"]]) for part in (TRAIN, TEST)
        )
        if len(train) < 2:
            raise InputError(
                f"{fold}: column {label} has one class ({train.pop()}) in the training set, but a "
                "classifier needs two. Choose another --label-column or split."
            )
        learnable = learnable or bool(train & test)
    if not learnable:
        raise InputError(
            f"{config.profiles.where}: no class of column {label} is in both training and test "
            "set. Choose another --label-column or split."
        )


@dataclasses.dataclass
class _Fit:
    """Predicted probabilities of one classifier on one fold, and how they were obtained."""

    train: np.ndarray
    test: np.ndarray
    seconds: float
    setting: str
    inner_score: float


class _FoldData(NamedTuple):
    """Prepared features and labels of one fold.

    Attributes:
        train: features of the training rows.
        test: features of the test rows.
        labels: class numbers of the training rows.
        inner: (features, labels, test features, test labels) of each inner fold of tuning.
    """

    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    inner: list[tuple[np.ndarray, ...]]


def _fit_models(
    config: ClassifyConfig,
    profiles: Profiles,
    negcon: np.ndarray,
    label: pd.Series,
    manifests: dict[str, pd.DataFrame],
    names: tuple[str, ...],
) -> dict[str, list[_Fit]]:
    """Fit each classifier on each fold; classifiers that fail are left out with a warning.

    Features are prepared once per fold, not once per classifier, because sphering and tuning are
    expensive.
    """
    from perturbjax.profiles.table_steps import as_table

    table = as_table(profiles, negcon)
    position = pd.Series(np.arange(len(profiles)), index=profiles.metadata["site_id"])
    classes, labels = np.unique(label, return_inverse=True)
    fitted: dict[str, list[_Fit]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    notes: list[str] = []
    jobs = list(itertools.product(manifests, names))
    for fold, name in track(jobs, total=len(jobs), label="Fitting classifiers", unit="fits"):
        # Jobs are ordered by fold; prepare before the first classifier of each fold.
        if name == names[0]:
            # `data` remains valid for the other classifiers of this fold.
            data = _prepare_fold(config, table, labels, position, manifests[fold], notes)
        if name in failed:
            continue
        try:
            fitted[name].append(_fit_model(name, config, data, len(classes), notes))
        except (ValueError, np.linalg.LinAlgError) as error:
            failed[name] = " ".join(str(error).split())
            console.print(f"warning: left out classifier {name}: {failed[name]}")
    if len(failed) == len(names):
        raise InputError(
            f"--models {config.models}: no classifier could be fitted "
            f"({next(iter(failed.values()))})"
        )
    for note in dict.fromkeys(notes):
        console.print(f"info: {note}")
    return {name: fits for name, fits in fitted.items() if name not in failed}


def _prepare_fold(
    config: ClassifyConfig,
    table: pd.DataFrame,
    labels: np.ndarray,
    position: pd.Series,
    manifest: pd.DataFrame,
    notes: list[str],
) -> _FoldData:
    from perturbjax.profiles.preparation import fit_preparation, preparation_notes

    train, test = (
        position[manifest.loc[manifest["part"] == part, "site_id"]].to_numpy()
        for part in (TRAIN, TEST)
    )
    groups = manifest.loc[manifest["part"] == TRAIN, "group"].to_numpy()

    def prepare(fit: np.ndarray, fit_groups: np.ndarray, rest: np.ndarray) -> tuple[Any, ...]:
        steps, features = fit_preparation(
            table.iloc[fit], config.preparation, config.seed, labels[fit], fit_groups
        )
        return steps, features, steps.transform(table.iloc[rest])

    inner: list[tuple[np.ndarray, ...]] = []
    try:
        steps, features, test_features = prepare(train, groups, test)
        for fit, rest in _inner_folds(groups) if config.tune else ():
            # The preparation is fitted in each inner fold too, so tuning is not biased by it.
            _, x, z = prepare(train[fit], groups[fit], train[rest])
            inner.append((x, labels[train[fit]], z, labels[train[rest]]))
    except (ValueError, np.linalg.LinAlgError) as error:
        raise InputError(f"features: the preparation failed ({error}). Choose another.") from error
    notes += preparation_notes(steps)
    return _FoldData(features, test_features, labels[train], inner)


def _inner_folds(groups: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split training rows for tuning, by the groups of the outer split."""
    from sklearn.model_selection import GroupKFold

    count = min(_TUNING_FOLDS, len(np.unique(groups)))
    if count < 2:
        raise InputError(
            "--tune: all training rows are one group, but tuning needs two. Choose another --split."
        )
    return GroupKFold(count).split(groups, groups=groups)


def _fit_model(
    name: str, config: ClassifyConfig, data: _FoldData, classes: int, notes: list[str]
) -> _Fit:
    start = time.monotonic()
    classifier = CLASSIFIERS[name]
    model = classifier.make(len(data.labels), len(np.unique(data.labels)), config.seed)
    setting: dict[str, Any] = {}
    inner_score = float("nan")
    if data.inner and classifier.grid:
        setting, inner_score = _tune(model, classifier.grid, data.inner, config.tune_by)
    model.set_params(**setting)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(data.train, data.labels)
    for warning in caught:
        # Matches "converge" and "Convergence".
        if "onverge" in str(warning.message):
            notes.append(f"{name}: {str(warning.message).splitlines()[0]}")
    train, test = (probabilities(model, part, classes) for part in (data.train, data.test))
    text = ", ".join(f"{key} {value:g}" for key, value in setting.items())
    return _Fit(train, test, time.monotonic() - start, text, inner_score)


def _tune(
    model: Any, grid: tuple[dict[str, Any], ...], inner: list, criterion: str
) -> tuple[dict[str, Any], float]:
    """Return the setting with the highest mean score over the inner folds, and that score."""
    from sklearn.base import clone
    from sklearn.metrics import accuracy_score, recall_score

    def score(
        setting: dict[str, Any], x: np.ndarray, y: np.ndarray, z: np.ndarray, truth: np.ndarray
    ) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predicted = clone(model).set_params(**setting).fit(x, y).predict(z)
        if criterion == "accuracy":
            return accuracy_score(truth, predicted)
        classes = np.unique(truth)
        return recall_score(truth, predicted, labels=classes, average="macro", zero_division=0)

    scores = [float(np.mean([score(setting, *part) for part in inner])) for setting in grid]
    best = int(np.argmax(scores))
    return grid[best], scores[best]


def _fold(name: str, manifest: pd.DataFrame, index: pd.DataFrame) -> Fold:
    by_id = index.set_index("site_id", drop=False)
    train, test = (
        by_id.loc[manifest.loc[manifest["part"] == part, "site_id"]].reset_index(drop=True)
        for part in (TRAIN, TEST)
    )
    return Fold(name, train, test)


def _report_unknown_classes(folds: list[Fold]) -> None:
    for fold in folds:
        unknown = fold.test.loc[~fold.test["label"].isin(fold.train["label"]), "label"]
        if len(unknown):
            console.print(
                f"warning: {fold.name}: {unknown.nunique()} classes occur in the test set only "
                f"(first: {unknown.iloc[0]}). Their {len(unknown)} rows count as wrong."
            )


def _costs(fitted: dict[str, list[_Fit]]) -> pd.DataFrame:
    """Seconds, settings and inner score of each classifier over the folds."""
    return pd.DataFrame(
        {
            "model": name,
            "seconds": sum(one.seconds for one in fits),
            "setting": "; ".join(one.setting for one in fits if one.setting),
            "inner_score": float(np.mean([one.inner_score for one in fits])),
        }
        for name, fits in fitted.items()
    )


def _write_results(
    config: ClassifyConfig,
    evaluation: EvaluationResult,
    models: list[ModelPredictions],
    folds: list[Fold],
    class_names: list[str],
    label: str,
) -> None:
    """Write predictions, scores and figure. With one fold, predictions include the training set."""
    out, single = Path(config.out), len(folds) == 1
    for model in models:
        tables = [
            predictions_table(index, values, class_names, part=part, label=index["label"])
            for number, fold in enumerate(folds)
            for part, index, values in (
                *([(TRAIN, fold.train, model.train[number])] if single else []),
                (TEST, fold.test, model.test[number]),
            )
        ]
        predictions = pd.concat(tables, ignore_index=True)
        write_predictions(out / "predictions" / f"{model.name}.parquet", predictions)
        if single:
            scores = evaluation.for_model(model.name)
            folder = out / "evaluation" / model.name
            score_tables.write_run_evaluation(scores, model, folds[0], class_names, folder)
    size = f"{len(class_names)} classes, {evaluation.n.site} test rows"
    title = f"{label}, split by {evaluation.split_name}: {size}"
    figures.plot_ranking(evaluation, out / "scores.png", title)


def _split_name(config: ClassifyConfig, manifest: pd.DataFrame) -> str:
    """Return the split policy, or the name of the split file."""
    if config.hold_out:
        return "plate"
    return splits.split_name(config.split, manifest)

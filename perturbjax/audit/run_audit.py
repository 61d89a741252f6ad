"""Run an audit: one model on the same features under every split that the data allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.audit.audit_inputs import (
    AuditData,
    RunPredictions,
    load_features,
    load_run_data,
    load_run_predictions,
)
from perturbjax.audit.audit_options import AuditConfig
from perturbjax.audit.audit_result import OTHER_SPLIT, AuditResult, Difference, SplitResult
from perturbjax.audit.controls import CONTROLS, SHUFFLED, WORDS, precomputed_baseline
from perturbjax.audit.split_designs import SplitDesign, design_splits
from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder
from perturbjax.core.options import require
from perturbjax.core.plates import PLATE
from perturbjax.core.progress import track
from perturbjax.evaluation.baselines import BaselineUnavailable
from perturbjax.evaluation.bootstrap import resample
from perturbjax.evaluation.evaluate import Fold, ModelPredictions, evaluate_predictions
from perturbjax.evaluation.evaluation_result import MODEL
from perturbjax.evaluation.permutation import permutation_p
from perturbjax.evaluation.scores import HEADLINE, count
from perturbjax.evaluation.wells import aggregate_wells, well_ids

#: Probabilities of the test sites, one array per fold, by name of the model or control.
Predictions = dict[str, list[Float[np.ndarray, "_n classes"]]]


def audit(config: AuditConfig) -> AuditResult:
    """Audit features under every split that the data allow, or a run under its own split.

    Raises:
        InputError: there is nothing to evaluate, or a file, column or flag cannot be used.
    """
    from perturbjax.profiles.classifiers import CLASSIFIERS

    # An output folder that cannot be written is reported before the computation.
    make_folder(config.out)
    model = config.model
    require("model", model, model in CLASSIFIERS, f"one of {', '.join(CLASSIFIERS)}")
    if config.run is None:
        return audit_features(load_features(config), config, model)
    if config.train:
        return audit_trained(config, config.run, model)
    return audit_run(*load_run_predictions(config, config.run), config, model)


def audit_features(data: AuditData, config: AuditConfig, model: str) -> AuditResult:
    """Fit one classifier on the training set of every fold of every split.

    Raises:
        InputError: the data allow no split, or the classifier cannot be fitted.
    """
    designs, refused = _design_splits(data, config)
    # A flat list of folds, for the progress.
    jobs = [(design, fold) for design in designs for fold in range(len(design.folds))]
    predictions: dict[str, Predictions] = {design.policy: {} for design in designs}
    for design, fold in track(jobs, total=len(jobs), label="audit", unit="folds"):
        for name, one in _fit_fold(data, design, fold, config, model):
            predictions[design.policy].setdefault(name, []).append(one)
    return _evaluate_splits(data, designs, refused, model, predictions, config)


def _design_splits(
    data: AuditData, config: AuditConfig
) -> tuple[tuple[SplitDesign, ...], dict[str, str]]:
    """Design every split that the data allow.

    Raises:
        InputError: they allow none.
    """
    designs, refused = design_splits(
        data.index, label="label", folds=config.folds, seed=config.seed, splits=config.splits
    )
    if not designs:
        reasons = "; ".join(f"{policy}: {why}" for policy, why in refused.items())
        raise InputError(
            f"{data.source}: no split is possible ({reasons}); each class needs two wells or more"
        )
    return designs, refused


def _evaluate_splits(
    data: AuditData,
    designs: tuple[SplitDesign, ...],
    refused: dict[str, str],
    model: str,
    predictions: dict[str, Predictions],
    config: AuditConfig,
) -> AuditResult:
    splits, own = [], {}
    for design in designs:
        # The remaining predictions are those of the controls.
        parts = predictions[design.policy].pop(model)
        splits.append(_evaluate(data, design, model, parts, predictions[design.policy], config))
        own[design.policy] = np.concatenate(parts)
    # All splits have the same sites, apart from excluded ones, and so the same unit.
    level = splits[-1].level.name
    differences = tuple(_differences(data, designs, own, config, level))
    return AuditResult(data.source, data.label, model, tuple(splits), differences, refused)


def _fit_fold(
    data: AuditData, design: SplitDesign, fold: int, config: AuditConfig, model: str
) -> Iterator[tuple[str, Float[np.ndarray, "n classes"]]]:
    """Predict a fold with the classifier on the features, on shuffled labels, and on controls."""
    train, test = design.folds[fold]
    labels = data.labels[train]
    options: dict[str, Any] = {"classes": len(data.class_names), "seed": config.seed}
    if data.features is not None:
        rng = np.random.default_rng([config.seed, fold])
        # Both labelings use the same features, so the preparation is computed once.
        labelings = labels, shuffle_labels(labels, data.wells[train], rng)
        own, shuffled = data.features.fit_predict(model, train, test, labelings, **options)
        yield model, own
        yield SHUFFLED, shuffled
    for name, features in data.controls.items():
        yield name, features.fit_predict(model, train, test, (labels,), **options)[0]


def shuffle_labels(
    labels: Int[np.ndarray, " n"], wells: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Shuffle labels between wells, evenly over the classes.

    A random permutation agrees by chance with some true labels, and a classifier trained on it
    would exceed chance. Here the wells of each true class get all labels in proportion to their
    frequency: wells sorted by class are permuted by the golden-ratio sequence, which is evenly
    spread. All sites of a well get the same label; the first site gives its original label.
    """
    _, first, well_of_site = np.unique(wells, return_index=True, return_inverse=True)
    order = np.lexsort((rng.random(len(first)), labels[first]))  # by class, random within
    # The fractional parts of multiples of the golden ratio are evenly spread over [0, 1).
    spread = np.argsort((np.arange(len(first)) * (5**0.5 - 1) / 2 + rng.random()) % 1)
    shuffled = np.empty_like(order)
    shuffled[order] = labels[first][order][spread]
    return shuffled[well_of_site.ravel()]


def _evaluate(
    data: AuditData,
    design: SplitDesign,
    model: str,
    parts: list[Float[np.ndarray, "_n classes"]],
    controls: Predictions,
    config: AuditConfig,
) -> SplitResult:
    """Evaluate the model and its controls under one split."""
    sites = data.index["site_id"].to_numpy()[design.test_sites]
    # Controls that need a classifier are predicted already; all other baselines are fitted here.
    precomputed = {
        name: precomputed_baseline(sites, np.concatenate(one), WORDS[name])
        for name, one in controls.items()
    }
    folds = [
        Fold(
            f"{design.policy} {number}",
            *(data.index.iloc[part].reset_index(drop=True) for part in fold),
        )
        for number, fold in enumerate(design.folds)
    ]
    evaluation = evaluate_predictions(
        [ModelPredictions(model, tuple(parts))],
        folds,
        data.class_names,
        split=design.policy,
        seed=config.seed,
        replicates=config.replicates,
        whole=config.resample,
        baselines=CONTROLS | precomputed,
    )
    try:
        level = evaluation.verdict_level.name
        p, why = _permutation_p(data, design, np.concatenate(parts), config, level), ""
    except BaselineUnavailable as reason:
        p, why = None, str(reason)
    return SplitResult(design.policy, evaluation, p, why, design.n_excluded)


def _permutation_p(
    data: AuditData,
    design: SplitDesign,
    probabilities: Float[np.ndarray, "n classes"],
    config: AuditConfig,
    level: str,
) -> float:
    """p-value of a permutation test within plates and folds.

    Args:
        data: sites.
        design: split.
        probabilities: predictions of the test sites.
        config: settings.
        level: unit of the score, "site" or "well".

    Raises:
        BaselineUnavailable: the test is not possible.
    """
    tested, wells = design.test_sites, data.wells
    # The predictions would depend on the labels of the test wells, which invalidates the test.
    if any(np.isin(wells[test], wells[train]).any() for train, test in design.folds):
        raise BaselineUnavailable("training and test set contain sites of the same wells")
    # Fold of each test site; labels are shuffled within combinations of fold and plate.
    fold = np.repeat(np.arange(len(design.folds)), [len(test) for _, test in design.folds])
    plate = pd.factorize(data.index[PLATE])[0][tested]
    blocks = np.unique(np.stack([fold, plate]), axis=1, return_inverse=True)[1].ravel()
    # Numbers from 0 without gaps, as `permutation_p` requires.
    _, first, test_wells = np.unique(wells[tested], return_index=True, return_inverse=True)
    labels, test_wells = data.labels[tested], test_wells.ravel()
    if level == "well":
        labels, probabilities = aggregate_wells(test_wells, labels, probabilities)
        test_wells, blocks = np.arange(len(labels)), blocks[first]
    return permutation_p(
        labels,
        probabilities,
        test_wells,
        blocks,
        permutations=config.replicates,
        seed=config.seed,
    )


def _differences(
    data: AuditData,
    designs: tuple[SplitDesign, ...],
    probabilities: dict[str, Float[np.ndarray, "_n classes"]],
    config: AuditConfig,
    level: str,
) -> Iterator[Difference]:
    """Compare the weakest split with each stricter split of the same treatments.

    Scores are by site or by well (`level`).
    """
    # Splits by compound predict new treatments, so their scores are not comparable.
    same = [one for one in designs if SPLIT_POLICIES[one.policy].tests_known_treatments]
    for stricter in same[1:]:
        sites = np.intersect1d(same[0].test_sites, stricter.test_sites)
        # Wells of the common test sites, numbered from 0.
        wells, labels = well_ids(data.index.iloc[sites]), data.labels[sites]
        counts = {}
        for one in (same[0], stricter):
            # Row of each site in the predictions of this split.
            order = pd.Series(np.arange(len(one.test_sites)), index=one.test_sites)
            rows = probabilities[one.policy][order[sites].to_numpy()]
            if level == "well":
                counts[one.policy] = count(*aggregate_wells(wells, labels, rows), np.unique(wells))
            else:
                counts[one.policy] = count(labels, rows, wells)
        resampled = resample(counts, replicates=config.replicates, seed=config.seed)
        estimate = resampled.lead(same[0].policy, stricter.policy)[HEADLINE]
        yield Difference(
            same[0].policy, stricter.policy, len(sites), int(wells.max()) + 1, estimate
        )


def audit_run(
    data: AuditData, predictions: RunPredictions, config: AuditConfig, model: str
) -> AuditResult:
    """Audit the predictions of a run under its own split."""
    design = SplitDesign(predictions.policy, ((predictions.train, predictions.test),), 0)
    controls = {name: [one] for name, one in _fit_fold(data, design, 0, config, model)}
    split = _evaluate(data, design, MODEL, [predictions.probabilities], controls, config)
    others, refused = design_splits(data.index, label="label", folds=config.folds, seed=config.seed)
    # The network was trained on one split. Other splits could test it on training sites.
    for one in others:
        refused[one.policy] = OTHER_SPLIT
    # The split of the run is evaluated, not refused.
    refused.pop(predictions.policy, None)
    return AuditResult(data.source, data.label, MODEL, (split,), (), refused)


def audit_trained(config: AuditConfig, path: Path, model: str) -> AuditResult:
    """Train a run's recipe on every fold of every split, and audit the networks.

    Raises:
        InputError: the data allow no split, or a training fails.
    """
    from perturbjax.audit.trained_networks import train_and_predict_folds

    data, run, dataset, _ = load_run_data(config, path)
    designs, refused = _design_splits(data, config)
    network = run.recipe.model.model
    predictions: dict[str, Predictions] = {design.policy: {} for design in designs}
    folds = train_and_predict_folds(data, dataset, run, designs, config.out)
    for design, fold, own in folds:
        for name, one in ((network, own), *_fit_fold(data, design, fold, config, model)):
            predictions[design.policy].setdefault(name, []).append(one)
    return _evaluate_splits(data, designs, refused, network, predictions, config)

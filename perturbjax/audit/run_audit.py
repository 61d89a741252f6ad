"""`perturbjax audit`: one model on the same features under every split that the data allows, beside its controls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from perturbjax.audit import audit_inputs as sources
from perturbjax.audit.audit_inputs import AuditData, RunPredictions
from perturbjax.audit.audit_options import AuditConfig
from perturbjax.audit.audit_result import AuditResult, Difference, SplitResult
from perturbjax.audit.controls import CONTROLS, SHUFFLED, WORDS, given
from perturbjax.audit.split_designs import SplitDesign, deal
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
from perturbjax.evaluation.wells import well_ids


def audit(config: AuditConfig) -> AuditResult:
    """Judge features under every split that the data allows, or a run under its own, and write what was found.

    Raises:
        InputError: nothing can be judged, or a file, column or flag cannot be used.
    """
    make_folder(config.out)
    model = _model(config.model)
    if config.run is not None and config.train:
        return audit_trained(config, config.run, model)
    if config.run is not None:
        return audit_run(*sources.of_run(config, config.run), config, model)
    return audit_features(sources.of_features(config), config, model)


def _model(name: str) -> str:
    """The classifier's name, if there is one of that name.

    Raises:
        InputError: there is none.
    """
    from perturbjax.profiles.classifiers import CLASSIFIERS

    require("model", name, name in CLASSIFIERS, f"one of {', '.join(CLASSIFIERS)}")
    return name


def audit_features(material: AuditData, config: AuditConfig, model: str) -> AuditResult:
    """One classifier on the features, fitted anew on the training part of every fold of every split.

    Raises:
        InputError: the data allows no split at all, or the model cannot be fitted.
    """
    dealt, refused = _dealt(material, config)
    jobs = [(one, fold) for one in dealt for fold in range(len(one.folds))]
    said: dict[str, dict[str, Said]] = {one.policy: {} for one in dealt}
    for one, fold in track(jobs, total=len(jobs), label="audit", unit="folds"):
        for who, answer in _fit(material, one, fold, config, model):
            said[one.policy].setdefault(who, []).append(answer)
    return _audited(material, dealt, refused, model, said, config)


#: Probabilities of the judged sites, fold after fold.
Said = list[Float[np.ndarray, "_n classes"]]


def _dealt(
    material: AuditData, config: AuditConfig
) -> tuple[tuple[SplitDesign, ...], dict[str, str]]:
    """Every split that the data allows, and why not the others.

    Raises:
        InputError: it allows none.
    """
    dealt, refused = deal(
        material.index, label="label", folds=config.folds, seed=config.seed, splits=config.splits
    )
    if not dealt:
        reasons = "; ".join(f"{policy}: {why}" for policy, why in refused.items())
        raise InputError(
            f"{material.what}: no split can be made ({reasons}); it takes each class in two wells or more"
        )
    return dealt, refused


def _audited(
    material: AuditData,
    dealt: tuple[SplitDesign, ...],
    refused: dict[str, str],
    model: str,
    said: dict[str, dict[str, Said]],
    config: AuditConfig,
) -> AuditResult:
    """What everybody said under every split, judged and compared."""
    answers, owned = [], {}
    for one in dealt:
        own = said[one.policy].pop(model)
        answers.append(_judge(material, one, model, own, said[one.policy], config))
        owned[one.policy] = np.concatenate(own)
    differences = tuple(_differences(material, dealt, owned, config))
    return AuditResult(material.what, material.label, model, tuple(answers), differences, refused)


def _fit(
    material: AuditData, dealt: SplitDesign, fold: int, config: AuditConfig, model: str
) -> Iterator[tuple[str, Float[np.ndarray, "n classes"]]]:
    """Who answers a fold and how: the features' model, and the controls that are the same model on something else."""
    train, test = dealt.folds[fold]
    labels = material.labels[train]
    options: dict[str, Any] = {"classes": len(material.class_names), "seed": config.seed}
    if material.features is not None:
        shuffled = _dealt_anew(
            labels, material.wells[train], np.random.default_rng([config.seed, fold])
        )
        own, luck = material.features.fitted(model, train, test, (labels, shuffled), **options)
        yield model, own
        yield SHUFFLED, luck
    for control, features in material.controls.items():
        yield control, features.fitted(model, train, test, (labels,), **options)[0]


def _dealt_anew(
    labels: Int[np.ndarray, " n"], wells: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """The labels of wells, dealt to them anew; that of a well's first site counts for all.

    Every class's wells get all labels in their shares: labels that are dealt at random happen to agree with the true
    ones in part, and what a model learns of that would be taken for a leak.
    """
    _, first, of_site = np.unique(wells, return_index=True, return_inverse=True)
    order = np.lexsort(
        (rng.random(len(first)), labels[first])
    )  # by class, in random order within each
    spread = np.argsort((np.arange(len(first)) * (5**0.5 - 1) / 2 + rng.random()) % 1)
    dealt = np.empty_like(order)
    dealt[order] = labels[first][order][spread]
    return dealt[of_site.ravel()]


def _judge(
    material: AuditData,
    dealt: SplitDesign,
    model: str,
    said: Said,
    controls: dict[str, Said],
    config: AuditConfig,
) -> SplitResult:
    """The model beside its controls under one split."""
    sites = material.index["site_id"].to_numpy()[dealt.judged]
    same_model = {
        name: given(sites, np.concatenate(answer), WORDS[name]) for name, answer in controls.items()
    }
    folds = [
        Fold(
            f"{dealt.policy} {number}",
            *(material.index.iloc[part].reset_index(drop=True) for part in parts),
        )
        for number, parts in enumerate(dealt.folds)
    ]
    evaluation = evaluate_predictions(
        [ModelPredictions(model, tuple(said))],
        folds,
        material.class_names,
        split=dealt.policy,
        seed=config.seed,
        replicates=config.replicates,
        whole=config.resample,
        baselines=CONTROLS | same_model,
    )
    try:
        p, why = _p(material, dealt, np.concatenate(said), config), ""
    except BaselineUnavailable as reason:
        p, why = None, str(reason)
    return SplitResult(dealt.policy, evaluation, p, why, dealt.n_excluded)


def _p(
    material: AuditData,
    dealt: SplitDesign,
    said: Float[np.ndarray, "n classes"],
    config: AuditConfig,
) -> float:
    """Of a permutation test within plates and folds.

    Raises:
        Unavailable: it cannot be made.
    """
    judged, wells = dealt.judged, material.wells
    if any(np.isin(wells[test], wells[train]).any() for train, test in dealt.folds):
        raise BaselineUnavailable(
            "sites of one well stand on both sides, so their labels cannot be exchanged"
        )
    fold = np.repeat(np.arange(len(dealt.folds)), [len(test) for _, test in dealt.folds])
    plate = pd.factorize(material.index[PLATE])[0][judged]
    blocks = np.unique(np.stack([fold, plate]), axis=1, return_inverse=True)[1].ravel()
    of_well = np.unique(wells[judged], return_inverse=True)[1].ravel()
    draws: dict[str, Any] = {"permutations": config.replicates, "seed": config.seed}
    return permutation_p(material.labels[judged], said, of_well, blocks, **draws)


def _differences(
    material: AuditData,
    dealt: tuple[SplitDesign, ...],
    said: dict[str, Float[np.ndarray, "_n classes"]],
    config: AuditConfig,
) -> Iterator[Difference]:
    """The weakest split against each stricter one that asks of the same treatments, on the sites that both judged."""
    same = [one for one in dealt if SPLIT_POLICIES[one.policy].tests_known_treatments]
    for stricter in same[1:]:
        sites = np.intersect1d(same[0].judged, stricter.judged)
        wells = well_ids(material.index.iloc[sites])
        counts = {}
        for one in (same[0], stricter):
            at = pd.Series(np.arange(len(one.judged)), index=one.judged)[sites].to_numpy()
            counts[one.policy] = count(material.labels[sites], said[one.policy][at], wells)
        found = resample(counts, replicates=config.replicates, seed=config.seed)
        estimate = found.lead(same[0].policy, stricter.policy)[HEADLINE]
        yield Difference(same[0].policy, stricter.policy, len(sites), estimate)


def audit_run(
    material: AuditData, answered: RunPredictions, config: AuditConfig, model: str
) -> AuditResult:
    """A run's own predictions under the split that it was trained on; the other splits ask for other runs."""
    dealt = SplitDesign(answered.policy, ((answered.train, answered.test),), 0)
    controls = {control: [answer] for control, answer in _fit(material, dealt, 0, config, model)}
    answer = _judge(material, dealt, MODEL, [answered.probabilities], controls, config)
    others, refused = deal(material.index, label="label", folds=config.folds, seed=config.seed)
    for one in others:
        refused[one.policy] = (
            f"a network answers for its own split; `perturbjax train --split {one.policy}` asks this"
        )
    refused.pop(answered.policy, None)
    return AuditResult(material.what, material.label, MODEL, (answer,), (), refused)


def audit_trained(config: AuditConfig, path: Path, model: str) -> AuditResult:
    """A run's recipe under every split that the data allows, trained anew for every fold.

    Raises:
        InputError: the data allows no split, or a training cannot be made.
    """
    from perturbjax.audit.trained_networks import answers

    material, run, dataset, _ = sources.of_recipe(config, path)
    dealt, refused = _dealt(material, config)
    network = run.recipe.model.model
    said: dict[str, dict[str, Said]] = {one.policy: {} for one in dealt}
    for one, fold, own in answers(material, dataset, run, dealt, config.out):
        for who, answer in ((network, own), *_fit(material, one, fold, config, model)):
            said[one.policy].setdefault(who, []).append(answer)
    return _audited(material, dealt, refused, network, said, config)

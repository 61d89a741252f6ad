"""Prediction sets: coverage on simulated plates, unlike images, and limits of the guarantee."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.evaluation.prediction_sets import (
    LEVEL,
    MIN_GROUPS,
    NONE_OF_THEM,
    Scored,
    TooFewGroups,
    calibrate,
    class_scores,
    cross_fitted_sets,
    describe_sets,
    format_sets,
    group_quantile,
    plate_difference,
    site_uniform,
    summarize,
)
from perturbjax.evaluation.training_reference import fit_reference

CLASSES = 6


def simulate(
    rng, *, plates=2, wells=30, sites=4, skill=2.0, well_effect=1.0, plate_effect=0.0, sharpness=1.0
):
    """Simulate predictions of wells whose difficulty varies between wells and between plates.

    `sharpness` above 1 makes the probabilities overconfident.
    """  # fmt: skip
    count = plates * wells
    plate = np.repeat(np.arange(plates), wells)
    own = (
        skill + well_effect * rng.normal(size=count) + plate_effect * rng.normal(size=plates)[plate]
    )
    well = np.repeat(np.arange(count), sites)
    labels = np.repeat(rng.integers(CLASSES, size=count), sites)
    logits = rng.normal(size=(count * sites, CLASSES))
    logits[np.arange(len(labels)), labels] += own[well]
    probabilities = np.exp(sharpness * logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    distance = rng.chisquare(8, size=len(labels)) + rng.normal(size=count)[well]
    return Scored(
        probabilities, labels, rng.random(len(labels)), distance, well, plate[well]
    )  # fmt: skip


def covered(sites, members):
    return members[np.arange(len(members)), sites.labels].mean()


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 4.0])
def test_coverage_reaches_the_level_on_new_wells(sharpness):
    """Coverage over repetitions of calibration and test; sites of a well are dependent."""
    rng = np.random.default_rng(0)
    coverage, unlike = [], []
    for _ in range(200):
        calibration = calibrate(simulate(rng, wells=20, sharpness=sharpness))
        test = simulate(rng, wells=20, sharpness=sharpness)
        members = calibration.sets_of(test)
        coverage.append(covered(test, members))
        unlike.append((~members.any(axis=1)).mean())
    # Standard error of the mean over repetitions: about 0.003.
    assert LEVEL - 0.01 < np.mean(coverage) < LEVEL + 0.04
    assert np.mean(unlike) < 0.06


def test_large_wells_do_not_dominate_the_calibration():
    """Half of the wells have one difficult site, half have 40 easy ones: coverage by well."""
    rng = np.random.default_rng(1)
    names = ("probabilities", "labels", "uniform", "distance", "plates")
    coverage = []

    def mixed():
        hard = simulate(rng, plates=1, wells=15, sites=1, skill=0.5, sharpness=3.0)
        easy = simulate(rng, plates=1, wells=15, sites=40, skill=6.0, sharpness=3.0)
        both = {name: np.concatenate([getattr(hard, name), getattr(easy, name)]) for name in names}
        return Scored(**both, wells=np.concatenate([hard.wells, easy.wells + 15]))

    for _ in range(200):
        test, calibration = mixed(), calibrate(mixed())
        right = calibration.sets_of(test)[np.arange(len(test.labels)), test.labels]
        coverage.append((np.bincount(test.wells, right) / np.bincount(test.wells)).mean())
    assert LEVEL - 0.01 < np.mean(coverage) < LEVEL + 0.05


def test_plates_are_the_groups_if_there_are_enough():
    """Plates differ strongly: only a calibration by plate covers sites of new plates."""
    rng = np.random.default_rng(2)
    many, few = [], []
    for _ in range(100):
        options = {"wells": 6, "plate_effect": 4.0, "sharpness": 3.0}
        test = simulate(rng, plates=20, **options)
        calibration = calibrate(simulate(rng, plates=12, **options))
        assert calibration.unit == "plate" and calibration.groups == 12
        many.append(covered(test, calibration.sets_of(test)))
        calibration = calibrate(simulate(rng, plates=2, **options))
        assert calibration.unit == "well"
        few.append(covered(test, calibration.sets_of(test)))
    assert np.mean(many) > LEVEL - 0.01
    assert np.mean(few) < LEVEL - 0.02


def test_plates_that_are_not_exchangeable_are_reported():
    rng = np.random.default_rng(3)
    equal, different = (simulate(rng, plates=4, plate_effect=effect) for effect in (0.0, 4.0))
    texts = []
    for sites in (equal, different):
        calibration = calibrate(sites)
        difference = plate_difference(sites)
        summary = summarize(
            sites, calibration.sets_of(sites), calibration, "validation", difference
        )
        texts.append(" ".join(describe_sets(summary)))
    assert "not exchangeable" in texts[1] and "not exchangeable" not in texts[0]
    assert "further wells of such plates" in texts[0]
    assert plate_difference(simulate(rng, plates=1)) is None
    rejected = [plate_difference(simulate(rng, plates=3)) < 0.05 for _ in range(200)]
    assert np.mean(rejected) < 0.1


def test_low_coverage_is_reported():
    rng = np.random.default_rng(4)
    calibration = calibrate(simulate(rng, skill=5.0))
    test = simulate(rng, skill=0.0)
    summary = summarize(test, calibration.sets_of(test), calibration, "validation", None)
    assert "coverage is below 90 %" in " ".join(describe_sets(summary)).replace("90%", "90 %")


def test_cross_fitted_sets_calibrate_each_half_on_the_other():
    rng = np.random.default_rng(5)
    sites = simulate(rng, wells=40)
    halves = sites.wells % 2
    members = cross_fitted_sets(sites, halves)
    other = calibrate(sites.take(halves == 1))
    assert (members[halves == 0] == other.sets_of(sites.take(halves == 0))).all()
    assert covered(sites, members) > LEVEL - 0.08


def test_too_few_wells_give_no_sets():
    rng = np.random.default_rng(6)
    with pytest.raises(TooFewGroups, match=f"need {MIN_GROUPS} calibration wells, there are 8"):
        calibrate(simulate(rng, plates=1, wells=8))
    calibration = calibrate(simulate(rng, plates=1, wells=9))
    assert np.isfinite(calibration.threshold) and calibration.unlike_threshold == np.inf


def test_group_quantile_of_single_sites_is_the_conformal_quantile():
    values = np.arange(1.0, 20.0)
    # ceil((19 + 1) * 0.9) = 18th smallest of 19 values.
    assert group_quantile(values, np.arange(19), 0.9) == 18
    assert group_quantile(values[:8], np.arange(8), 0.9) == np.inf


def test_class_scores_by_hand():
    scores = class_scores(np.array([[0.2, 0.5, 0.3]]), np.array([0.5]))
    assert scores[0] == pytest.approx([0.9, 0.25, 0.65])


def test_site_numbers_are_uniform_and_repeatable():
    names = [f"P1_A{i:02d}_{j}" for i in range(24) for j in range(50)]
    numbers = site_uniform(names)
    assert (numbers == site_uniform(names)).all() and len(set(numbers)) == len(names)
    assert abs(numbers.mean() - 0.5) < 0.03 and min(numbers) >= 0 and max(numbers) < 1


def test_images_unlike_the_training_images_have_an_empty_set():
    """Distance to class means: new sites of the classes are near, sites of a new class far."""
    rng = np.random.default_rng(7)
    means = 4 * rng.normal(size=(CLASSES, 20))
    scale = np.linspace(0.1, 5, 20)

    def features(labels):
        return (means[labels] + rng.normal(size=(len(labels), 20))) * scale

    train = rng.integers(CLASSES, size=300)
    index = pd.DataFrame(
        {"n_cells": rng.integers(20, 40, 300), "mean_DNA": rng.normal(100, 5, 300)}
    )
    reference = fit_reference(features(train), train, index)
    ordinary = simulate(rng, wells=40)
    sites = Scored(**{**vars(ordinary), "distance": reference.distance(features(ordinary.labels))})
    calibration = calibrate(sites)
    test = simulate(rng, wells=40)
    near, far = features(test.labels), 4 * rng.normal(size=(len(test.labels), 20)) * scale
    empty = []
    for one in (near, far):
        members = calibration.sets(test.probabilities, test.uniform, reference.distance(one))
        empty.append(~members.any(axis=1))
    assert empty[0].mean() < 0.1 and empty[1].mean() > 0.95
    assert format_sets(np.array([[True, False, True], [False] * 3]), ["a", "b", "c"]) == [
        "a | c",
        NONE_OF_THEM,
    ]
    shifted = index.assign(mean_DNA=index["mean_DNA"] + 100)
    (warning,) = reference.range_warnings(shifted)
    assert warning.startswith("mean intensity of DNA: 100% of the sites are outside")
    assert not reference.range_warnings(index)

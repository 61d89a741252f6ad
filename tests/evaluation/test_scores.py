"""Scores equal those of scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from perturbjax.core.errors import InputError
from perturbjax.evaluation.scores import (
    check_probabilities,
    confusion_matrix,
    count,
    per_class,
    pooled_scores,
    score,
    top_k_hits,
)


def random_case(seed: int, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(classes, size=n), rng.dirichlet(np.full(classes, 0.3), size=n)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 12))
def test_score_equals_scikit_learn_with_absent_classes(seed, n, classes):
    labels, probabilities = random_case(seed, n, classes)
    predicted = probabilities.argmax(axis=1)
    result = score(labels, probabilities)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about absent classes
        assert result["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
        assert result["balanced_accuracy"] == pytest.approx(
            metrics.balanced_accuracy_score(labels, predicted)
        )
        assert result["mcc"] == pytest.approx(metrics.matthews_corrcoef(labels, predicted))
        assert result["macro_f1"] == pytest.approx(
            metrics.f1_score(labels, predicted, average="macro")
        )
        if classes > 5:
            expected = metrics.top_k_accuracy_score(
                labels, probabilities, k=5, labels=np.arange(classes)
            )
            assert result["top5"] == pytest.approx(expected)


def test_per_class_equals_scikit_learn():
    labels, probabilities = random_case(1, 200, 7)
    predicted = probabilities.argmax(axis=1)
    expected = metrics.confusion_matrix(labels, predicted, labels=np.arange(7))
    np.testing.assert_array_equal(confusion_matrix(labels, predicted, 7), expected)
    table = per_class(labels, probabilities, np.arange(200) // 4, list("abcdefg"))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, predicted)
    np.testing.assert_allclose(table["precision"], precision)
    np.testing.assert_allclose(table["recall"], recall)
    np.testing.assert_allclose(table["f1"], f1)
    np.testing.assert_array_equal(table["sites"], support)


def test_per_class_counts_wells_once():
    labels, wells = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 2])
    table = per_class(labels, np.eye(3)[[0, 0, 1, 1]], wells, ["a", "b", "c"])
    assert table["wells"].tolist() == [2, 1, 0]
    assert table["recall"].isna().tolist() == [False, False, True]
    assert table["precision"].isna().tolist() == [False, False, True]


def test_top_k_hits_breaks_ties_by_class_order():
    probabilities = np.full((3, 3), 1 / 3)
    np.testing.assert_array_equal(
        top_k_hits(np.array([0, 1, 2]), probabilities, 1), [True, False, False]
    )
    np.testing.assert_array_equal(
        top_k_hits(np.array([0, 1, 2]), probabilities, 2), [True, True, False]
    )


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 12))
def test_top_k_hits_grow_with_k(seed, n, classes):
    labels, probabilities = random_case(seed, n, classes)
    fractions = [top_k_hits(labels, probabilities, k).mean() for k in range(1, classes + 1)]
    assert fractions == sorted(fractions) and fractions[-1] == 1
    order = np.random.default_rng(seed).permutation(n)
    assert score(labels[order], probabilities[order]) == score(labels, probabilities)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 12))
def test_score_is_invariant_to_class_order(seed, n, classes):
    labels, probabilities = random_case(seed, n, classes)
    renamed = np.random.default_rng(seed).permutation(classes)
    moved = np.empty_like(probabilities)
    moved[:, renamed] = probabilities
    assert score(renamed[labels], moved) == pytest.approx(score(labels, probabilities))
    perfect = score(labels, np.eye(classes)[labels])
    assert perfect.pop("mcc") == pytest.approx(
        float(len(set(labels)) > 1)
    )  # undefined for one class
    assert set(perfect.values()) == {1.0}


def test_pooled_scores_of_clusters_equal_score():
    labels, probabilities = random_case(3, 90, 6)
    clusters = np.random.default_rng(0).integers(10, size=90)
    clusters[:10] = np.arange(10)
    by_cluster = count(labels, probabilities, clusters)
    assert by_cluster.truth.shape == (10, 6)
    for metric, value in pooled_scores(by_cluster).items():
        assert value == pytest.approx(score(labels, probabilities)[metric])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.__setitem__((1, 0), np.nan), "site s1.*not all finite"),
        (lambda p: p.__setitem__((2, 0), -0.5), "site s2.*not all positive"),
        (lambda p: p.__setitem__((0, 0), 5.0), "site s0.*do not sum to 1"),
    ],
)
def test_check_probabilities_names_the_site(change, message):
    labels, probabilities = random_case(0, 4, 3)
    change(probabilities)
    with pytest.raises(InputError, match=message):
        check_probabilities(labels, probabilities, ["s0", "s1", "s2", "s3"])


def test_check_probabilities_rejects_unknown_class_and_empty_set():
    _, probabilities = random_case(0, 2, 3)
    with pytest.raises(InputError, match="site s1: label 3"):
        check_probabilities(np.array([0, 3]), probabilities, ["s0", "s1"])
    with pytest.raises(InputError, match="no sites to score"):
        check_probabilities(np.array([], dtype=int), probabilities[:0], [])

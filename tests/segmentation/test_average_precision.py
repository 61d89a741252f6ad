import numpy as np
import pytest

from perturbjax.segmentation import average_precision as precision


def _squares(*corners: tuple[int, int, int]) -> np.ndarray:
    labels = np.zeros((40, 40), np.uint16)
    for number, (top, left, side) in enumerate(corners, start=3):
        labels[top : top + side, left : left + side] = number
    return labels


def test_match_counts_objects_at_each_threshold():
    truth, labels = _squares((0, 0, 10), (20, 20, 10)), _squares((0, 0, 9), (20, 25, 10))
    matches = precision.match(truth, labels)  # overlaps 0.81 and 1/3
    assert [list(count) for count in matches] == [[1, 1, 0], [1, 1, 2], [1, 1, 2]]
    np.testing.assert_allclose(matches.average_precision, [1 / 3, 1 / 3, 0])


def test_match_uses_each_object_once():
    truth = _squares((0, 0, 20))
    halves = truth.copy()
    halves[10:20] *= 2
    assert precision.match(truth, halves, [0.5]).true_positives == [1]


def test_match_of_masks_without_background_or_objects():
    full, empty = np.ones((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    assert precision.match(full, full).average_precision.tolist() == [1, 1, 1]
    assert precision.match(empty, empty).average_precision.tolist() == [1, 1, 1]
    assert precision.match(empty, full).average_precision.tolist() == [0, 0, 0]
    assert precision.match(full, empty).average_precision.tolist() == [0, 0, 0]


def test_mean_weights_images_equally():
    good, bad = (
        precision.match(_squares((0, 0, 9)), _squares((0, 0, 9))),
        precision.match(
            _squares(*[(12 * i, 12 * j, 8) for i in range(3) for j in range(3)]),
            np.zeros((40, 40), int),
        ),
    )
    assert precision.mean([good, bad]).tolist() == [0.5, 0.5, 0.5]


def test_match_agrees_with_cellpose():
    metrics = pytest.importorskip("cellpose.metrics")
    rng = np.random.default_rng(0)
    truth = np.kron(rng.permutation(64).reshape(8, 8), np.ones((6, 6), int))
    labels = np.roll(truth, 1, axis=0) * (rng.random(truth.shape) > 0.1)
    theirs = metrics.average_precision([truth], [labels], threshold=[0.5, 0.6, 0.75])[0][0]
    np.testing.assert_allclose(
        precision.match(truth, labels, [0.5, 0.6, 0.75]).average_precision, theirs, rtol=1e-6
    )

import numpy as np
import pytest

from perturbjax.segmentation.flow_targets import masks_to_flows


def _three_objects() -> np.ndarray:
    y, x = np.mgrid[:60, :70]
    labels = np.zeros((60, 70), np.uint16)
    labels[(y - 20) ** 2 / 200 + (x - 20) ** 2 / 80 < 1] = 2
    labels[(y - 22) ** 2 / 60 + (x - 36) ** 2 / 90 < 1] = 5  # touches the first
    labels[50:, 60:] = 9  # at the corner
    return labels


def test_masks_to_flows_agrees_with_cellpose():
    dynamics = pytest.importorskip("cellpose.dynamics")
    labels = _three_objects()
    theirs = dynamics.masks_to_flows_cpu(labels.astype(np.int32))[0]
    # At the center of a symmetric object the gradient is rounding error.
    theirs[:, [20, 22], [20, 36]] = masks_to_flows(labels)[:, [20, 22], [20, 36]]
    np.testing.assert_allclose(masks_to_flows(labels), theirs, atol=1e-6)


def test_masks_to_flows_returns_unit_vectors_inside_objects():
    labels = _three_objects()
    length = np.linalg.norm(masks_to_flows(labels), axis=0)
    assert (length[labels == 0] == 0).all()
    assert np.isclose(length[labels > 0], 1, atol=1e-5).mean() > 0.98  # except the centers


def test_masks_to_flows_of_an_empty_mask():
    assert not masks_to_flows(np.zeros((5, 6), np.uint16)).any()

"""Masks computed from flows agree with those of the cellpose package, for exact and for noisy
flows."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cellpose import dynamics as theirs
from cellpose import metrics
from skimage.draw import disk

from perturbjax.segmentation import objects
from perturbjax.segmentation.objects import Rules, compute_objects

pytestmark = pytest.mark.full


def draw_field(shape, count, seed=0):
    """Draw disks at random positions; return labels and noisy maps of a perfect network."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    for number in range(1, count + 1):
        labels[disk(rng.uniform(0, shape), rng.uniform(3, 14), shape=shape)] = number
    labels = np.unique(labels, return_inverse=True)[1].reshape(shape)
    flows = theirs.masks_to_flows(labels, device=torch.device("cpu")) * 5
    flows = flows + rng.normal(0, 0.6, flows.shape)
    return labels, make_maps(labels, flows)


def make_maps(labels, flows):
    high, wide = (-(-size // 64) * 64 for size in labels.shape)
    maps = np.zeros((high, wide, 3), np.float32)
    maps[: labels.shape[0], : labels.shape[1], :2] = np.moveaxis(flows, 0, -1)
    maps[..., 2] = -5
    maps[: labels.shape[0], : labels.shape[1], 2] = np.where(labels > 0, 5, -5)
    maps[labels.shape[0] :] = 7  # outside the image: must be ignored
    return jnp.asarray(maps)


def package_masks(maps, height, width, **options):
    flows = np.asarray(maps)[:height, :width]
    arguments = {"niter": 200, "max_size_fraction": 1.0, **options}
    masks = theirs.resize_and_compute_masks(
        np.ascontiguousarray(np.moveaxis(flows[..., :2], -1, 0)),
        np.ascontiguousarray(flows[..., 2]),
        device=torch.device("cpu"),
        **arguments,
    )
    return masks.astype(int)


def agreement(truth, masks, iou=0.9):
    return metrics.average_precision(truth.astype(int), masks.astype(int), [iou])[0][0]


@pytest.mark.parametrize(
    ("shape", "count"),
    [((120, 200), 40), ((67, 64), 6), pytest.param((300, 310), 160, marks=pytest.mark.slow)],
)
def test_compute_objects_agrees_with_cellpose(shape, count):
    _, maps = draw_field(shape, count)
    labels = compute_objects(maps, *shape, 200).labels
    expected = package_masks(maps, *shape)
    assert expected.max() > count // 3
    assert labels.shape == shape and labels.dtype == np.uint16
    assert agreement(expected, labels) >= 0.98


def test_compute_objects_drops_the_same_flow_errors_as_cellpose():
    _, maps = draw_field((200, 200), 60)
    noise = np.random.default_rng(1).normal(0, 2.5, (*maps.shape[:2], 2))
    maps = maps.at[:, :100, :2].add(jnp.asarray(noise[:, :100], jnp.float32))
    dropped = package_masks(maps, 200, 200)
    every = package_masks(maps, 200, 200, flow_threshold=0)
    assert dropped.max() < every.max()
    assert agreement(dropped, compute_objects(maps, 200, 200, 200).labels, 0.75) >= 0.95
    assert (
        agreement(every, compute_objects(maps, 200, 200, 200, Rules(flow_threshold=0)).labels, 0.75)
        >= 0.95
    )


def test_implied_flow_agrees_with_cellpose():
    """For one object both use the same number of steps."""
    labels = np.zeros((48, 48), np.int32)
    labels[disk((20, 22), 11)] = 1
    labels[25:40, 20:24] = 1
    expected = theirs.masks_to_flows(labels, device=torch.device("cpu"))
    rows, columns = np.nonzero(labels)
    steps = 2 * (np.ptp(rows) + np.ptp(columns) + 2 + 4)
    ours = objects._implied_flow(jnp.asarray(labels == 1)[None], jnp.array([steps]))[0]
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 0), expected, atol=1e-4)


def test_find_holes_marks_enclosed_background():
    ring = np.zeros((64, 64), bool)
    ring[disk((32, 32), 20)] = True
    ring[disk((32, 32), 8)] = False
    filled = np.asarray(objects._find_holes(jnp.asarray(ring)[None]))[0]
    assert filled.sum() == np.pi * 64 // 1 or abs(filled.sum() - np.pi * 64) < 30
    assert not (filled & ring).any() and filled[32, 32]
    open_ring = ring.copy()
    open_ring[32:, 30:34] = False
    assert not np.asarray(objects._find_holes(jnp.asarray(open_ring)[None])).any()


def test_compute_objects_drops_small_and_large_objects():
    labels = np.zeros((128, 128), np.int32)
    labels[disk((40, 40), 30)] = 1
    labels[disk((100, 100), 8)] = 2
    maps = make_maps(labels, theirs.masks_to_flows(labels, device=torch.device("cpu")) * 5)
    assert compute_objects(maps, 128, 128, 200).labels.max() == 2
    assert compute_objects(maps, 128, 128, 200, Rules(smallest=1000)).labels.max() == 1
    remaining = compute_objects(maps, 128, 128, 200, Rules(largest=0.1)).labels
    assert remaining.max() == 1 and remaining[100, 100] == 1


def test_compute_objects_without_foreground():
    maps = jnp.full((64, 64, 3), -1.0)
    result = compute_objects(maps, 60, 50, 200)
    assert result.labels.shape == (60, 50) and not result.labels.any() and not len(result.errors)


def test_renumber_uses_32_bits_above_65535_objects():
    labels = np.arange(70_000 * 4).reshape(-1, 700)
    numbered = objects._renumber((labels // 4).astype(np.uint32), smallest=1)
    assert numbered.dtype == np.uint32 and numbered.max() == 69_999


def test_compute_objects_is_independent_of_batch_size(monkeypatch):
    _, maps = draw_field((300, 310), 160)
    small_batches = compute_objects(maps, 300, 310, 200)
    monkeypatch.setattr(objects.jax, "default_backend", lambda: "gpu")
    assert objects._batch_size(24, 160) >= 160 > objects.BATCH_PIXELS // 24**2
    assert (
        agreement(small_batches.labels, compute_objects(maps, 300, 310, 200).labels, iou=0.99) == 1
    )

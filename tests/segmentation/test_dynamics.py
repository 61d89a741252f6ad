"""Masks from flows are the package's, for flows of known objects and for noisy ones."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cellpose import dynamics as theirs
from cellpose import metrics
from skimage.draw import disk

from perturbjax.segmentation import dynamics
from perturbjax.segmentation.dynamics import Rules


def field_of(shape, objects, seed=0):
    """Labels with disks at random places, and what a perfect network would say of them, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    for number in range(1, objects + 1):
        labels[disk(rng.uniform(0, shape), rng.uniform(3, 14), shape=shape)] = number
    labels = np.unique(labels, return_inverse=True)[1].reshape(shape)
    flows = theirs.masks_to_flows(labels, device=torch.device("cpu")) * 5
    flows = flows + rng.normal(0, 0.6, flows.shape)
    return labels, maps_of(labels, flows)


def maps_of(labels, flows):
    high, wide = (-(-size // 64) * 64 for size in labels.shape)
    maps = np.zeros((high, wide, 3), np.float32)
    maps[: labels.shape[0], : labels.shape[1], :2] = np.moveaxis(flows, 0, -1)
    maps[..., 2] = -5
    maps[: labels.shape[0], : labels.shape[1], 2] = np.where(labels > 0, 5, -5)
    maps[labels.shape[0] :] = 7  # what lies beyond the image is ignored
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


def agreement(truth, found, iou=0.9):
    return metrics.average_precision(truth.astype(int), found.astype(int), [iou])[0][0]


@pytest.mark.parametrize(
    ("shape", "objects"),
    [((120, 200), 40), ((67, 64), 6), pytest.param((300, 310), 160, marks=pytest.mark.slow)],
)
def test_masks_are_the_packages(shape, objects):
    _, maps = field_of(shape, objects)
    found = dynamics.objects(maps, *shape, 200)
    expected = package_masks(maps, *shape)
    assert expected.max() > objects // 3
    assert found.labels.shape == shape and found.labels.dtype == np.uint16
    assert agreement(expected, found.labels) >= 0.98


def test_objects_whose_flow_disagrees_are_dropped_as_the_package_drops_them():
    _, maps = field_of((200, 200), 60)
    noise = np.random.default_rng(1).normal(0, 2.5, (*maps.shape[:2], 2))
    maps = maps.at[:, :100, :2].add(jnp.asarray(noise[:, :100], jnp.float32))
    dropped = package_masks(maps, 200, 200)
    every = package_masks(maps, 200, 200, flow_threshold=0)
    assert dropped.max() < every.max()
    assert agreement(dropped, dynamics.objects(maps, 200, 200, 200).labels, 0.75) >= 0.95
    assert (
        agreement(
            every, dynamics.objects(maps, 200, 200, 200, Rules(flow_threshold=0)).labels, 0.75
        )
        >= 0.95
    )


def test_flows_of_masks_are_the_packages():
    """Of one object, for which the package's number of steps is ours."""
    labels = np.zeros((48, 48), np.int32)
    labels[disk((20, 22), 11)] = 1
    labels[25:40, 20:24] = 1
    expected = theirs.masks_to_flows(labels, device=torch.device("cpu"))
    rows, columns = np.nonzero(labels)
    steps = 2 * (np.ptp(rows) + np.ptp(columns) + 2 + 4)
    ours = dynamics._flow_of(jnp.asarray(labels == 1)[None], jnp.array([steps]))[0]
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 0), expected, atol=1e-4)


def test_holes_are_filled_and_what_lies_in_them_goes_to_the_object_around():
    ring = np.zeros((64, 64), bool)
    ring[disk((32, 32), 20)] = True
    ring[disk((32, 32), 8)] = False
    filled = np.asarray(dynamics._holes(jnp.asarray(ring)[None]))[0]
    assert filled.sum() == np.pi * 64 // 1 or abs(filled.sum() - np.pi * 64) < 30
    assert not (filled & ring).any() and filled[32, 32]
    open_ring = ring.copy()
    open_ring[32:, 30:34] = False
    assert not np.asarray(dynamics._holes(jnp.asarray(open_ring)[None])).any()


def test_small_and_large_objects_are_dropped():
    labels = np.zeros((128, 128), np.int32)
    labels[disk((40, 40), 30)] = 1
    labels[disk((100, 100), 8)] = 2
    maps = maps_of(labels, theirs.masks_to_flows(labels, device=torch.device("cpu")) * 5)
    assert dynamics.objects(maps, 128, 128, 200).labels.max() == 2
    assert dynamics.objects(maps, 128, 128, 200, Rules(smallest=1000)).labels.max() == 1
    found = dynamics.objects(maps, 128, 128, 200, Rules(largest=0.1)).labels
    assert found.max() == 1 and found[100, 100] == 1


def test_nothing_is_found_where_nothing_is():
    maps = jnp.full((64, 64, 3), -1.0)
    found = dynamics.objects(maps, 60, 50, 200)
    assert found.labels.shape == (60, 50) and not found.labels.any() and not len(found.errors)


def test_more_objects_than_16_bits_number_get_32():
    labels = np.arange(70_000 * 4).reshape(-1, 700)
    numbered = dynamics._numbered((labels // 4).astype(np.uint32), smallest=1)
    assert numbered.dtype == np.uint32 and numbered.max() == 69_999


def test_an_accelerator_which_judges_all_objects_at_once_finds_the_same(monkeypatch):
    _, maps = field_of((300, 310), 160)
    apart = dynamics.objects(maps, 300, 310, 200)
    monkeypatch.setattr(dynamics.jax, "default_backend", lambda: "gpu")
    assert dynamics._together(24, 160) >= 160 > dynamics.BATCH_PIXELS // 24**2
    assert agreement(apart.labels, dynamics.objects(maps, 300, 310, 200).labels, iou=0.99) == 1

"""Bags of cells as network input."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fields import write_fields

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data.bags import CellBags, prepare_input
from perturbjax.data.batches import BatchRecords, Decoder, describe_sites
from perturbjax.dataset import open_dataset

pytestmark = pytest.mark.full

INPUT = InputConfig(normalize="log", cells=5, cells_per_step=3, cell_size=16)
AUGMENT = AugmentConfig(crop=16, crop_scale=(0.8, 1.0), crop_ratio=(1.0, 1.0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Sites with 0, 1, 4 and 9 cells, of different sizes."""
    path = tmp_path_factory.mktemp("bags") / "data"
    return open_dataset(write_fields(path, cells=[0, 1, 4, 9, 4, 4], sizes=[96, 96, 128]))


def read(dataset, positions):
    sites = describe_sites(dataset, INPUT)
    positions = np.array(positions, np.int32)
    records = BatchRecords(positions, np.ones(len(positions), np.float32))
    return jax.tree.map(jnp.asarray, Decoder(dataset, sites, INPUT, AUGMENT)(records))


def test_windows_contain_one_cell_each_and_zeros_after_the_last(dataset):
    bags = CellBags(dataset, INPUT)
    assert bags.image_size == (80, 16)
    for position, cells in enumerate([0, 1, 4, 5]):
        image, mask = (array.reshape(5, 16, 16, -1) for array in bags.pixels(position))
        labels = [np.unique(window[window > 0]) for window in mask]
        assert [len(one) for one in labels] == [1] * cells + [0] * (5 - cells)
        assert (image[:cells].max((1, 2, 3)) > 0).all() and not image[cells:].any()


def prepare(batch, epoch, train):
    return prepare_input(batch, seed=0, epoch=epoch, augment=AUGMENT, input=INPUT, train=train)


def test_training_chooses_present_cells_in_each_epoch(dataset):
    batch = read(dataset, [0, 1, 2, 3])
    first, second = (prepare(batch, epoch, True) for epoch in (0, 1))
    assert first.windows.shape == (4, 3, 16, 16, 3)
    for bags in (first, second):
        assert np.asarray(bags.present).sum(1).tolist() == [0, 1, 3, 3]
    assert not np.allclose(first.windows[3], second.windows[3])
    whole = prepare(batch, 0, False)
    assert np.asarray(whole.present).sum(1).tolist() == [0, 1, 4, 5]


def test_input_of_a_site_does_not_depend_on_its_batch(dataset):
    together = prepare(read(dataset, [1, 3, 2]), 4, True)
    for row, position in enumerate([1, 3, 2]):
        alone = prepare(read(dataset, [position]), 4, True)
        np.testing.assert_allclose(alone.windows[0], together.windows[row], atol=1e-5)
    # Different cells of a site are augmented differently.
    keys = jax.vmap(lambda window: window.std())(together.windows[1].reshape(3, -1))
    assert len(np.unique(np.asarray(keys))) == 3


def test_ablations_keep_cells_present(dataset):
    batch = read(dataset, [3])
    blank = prepare_input(
        batch, seed=0, epoch=0, augment=AUGMENT, input=replace(INPUT, mask_use="none"), train=False
    )
    assert not blank.windows[..., 0].any() and blank.present.sum() == 5

"""What each encoding of the mask channel holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from perturbjax.core.choices import MASK_ENCODINGS
from perturbjax.data import mask_encodings as masks

TOUCHING = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 2, 2, 2, 0],
        [0, 1, 1, 1, 2, 2, 2, 0],
        [0, 1, 1, 1, 2, 2, 2, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.uint16,
)


def test_instance_keeps_the_numbers():
    assert np.array_equal(masks.encode(TOUCHING, "instance"), TOUCHING)


def test_binary_marks_cells():
    assert np.array_equal(masks.encode(TOUCHING, "binary"), TOUCHING > 0)


def test_boundary_runs_between_touching_cells():
    inside = np.zeros_like(TOUCHING, bool)
    inside[2, [2, 5]] = True
    assert np.array_equal(masks.encode(TOUCHING, "boundary"), (TOUCHING > 0) & ~inside)


@pytest.mark.parametrize("how", ["boundary", "distance"])
def test_the_border_of_the_site_is_no_outline(how):
    half = np.zeros((6, 6), np.uint16)
    half[:, :3] = 1
    encoded = masks.encode(half, how)
    assert np.array_equal(encoded, np.repeat(encoded[:1], 6, axis=0))


@given(arrays(np.uint16, (9, 11), elements=st.integers(0, 3)))
def test_distance_is_that_of_every_cell_on_its_own(mask):
    encoded = masks.encode(mask, "distance")
    for cell in np.unique(mask[mask > 0]):
        inside = mask == cell
        outline = masks.encode(inside.astype(np.uint16), "boundary")
        if not outline.any():
            assert (encoded[inside] == 255).all()
            continue
        depth = (ndimage.distance_transform_edt(outline == 0) + 1)[inside]
        assert np.abs(encoded[inside] - 255 * depth / depth.max()).max() <= 0.5 + 1e-6
    assert (encoded[mask == 0] == 0).all()


@pytest.mark.parametrize("how", MASK_ENCODINGS)
def test_an_empty_site_stays_empty_and_dtypes_are_as_announced(how):
    for mask in (np.zeros((5, 5), np.uint16), TOUCHING):
        assert masks.encode(mask, how).dtype == masks.storage_dtype(how)
    assert not masks.encode(np.zeros((5, 5), np.uint16), how).any()


@pytest.mark.parametrize("how", ["binary", "boundary", "distance"])
def test_the_channel_spans_zero_to_one(how):
    channel = masks.encode(TOUCHING, how) * MASK_ENCODINGS[how].scale
    assert (channel.min(), channel.max()) == (0, 1)

"""Values of each encoding of the mask channel."""

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


def test_instance_encoding_keeps_labels():
    assert np.array_equal(masks.encode(TOUCHING, "instance"), TOUCHING)


def test_binary_encoding_marks_cells():
    assert np.array_equal(masks.encode(TOUCHING, "binary"), TOUCHING > 0)


def test_boundary_encoding_separates_touching_cells():
    inside = np.zeros_like(TOUCHING, bool)
    inside[2, [2, 5]] = True
    assert np.array_equal(masks.encode(TOUCHING, "boundary"), (TOUCHING > 0) & ~inside)


@pytest.mark.parametrize("how", ["boundary", "distance"])
def test_site_border_is_not_an_outline(how):
    half = np.zeros((6, 6), np.uint16)
    half[:, :3] = 1
    encoded = masks.encode(half, how)
    assert np.array_equal(encoded, np.repeat(encoded[:1], 6, axis=0))


@given(arrays(np.uint16, (9, 11), elements=st.integers(0, 3)))
def test_distance_encoding_treats_cells_separately(mask):
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
def test_encode_keeps_empty_sites_and_returns_storage_dtype(how):
    for mask in (np.zeros((5, 5), np.uint16), TOUCHING):
        assert masks.encode(mask, how).dtype == masks.storage_dtype(how)
    assert not masks.encode(np.zeros((5, 5), np.uint16), how).any()


@pytest.mark.parametrize("how", ["binary", "boundary", "distance"])
def test_mask_channel_ranges_from_0_to_1(how):
    channel = masks.encode(TOUCHING, how) * MASK_ENCODINGS[how].scale
    assert (channel.min(), channel.max()) == (0, 1)

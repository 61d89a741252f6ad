"""Aggregation and resizing of channels."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from data_prep.channel_images import aggregate_channels, resize_image, resize_mask, stack_planes
from data_prep.sources import Plane, read_planes


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65535, (40, 30, 4), dtype=np.uint16, endpoint=True)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("how", ["median", "mean", "max"])
def test_aggregate_channels_equals_numpy_after_rounding(image, how, channels):
    expected = np.rint(getattr(np, how)(image[..., :channels].astype(float), axis=-1))
    result = aggregate_channels(image[..., :channels], how)
    assert result.dtype == np.uint16
    np.testing.assert_array_equal(result[..., 0], expected)


def test_aggregate_none_keeps_all_channels(image):
    assert aggregate_channels(image, "none") is image


def test_resize_image_preserves_mean_and_type(image):
    small = resize_image(image, 10)
    assert small.shape == (10, 10, 4) and small.dtype == np.uint16
    np.testing.assert_allclose(small.mean((0, 1)), image.mean((0, 1)), rtol=0.001)


def test_resize_mask_does_not_mix_labels():
    mask = np.zeros((20, 20), np.uint16)
    mask[:10], mask[10:, 10:] = 7, 300
    small = resize_mask(mask, 10)
    assert small.dtype == np.uint16 and set(np.unique(small)) == {0, 7, 300}
    np.testing.assert_array_equal(small, mask[1::2, 1::2])


def test_stack_planes_promotes_mixed_bit_depths(tmp_path):
    a, b = tmp_path / "a.tiff", tmp_path / "b.tiff"
    tifffile.imwrite(a, np.full((8, 8), 200, np.uint8))
    tifffile.imwrite(b, np.full((8, 8), 4000, np.uint16))
    planes = read_planes([Plane(str(a)), Plane(str(b))], "row 2")
    assert stack_planes(planes, list(planes)[:1], "row 2").dtype == np.uint8
    assert stack_planes(planes, list(planes), "row 2").dtype == np.uint16

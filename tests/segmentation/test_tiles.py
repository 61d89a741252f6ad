"""Tiles are the package's: what its network would see, and what it makes of the maps."""

import numpy as np
import pytest
from cellpose import transforms

from perturbjax.segmentation import tiles

SHAPES = [
    ((1, 1), 1.0),
    ((17, 40), 1.0),
    ((300, 190), 1.0),
    ((500, 225), 0.77),
    ((256, 320), 1.286),
    ((301, 97), 3.0),
]


def package_tiles(image, rescale):
    """As `core.run_net` cuts them; the padded image's shape beside."""
    scaled = transforms.resize_image(image, rsz=[rescale] * 2) if rescale != 1 else image
    y1, y2, x1, x2 = transforms.get_pad_yx(*scaled.shape[:2])
    padded = np.pad(scaled.transpose(2, 0, 1), [(0, 0), (y1, y2), (x1, x2)])
    cut, rows, columns, *shape = transforms.make_tiles(padded)
    return (
        cut.reshape(-1, *cut.shape[2:]).transpose(0, 2, 3, 1),
        rows,
        columns,
        shape,
        (y1, y2, x1, x2),
    )


def our_tiles(image, rescale):
    plan = tiles.Plan(*image.shape[:2], rescale)
    more = [(0, padded - size) for padded, size in zip(plan.padded, image.shape[:2], strict=True)]
    ends = tiles.percentiles(image)
    joined = tiles.cut(np.pad(image, (*more, (0, 0)))[None], ends[None], plan.y.cut, plan.x.cut)
    return plan, tiles.chunk(joined, (plan.y.tiles, plan.x.tiles), 0, plan.count)


@pytest.mark.parametrize(("shape", "rescale"), SHAPES)
def test_cutting_is_the_packages(shape, rescale):
    image = np.random.default_rng(0).integers(0, 60000, (*shape, 2)).astype(np.uint16)
    normal = (
        transforms.normalize_img(image.astype(np.float32))
        if min(shape) > 1
        else np.zeros((*shape, 2), np.float32)
    )
    expected = package_tiles(normal, rescale)[0]
    plan, ours = our_tiles(image, rescale)
    assert ours.shape == expected.shape and plan.tile == expected.shape[1:3]
    np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize(("shape", "rescale"), SHAPES)
def test_putting_together_is_the_packages(shape, rescale):
    image = np.random.default_rng(0).random((*shape, 3)).astype(np.float32)
    cut, rows, columns, size, (y1, y2, x1, x2) = package_tiles(image, rescale)
    maps = np.random.default_rng(1).normal(size=cut.shape).astype(np.float32)
    expected = transforms.average_tiles(maps.transpose(0, 3, 1, 2), rows, columns, *size)
    expected = expected[:, y1 : size[0] - y2, x1 : size[1] - x2].transpose(1, 2, 0)
    if rescale != 1:
        expected = transforms.resize_image(expected, *shape)
    plan = tiles.Plan(*shape, rescale)
    high, wide = plan.padded
    halves = (maps[: len(maps) // 2], maps[len(maps) // 2 :])
    ours = tiles.join(halves, plan.y.join(high), plan.x.join(wide), (plan.y.tiles, plan.x.tiles), 1)
    np.testing.assert_allclose(
        ours[0, : shape[0], : shape[1]], expected.reshape(*shape, 3), atol=2e-5
    )
    assert not np.asarray(ours[0, shape[0] :]).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int32])
def test_percentiles_are_numpys(dtype):
    image = np.random.default_rng(0).gamma(2, 20, (97, 53, 2)).astype(dtype)
    low, span = tiles.percentiles(image).T
    first, last = (
        np.percentile(image.astype(np.float32), each, axis=(0, 1)) for each in (1.0, 99.0)
    )
    np.testing.assert_allclose(low, first, rtol=1e-6)
    np.testing.assert_allclose(low + span, last, rtol=1e-6)


def test_a_channel_without_contrast_becomes_zero_and_nan_counts_as_nothing():
    image = np.full((40, 40, 1), 65535, np.uint16)
    assert not np.asarray(our_tiles(image, 1.0)[1]).any()
    image = np.random.default_rng(0).random((40, 40, 1)).astype(np.float32)
    image[3, 4] = np.nan
    assert np.isfinite(our_tiles(image, 1.0)[1]).all()

"""Tiles and their reassembly agree with the cellpose package."""

import numpy as np
import pytest
from cellpose import transforms

from perturbjax.segmentation import tiles
from perturbjax.segmentation.foreground import percentiles

SHAPES = [
    ((1, 1), 1.0),
    ((17, 40), 1.0),
    ((300, 190), 1.0),
    ((500, 225), 0.77),
    ((256, 320), 1.286),
    ((301, 97), 3.0),
]


def package_tiles(image, rescale):
    """Cut tiles like `cellpose.core.run_net`; return them with the shape of the padded image."""
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
    padding = [
        (0, padded - size) for padded, size in zip(plan.padded, image.shape[:2], strict=True)
    ]
    ends = [percentiles(image[..., channel]) for channel in range(image.shape[2])]
    ranges = np.array(
        [(low, high - low if high > low else np.inf) for low, high in ends], np.float32
    )
    joined = tiles.cut(
        np.pad(image, (*padding, (0, 0)))[None], ranges[None], plan.y.cut, plan.x.cut
    )
    return plan, tiles.chunk(joined, (plan.y.tiles, plan.x.tiles), 0, plan.count)


@pytest.mark.parametrize(("shape", "rescale"), SHAPES)
def test_cut_agrees_with_cellpose(shape, rescale):
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
def test_join_agrees_with_cellpose(shape, rescale):
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
def test_percentiles_agree_with_numpy(dtype):
    plane = np.random.default_rng(0).gamma(2, 20, (97, 53)).astype(dtype)
    expected = np.percentile(plane.astype(np.float32), (1.0, 99.0))
    np.testing.assert_allclose(percentiles(plane), expected, rtol=1e-6)


def test_cut_maps_a_constant_channel_and_nan_to_zero():
    image = np.full((40, 40, 1), 65535, np.uint16)
    assert not np.asarray(our_tiles(image, 1.0)[1]).any()
    image = np.random.default_rng(0).random((40, 40, 1)).astype(np.float32)
    image[3, 4] = np.nan
    assert np.isfinite(our_tiles(image, 1.0)[1]).all()

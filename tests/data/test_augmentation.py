"""Augmentation transforms image and mask alike and depends on (seed, epoch, record) only."""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data import augmentation as augment
from perturbjax.data.augmentation import RawBatch, prepare

SIZE = 32
IDENTITY = AugmentConfig(
    crop=SIZE, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False, rotate=0.0
)
AUGMENTED = dataclasses.replace(
    IDENTITY, crop_scale=(0.2, 1.0), crop_ratio=(0.75, 4 / 3), flip=True, rotate=180.0
)
INSTANCE = InputConfig(mask_encoding="instance")


@functools.partial(jax.jit, static_argnames=("augment", "input", "train"))
def prepared(raw, seed=0, epoch=0, *, augment, input=INSTANCE, train=True):
    return prepare(raw, seed=seed, epoch=epoch, augment=augment, input=input, train=train)


def as_batch(image, mask, records=None):
    """Images (b, h, w[, c]) and masks (b, h, w), without normalization."""
    image = image if image.ndim == 4 else image[..., None]
    b, c = image.shape[0], image.shape[-1]
    records = np.arange(b) if records is None else records
    return RawBatch(
        image=jnp.asarray(image),
        mask=jnp.asarray(mask),
        label=jnp.zeros(b, jnp.int32),
        record=jnp.asarray(records, jnp.int32),
        weight=jnp.ones(b),
        shift=jnp.zeros((b, c)),
        scale=jnp.ones((b, c)),
    )


@pytest.fixture(scope="module")
def sites():
    """16 sites of blobs: connected components of smooth noise above its median."""
    noise = ndimage.gaussian_filter(
        np.random.default_rng(0).normal(size=(16, SIZE, SIZE)), (0, 3, 3)
    )
    mask = np.stack([ndimage.label(site > np.median(site))[0] for site in noise]).astype(np.uint16)
    image = np.random.default_rng(1).integers(0, 60000, (16, SIZE, SIZE, 2), dtype=np.uint16)
    return image, mask


@pytest.mark.parametrize("train", [True, False])
def test_prepare_without_augmentation_keeps_pixels(sites, train):
    image, mask = sites
    out = np.asarray(prepared(as_batch(image, mask), augment=IDENTITY, train=train))
    assert np.array_equal(out[..., 0], mask)
    np.testing.assert_allclose(out[..., 1:], image, atol=60000 * 1e-5)


def test_prepare_applies_shift_and_scale(sites):
    image, mask = sites
    shift, scale = np.random.default_rng(2).uniform(1, 2, (2, 16, 2)).astype(np.float32)
    raw = as_batch(image, mask)._replace(shift=jnp.asarray(shift), scale=jnp.asarray(scale))
    expected = (image - shift[:, None, None]) * scale[:, None, None]
    np.testing.assert_allclose(
        prepared(raw, augment=IDENTITY)[..., 1:], expected, atol=120000 * 1e-5
    )


def test_image_and_mask_get_the_same_transform(sites):
    _, mask = sites
    cells = (mask > 0).astype(np.uint16)
    out = np.asarray(prepared(as_batch(1000 * cells, cells), augment=AUGMENTED))
    transformed_mask, transformed_image = out[..., 0], out[..., 1] / 1000
    pure = (transformed_image < 1e-3) | (transformed_image > 1 - 1e-3)
    assert pure.mean() > 0.5  # away from edges, bilinear and nearest sampling agree
    assert np.array_equal(transformed_image[pure] > 0.5, transformed_mask[pure] == 1)
    assert not np.array_equal(transformed_mask, cells)


def test_mask_labels_are_never_interpolated(sites):
    image, mask = sites
    numbers = 1000 * (mask + 1)
    out = np.asarray(prepared(as_batch(image, numbers), augment=AUGMENTED))[..., 0]
    for before, after in zip(numbers, out, strict=True):
        assert set(np.unique(after)) <= set(np.unique(before))


@jax.jit
def transform(image, mask, angle=0.0, mirror=(1.0, 1.0)):
    b = len(image)
    boxes = augment._Boxes(
        center=jnp.full((b, 2), SIZE / 2),
        size=jnp.full((b, 2), float(SIZE)),
        angle=jnp.full(b, angle),
        mirror=jnp.tile(jnp.array(mirror), (b, 1)),
    )
    points = augment._source_points(boxes, boxes.center, SIZE)
    return augment._bilinear(image, points, 1), augment._nearest(mask, points)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_rotation_by_90_degrees_is_exact(sites, quarters):
    image, mask = transform(*sites, angle=quarters * math.pi / 2)
    assert np.array_equal(mask, np.rot90(sites[1], quarters, axes=(1, 2)))
    np.testing.assert_allclose(image, np.rot90(sites[0], quarters, axes=(1, 2)), atol=60000 * 2e-5)


@pytest.mark.parametrize(("mirror", "axis"), [((-1.0, 1.0), 1), ((1.0, -1.0), 2)])
def test_flip_is_exact(sites, mirror, axis):
    image, mask = transform(*sites, mirror=mirror)
    assert np.array_equal(mask, np.flip(sites[1], axis))
    np.testing.assert_allclose(image, np.flip(sites[0], axis), atol=60000 * 2e-5)


def test_flips_are_equally_frequent():
    b = 4096
    corner = np.zeros((b, 2, 2), np.uint16)
    corner[:, 0, 0] = 1
    flips = dataclasses.replace(IDENTITY, crop=2, flip=True)
    mask = np.asarray(prepared(as_batch(corner, corner), augment=flips))[..., 0]
    where = mask.reshape(b, 4).argmax(1)
    assert stats.chisquare(np.bincount(where, minlength=4)).pvalue > 1e-3


def test_crops_have_configured_areas_and_ratios_and_lie_inside():
    config = dataclasses.replace(AUGMENTED, crop_scale=(0.1, 0.5), crop_ratio=(0.8, 1.25))
    draws = jax.random.uniform(jax.random.key(0), (4096, len(augment._GEOMETRY)))
    boxes = jax.jit(lambda draws: augment._random_boxes(draws, 100, 100, config))(draws)
    center, size = np.asarray(boxes.center), np.asarray(boxes.size)
    area, ratio = size.prod(1) / 1e4, size[:, 1] / size[:, 0]
    assert stats.kstest(area, stats.uniform(0.1, 0.4).cdf).pvalue > 1e-3
    log_ratio = stats.uniform(math.log(0.8), math.log(1.25) - math.log(0.8))
    assert stats.kstest(np.log(ratio), log_ratio.cdf).pvalue > 1e-3
    assert (center - size / 2).min() >= -1e-3
    assert (center + size / 2).max() <= 100 + 1e-3


def test_crops_cover_the_site():
    b = 2048
    numbers = np.broadcast_to(
        np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE), (b, SIZE, SIZE)
    )
    config = dataclasses.replace(IDENTITY, crop_scale=(0.2, 0.4))
    labels = np.asarray(prepared(as_batch(numbers, numbers), augment=config))[..., 0]
    assert len(np.unique(labels)) == SIZE * SIZE


def test_rotated_corners_are_filled_by_reflection():
    cells = np.full((16, SIZE, SIZE), 7, np.uint16)
    out = np.asarray(
        prepared(as_batch(cells, cells), augment=dataclasses.replace(IDENTITY, rotate=180.0))
    )
    np.testing.assert_allclose(out, 7, rtol=1e-6)


def test_augmentation_does_not_depend_on_the_batch(sites):
    image, mask = sites
    whole = np.asarray(prepared(as_batch(image, mask), augment=AUGMENTED))
    reverse = prepared(as_batch(image[::-1], mask[::-1], np.arange(16)[::-1]), augment=AUGMENTED)
    assert np.array_equal(reverse[::-1], whole)
    few = np.asarray(prepared(as_batch(image[5:8], mask[5:8], np.arange(5, 8)), augment=AUGMENTED))
    assert np.array_equal(few[..., 0], whole[5:8, ..., 0])
    np.testing.assert_allclose(few[..., 1:], whole[5:8, ..., 1:], atol=0.05)


def test_augmentation_depends_on_seed_epoch_and_record(sites):
    image, mask = (np.repeat(array[:1], 2, axis=0) for array in sites)
    raw = as_batch(image, mask)
    first = np.asarray(prepared(raw, 0, 0, augment=AUGMENTED))
    assert np.array_equal(first, prepared(raw, 0, 0, augment=AUGMENTED))
    for other in (prepared(raw, 1, 0, augment=AUGMENTED), prepared(raw, 0, 1, augment=AUGMENTED)):
        assert np.abs(first - other).mean() > 1000
    assert np.abs(first[0] - first[1]).mean() > 1000


def test_evaluation_does_not_depend_on_seed_and_epoch(sites):
    raw = as_batch(*sites)
    first, second = (prepared(raw, seed, seed, augment=AUGMENTED, train=False) for seed in (0, 1))
    assert np.array_equal(first, second)


def test_prepare_is_traced_once_for_all_seeds_and_epochs(sites):
    raw = as_batch(*sites)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(raw, seed, epoch):
        return prepare(raw, seed=seed, epoch=epoch, augment=AUGMENTED, input=INSTANCE, train=True)

    for i in range(3):
        step(raw._replace(record=raw.record + i), i, i)


@pytest.mark.parametrize("train", [True, False])
def test_downsampling_averages_pixels(train):
    """A checkerboard of single pixels becomes gray at an eighth of its size; subsampling would give
    black and white.
    """
    board = (np.indices((256, 256)).sum(0) % 2 * 1000).astype(np.uint16)
    image = np.stack([board, np.roll(board, 1, axis=0)])
    config = dataclasses.replace(IDENTITY, crop=32, rotate=180.0)
    out = np.asarray(prepared(as_batch(image, image), augment=config, train=train))[..., 1]
    np.testing.assert_allclose(out, 500, atol=5)


def test_crops_of_all_sizes_keep_sharpness():
    """Waves of four output pixels a period survive for all crop areas."""
    size, b = 256, 64
    config = dataclasses.replace(IDENTITY, crop=32, crop_scale=(0.05, 1.0))
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(augment._GEOMETRY) + 2,)))(
        augment.record_keys(0, 0, jnp.arange(b))
    )
    height = np.asarray(augment._random_boxes(draws, size, size, config).size)[:, 0]
    wave = np.sin(2 * np.pi * np.arange(size) / (4 * height[:, None] / 32))
    image = np.rint(1000 + 1000 * np.broadcast_to(wave[:, None, :], (b, size, size))).astype(
        np.uint16
    )
    out = np.asarray(prepared(as_batch(image, image), augment=config))[..., 1]
    contrast = out.std((1, 2)) / 1000 * math.sqrt(2)
    assert contrast.min() > 0.4


@pytest.mark.parametrize(("use", "channel"), [("none", 0), ("only", 1)])
def test_mask_use_zeroes_mask_or_image(sites, use, channel):
    raw = as_batch(*sites)
    full = np.array(prepared(raw, augment=AUGMENTED))
    full[..., channel : channel + 1 if channel == 0 else None] = 0
    blanked = prepared(raw, augment=AUGMENTED, input=dataclasses.replace(INSTANCE, mask_use=use))
    np.testing.assert_allclose(blanked, full, rtol=1e-5, atol=0.05)


def test_legacy_augmentation_rotates_image_but_not_mask(sites):
    raw = as_batch(*sites)
    identity, legacy = (
        dataclasses.replace(IDENTITY, flip=f, rotate=r, legacy_augmentation=f)
        for f, r in ((False, 0), (True, 90))
    )
    before, after = (np.asarray(prepared(raw, augment=config)) for config in (identity, legacy))
    assert np.array_equal(after[..., 0], before[..., 0])
    assert np.abs(after[..., 1:] - before[..., 1:]).mean() > 1000
    tested = prepared(raw, augment=legacy, train=False)
    np.testing.assert_allclose(tested, after, atol=0.05)  # test images are augmented too


def test_legacy_augmentation_crops_image_and_mask_alike(sites):
    _, mask = sites
    cells = (mask > 0).astype(np.uint16)
    config = dataclasses.replace(IDENTITY, crop_scale=(0.3, 0.6), legacy_augmentation=True)
    mask, image = np.moveaxis(np.asarray(prepared(as_batch(cells, cells), augment=config)), -1, 0)
    np.testing.assert_allclose(image, mask, atol=1e-5)
    assert ((mask > 0.01) & (mask < 0.99)).any()  # interpolated, as in the original program
    assert not np.array_equal(mask, cells)


def test_legacy_augmentation_leaves_rotated_corners_black():
    cells = np.full((16, SIZE, SIZE), 7, np.uint16)
    config = dataclasses.replace(IDENTITY, rotate=180.0, legacy_augmentation=True)
    out = np.asarray(prepared(as_batch(cells, cells), augment=config))
    assert (out[..., 0] == 7).all()
    assert (out[..., 1] == 0).any() and np.isclose(out[:, SIZE // 2, SIZE // 2, 1], 7).all()


def test_brightness_and_contrast_stay_in_range_and_keep_the_mask():
    flat = np.ones((512, 4, 4, 2), np.uint16)
    config = dataclasses.replace(IDENTITY, crop=4, brightness=0.25, contrast=0.5)
    out = np.asarray(prepared(as_batch(flat, flat[..., 0]), augment=config))
    assert (out[..., 0] == 1).all()
    values = out[:, 0, 0, 1:]
    assert 0.25 <= values.min() < 0.4 and 1.6 < values.max() <= 1.75
    assert np.abs(np.corrcoef(values.T)[0, 1]) < 0.15  # independent for each channel
    tested = prepared(as_batch(flat, flat[..., 0]), augment=config, train=False)
    np.testing.assert_allclose(tested, 1, rtol=1e-6)


def test_sampling_keeps_whole_sites_of_the_output_size():
    """For sizes that are powers of 2, `prepare` can therefore leave sampling out."""
    pixels = np.random.default_rng(0).integers(0, 65536, (2, 16, 16, 3)).astype(np.uint16)
    config = AugmentConfig(crop=16)
    boxes = augment._whole_sites(jnp.zeros((2, 1)), 16, 16)
    points = augment._source_points(boxes, boxes.center, 16)
    image = augment._sample_image(jnp.asarray(pixels), points, boxes, config, False)
    mask = augment._sample_mask(jnp.asarray(pixels[..., 0]), points, config, False)
    assert np.array_equal(image, pixels) and np.array_equal(mask, pixels[..., 0])

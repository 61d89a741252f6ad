"""What a TPU computes in place of looking pixels up is the same images and masks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data.augmentation import RawBatch, prepare
from perturbjax.models.kernels import resampling as lookup

EINSUM = jnp.einsum
#: What is tried: (height, width), what is changed of the recipe, dtype of the masks.
CASES = [
    ((32, 32), {"crop": 16}, np.uint8),
    ((33, 61), {"crop": 17, "crop_scale": (0.05, 1.0)}, np.uint16),
    ((20, 60), {"crop": 16, "crop_scale": (0.5, 1.0)}, np.uint8),
    ((32, 32), {"crop": 16, "rotate": 0.0}, np.uint8),
    ((32, 32), {"crop": 16, "legacy_augmentation": True}, np.uint8),
]


def by_halves(what, *factors, precision):
    """Matrix products as a TPU's: of floats the first 8 bits, for "high" the next 8 too, but not times each other."""
    if precision == "highest":
        return EINSUM(what, *factors)
    first = [jax.lax.reduce_precision(factor, 8, 7) for factor in factors]
    total = EINSUM(what, *first)
    if precision == "high":
        rest = [
            jax.lax.reduce_precision(factor - part, 8, 7)
            for factor, part in zip(factors, first, strict=True)
        ]
        total = total + EINSUM(what, first[0], rest[1]) + EINSUM(what, rest[0], first[1])
    return total


@pytest.mark.parametrize(("shape", "changes", "dtype"), CASES)
def test_products_make_the_images_of_look_ups(shape, changes, dtype, monkeypatch):
    """Images of noise, in which no error hides, to 1e-5 of white. A mask may differ where a place falls on a border."""
    random, b, white = np.random.default_rng(0), 16, 65535
    raw = RawBatch(
        image=random.integers(0, white, (b, *shape, 1), dtype=np.uint16, endpoint=True),
        mask=random.integers(0, np.iinfo(dtype).max, (b, *shape), dtype=dtype, endpoint=True),
        label=np.zeros(b, np.int32),
        record=np.arange(b, dtype=np.int32),
        weight=np.ones(b, np.float32),
        shift=np.zeros((b, 1), np.float32),
        scale=np.full((b, 1), 1 / white, np.float32),
    )
    config, numbers = AugmentConfig(**changes), InputConfig(mask_encoding="instance")

    def seen(train):
        way = functools.partial(
            prepare, seed=0, epoch=1, augment=config, input=numbers, train=train
        )
        return np.asarray(jax.jit(way)(raw))

    expected = [seen(train) for train in (True, False)]
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *args, default, **ways: ways.get("tpu", default)(*args),
    )
    monkeypatch.setattr(jnp, "einsum", by_halves)
    monkeypatch.setattr(lookup, "WINDOW", 40)  # so that small images are dealt into tiles, too
    for got, wanted in zip((seen(True), seen(False)), expected, strict=True):
        np.testing.assert_allclose(got[..., 1:], wanted[..., 1:], atol=1e-5)
        if config.legacy_augmentation:
            np.testing.assert_allclose(got[..., 0], wanted[..., 0], atol=1e-5 * np.iinfo(dtype).max)
        else:
            assert (got[..., 0] != wanted[..., 0]).mean() < 1e-4


@pytest.mark.parametrize(
    ("rows", "columns", "step"), [(128, 128, 1.7), (17, 224, 0.3), (1, 5, 0.1), (64, 64, 9.0)]
)
def test_windows_are_no_larger_than_what_is_multiplied_at_a_time(rows, columns, step):
    tall, wide, side = lookup._tile_shape(rows, columns, step)
    assert side <= lookup.WINDOW
    assert (
        side >= step * np.hypot(tall - 1, wide - 1) + 2
    )  # the places of a turned tile, and a neighbour on each side

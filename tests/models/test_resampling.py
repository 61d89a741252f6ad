"""Resampling by matrix products gives the images and masks of resampling by gathers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.core.config import AugmentConfig, InputConfig
from perturbjax.data.augmentation import RawBatch, prepare
from perturbjax.models.kernels import resampling as lookup

pytestmark = pytest.mark.full

EINSUM = jnp.einsum
#: (height, width), changes of the recipe, dtype of masks.
CASES = [
    ((32, 32), {"crop": 16}, np.uint8),
    ((33, 61), {"crop": 17, "crop_scale": (0.05, 1.0)}, np.uint16),
    ((20, 60), {"crop": 16, "crop_scale": (0.5, 1.0)}, np.uint8),
    ((32, 32), {"crop": 16, "rotate": 0.0}, np.uint8),
    ((32, 32), {"crop": 16, "legacy_augmentation": True}, np.uint8),
]


def emulate_tpu_einsum(subscripts, *factors, precision):
    """Emulate a TPU's matrix products.

    "default" multiplies the first 8 bits of floats. "high" adds the products of the first with
    the next 8 bits.
    """
    if precision == "highest":
        return EINSUM(subscripts, *factors)
    first = [jax.lax.reduce_precision(factor, 8, 7) for factor in factors]
    total = EINSUM(subscripts, *first)
    if precision == "high":
        rest = [
            jax.lax.reduce_precision(factor - part, 8, 7)
            for factor, part in zip(factors, first, strict=True)
        ]
        total = (
            total + EINSUM(subscripts, first[0], rest[1]) + EINSUM(subscripts, rest[0], first[1])
        )
    return total


@pytest.mark.parametrize(("shape", "changes", "dtype"), CASES)
def test_matrix_products_match_gathers(shape, changes, dtype, monkeypatch):
    """Images of noise agree to 1e-5 of the maximum.

    A mask may differ where a position is on the border of two pixels.
    """
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

    def resampled(train):
        form = functools.partial(
            prepare, seed=0, epoch=1, augment=config, input=numbers, train=train
        )
        return np.asarray(jax.jit(form)(raw))

    expected = [resampled(train) for train in (True, False)]
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *args, default, **forms: forms.get("tpu", default)(*args),
    )
    monkeypatch.setattr(jnp, "einsum", emulate_tpu_einsum)
    monkeypatch.setattr(
        lookup, "WINDOW", 40
    )  # small windows, so that small images are also divided into tiles
    for actual, expected_images in zip((resampled(True), resampled(False)), expected, strict=True):
        np.testing.assert_allclose(actual[..., 1:], expected_images[..., 1:], atol=1e-5)
        if config.legacy_augmentation:
            np.testing.assert_allclose(
                actual[..., 0], expected_images[..., 0], atol=1e-5 * np.iinfo(dtype).max
            )
        else:
            assert (actual[..., 0] != expected_images[..., 0]).mean() < 1e-4


@pytest.mark.parametrize(
    ("rows", "columns", "step"), [(128, 128, 1.7), (17, 224, 0.3), (1, 5, 0.1), (64, 64, 9.0)]
)
def test_tile_windows_fit_matrix_unit(rows, columns, step):
    tall, wide, side = lookup._tile_shape(rows, columns, step)
    assert side <= lookup.WINDOW
    assert (
        side >= step * np.hypot(tall - 1, wide - 1) + 2
    )  # the positions of a rotated tile, and a neighbor on each side

"""What is kept of a backbone's maps: of every stage but the last, over all and over cells, and how it varies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perturbjax.models import BACKBONES, Mode
from perturbjax.models.pooling import pool_stages, pooled_size

#: Two maps of which the finer is told, and the mask of a cell in the upper left quarter.
FINE = jnp.arange(32.0).reshape(1, 4, 4, 2)
MAPS = [FINE, jnp.ones((1, 2, 2, 3))]
CELL = jnp.zeros((1, 8, 8)).at[:, :4, :4].set(7)


def test_every_channel_has_its_mean_its_mean_over_cells_and_its_deviation():
    mean, over_cells, deviation = np.split(np.asarray(pool_stages(MAPS, CELL)[0]), 3)
    np.testing.assert_allclose(mean, FINE.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, FINE.std((0, 1, 2)), rtol=1e-5)
    # Half a pixel around the cell is partly it, where the mask is halved; without that it would be 5 and 6.
    np.testing.assert_allclose(over_cells, [5, 6], atol=2)
    assert (over_cells < mean - 5).all()


def test_without_cells_the_mean_over_them_is_the_mean():
    mean, over_cells, _ = np.split(np.asarray(pool_stages(MAPS, jnp.zeros((1, 8, 8)))[0]), 3)
    np.testing.assert_allclose(over_cells, mean, rtol=1e-4)


def test_a_blank_image_has_finite_slopes():
    slopes = jax.grad(lambda found: pool_stages([found, found], CELL).sum())(
        jnp.zeros((1, 4, 4, 2))
    )
    assert np.isfinite(slopes).all()


def test_all_backbones_say_how_wide_their_stages_are():
    for name in ("resnet18", "resnet50", "efficientnet_b0", "efficientnet_lite0", "dinov2_small"):
        x = jax.ShapeDtypeStruct((2, 42, 56, 3), jnp.float32)
        model = nnx.eval_shape(
            lambda name=name: BACKBONES[name].network(
                classes=2, inputs=3, channels=1, dropout=0.0, rngs=nnx.Rngs(0)
            )
        )
        maps = nnx.eval_shape(lambda model, x: model.stage_maps(x, Mode()), model, x)
        assert tuple(found.shape[-1] for found in maps) == model.stage_widths
        pooled = jax.eval_shape(pool_stages, maps, jax.ShapeDtypeStruct((2, 42, 56), jnp.uint8))
        assert pooled.shape == (2, pooled_size(model))

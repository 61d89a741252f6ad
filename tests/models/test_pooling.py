"""Pooling of stage maps: mean, mean over cells and standard deviation, without the last stage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perturbjax.models import BACKBONES, Mode
from perturbjax.models.pooling import pool_stages, pooled_size

#: Two maps, of which the finer one is pooled, and the mask of a cell in the upper left quarter.
FINE = jnp.arange(32.0).reshape(1, 4, 4, 2)
MAPS = [FINE, jnp.ones((1, 2, 2, 3))]
CELL = jnp.zeros((1, 8, 8)).at[:, :4, :4].set(7)


def test_pool_stages_gives_mean_mean_over_cells_and_deviation():
    mean, over_cells, deviation = np.split(np.asarray(pool_stages(MAPS, CELL)[0]), 3)
    np.testing.assert_allclose(mean, FINE.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, FINE.std((0, 1, 2)), rtol=1e-5)
    # Downsampling blurs the border of the cell by half a pixel; without blur the means are 5, 6.
    np.testing.assert_allclose(over_cells, [5, 6], atol=2)
    assert (over_cells < mean - 5).all()


def test_pool_stages_without_cells_gives_plain_mean():
    mean, over_cells, _ = np.split(np.asarray(pool_stages(MAPS, jnp.zeros((1, 8, 8)))[0]), 3)
    np.testing.assert_allclose(over_cells, mean, rtol=1e-4)


def test_pool_stages_gradient_of_blank_image_is_finite():
    gradient = jax.grad(lambda stage_map: pool_stages([stage_map, stage_map], CELL).sum())(
        jnp.zeros((1, 4, 4, 2))
    )
    assert np.isfinite(gradient).all()


def test_stage_widths_match_stage_maps():
    for name in ("resnet18", "resnet50", "efficientnet_b0", "efficientnet_lite0", "dinov2_small"):
        x = jax.ShapeDtypeStruct((2, 42, 56, 3), jnp.float32)
        model = nnx.eval_shape(
            lambda name=name: BACKBONES[name].network(
                classes=2, inputs=3, channels=1, dropout=0.0, rngs=nnx.Rngs(0)
            )
        )
        maps = nnx.eval_shape(lambda model, x: model.stage_maps(x, Mode()), model, x)
        assert tuple(stage_map.shape[-1] for stage_map in maps) == model.stage_widths
        pooled = jax.eval_shape(pool_stages, maps, jax.ShapeDtypeStruct((2, 42, 56), jnp.uint8))
        assert pooled.shape == (2, pooled_size(model))

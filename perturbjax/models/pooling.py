"""What is kept of a backbone's maps where its weights are from photographs and the images are of cells.

The last stage of such a network knows dogs from cats; what tells cells apart, grain, edges and blobs, lies in the
stages before it, at sides that cells have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

#: Of every map: its mean, its mean over cells, its deviation.
WAYS = 3
#: Weight of what is no cell in the mean over cells, so that an empty mask leaves the mean.
_OUTSIDE = 1e-3
#: Added to variances: the slope of a root at 0 has no end.
_LEAST = 1e-6


def pooled_size(backbone: Any) -> int:
    """How many numbers `pool_stages` makes of an image."""
    return WAYS * sum(backbone.stage_widths[:-1])


def pool_stages(
    maps: Sequence[Float[Array, "b _h _w _c"]], mask: Num[Array, "b h w"]
) -> Float[Array, "b d"]:
    """Mean, mean over cells and deviation of the maps of all stages but the last, the finest first.

    Args:
        maps: as a backbone's `stage_maps` gives them.
        mask: 0 where there is no cell, anything above where there is one; of any size.
    """
    cells = (mask > 0).astype(jnp.float32)
    return jnp.concatenate(
        [_pooled(each.astype(jnp.float32), cells) for each in maps[:-1]], axis=-1
    )


def _pooled(
    found: Float[Array, "b h w c"], cells: Float[Array, "b h2 w2"]
) -> Float[Array, "b 3*c"]:
    weight = (
        jax.image.resize(cells, found.shape[:3], "linear", antialias=True)[..., None] + _OUTSIDE
    )
    over_cells = (found * weight).sum((1, 2)) / weight.sum((1, 2))
    deviation = jnp.sqrt(found.var((1, 2)) + _LEAST)
    return jnp.concatenate([found.mean((1, 2)), over_cells, deviation], axis=-1)

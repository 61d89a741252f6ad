"""Pooling of a backbone's stage maps into site features.

The last stage of an ImageNet network is specific to ImageNet classes. Texture, edges and blobs,
which distinguish cells, are in the earlier stages, whose resolution matches the size of cells.
The last stage is therefore left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

#: Statistics per map: mean, mean over cells, standard deviation.
STATISTICS = 3
#: Weight of the background in the mean over cells, so that an empty mask gives the plain mean.
_BACKGROUND_WEIGHT = 1e-3
#: Added to variances, because the slope of a square root at 0 is infinite.
_VARIANCE_FLOOR = 1e-6


def pooled_size(backbone: Any) -> int:
    """Number of features that `pool_stages` computes per image."""
    return STATISTICS * sum(backbone.stage_widths[:-1])


def pool_stages(
    maps: Sequence[Float[Array, "b _h _w _c"]], mask: Num[Array, "b h w"]
) -> Float[Array, "b d"]:
    """Compute mean, mean over cells and standard deviation of all stage maps but the last.

    Args:
        maps: output of a backbone's `stage_maps`, finest map first.
        mask: 0 for background, positive for cells; of any height and width.
    """
    cells = (mask > 0).astype(jnp.float32)
    pooled = [_pool(stage_map.astype(jnp.float32), cells) for stage_map in maps[:-1]]
    return jnp.concatenate(pooled, axis=-1)


def _pool(x: Float[Array, "b h w c"], cells: Float[Array, "b h2 w2"]) -> Float[Array, "b 3*c"]:
    # (b, h, w, 1): about the fraction of cell pixels at each position of the map.
    weight = jax.image.resize(cells, x.shape[:3], "linear", antialias=True)[..., None]
    weight = weight + _BACKGROUND_WEIGHT
    over_cells = (x * weight).sum((1, 2)) / weight.sum((1, 2))
    deviation = jnp.sqrt(x.var((1, 2)) + _VARIANCE_FLOOR)
    return jnp.concatenate([x.mean((1, 2)), over_cells, deviation], axis=-1)

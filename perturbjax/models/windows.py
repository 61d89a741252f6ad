"""Windows of native resolution at the cells of a site, inside jit.

Shapes are static: every site has the same number of windows. With more cells, some are chosen at
equal distances in the order of their labels; with fewer, the remaining windows have weight 0. A
site without cells has a regular grid of windows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, Integer, Shaped

#: Number of windows of a site.
WINDOWS = 16
#: Largest label that can be chosen, which limits memory.
MAX_LABEL = 4095


def choose_windows(
    labels: Integer[Array, "h w"], size: int, count: int = WINDOWS
) -> tuple[Int32[Array, "n 2"], Float32[Array, " n"]]:
    """Choose windows at cells that do not touch the border, or on a grid if there are none.

    Args:
        labels: instance labels, 0 is background; height and width are at least `size`.
        size: height and width of a window in pixels.
        count: number of windows n.

    Returns:
        Row and column of the upper left pixel of each window, within the site, and weights: 1, or 0
        for unused windows.
    """
    height, width = labels.shape
    labels = jnp.where(labels <= MAX_LABEL, labels, 0).astype(jnp.int32)
    area, rows, columns = (
        jax.ops.segment_sum(
            jnp.broadcast_to(values, labels.shape).astype(jnp.float32).ravel(),
            labels.ravel(),
            MAX_LABEL + 1,
        )
        # Relative to the center of the site, so that float32 sums stay exact enough.
        for values in (
            jnp.ones(()),
            jnp.arange(height)[:, None] - height / 2,
            jnp.arange(width) - width / 2,
        )
    )
    border = jnp.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    valid = ((area > 0) & (jnp.arange(MAX_LABEL + 1) > 0)).at[border].set(False)
    cells = valid.sum()
    # Labels of valid cells come first, in their order.
    order = jnp.argsort(~valid, stable=True)
    position = jnp.arange(count)
    position = jnp.where(cells >= count, position * cells // count, position)
    chosen = order[position]
    centers = jnp.stack([rows + height / 2 * area, columns + width / 2 * area], axis=1)[chosen]
    centers = centers / jnp.maximum(area[chosen], 1)[:, None]
    last = jnp.array([height - size, width - size])
    at_cells = jnp.clip(jnp.rint(centers - size / 2).astype(jnp.int32), 0, last)
    has_cells = cells > 0
    corners = jnp.where(has_cells, at_cells, _grid(height - size, width - size, count))
    weight = jnp.where(has_cells, position < cells, True)
    return corners, weight.astype(jnp.float32)


def _grid(bottom: int, right: int, count: int) -> Int[Array, "n 2"]:
    """Corners on a square grid from (0, 0) to (bottom, right); the first `count` of them."""
    lines = math.ceil(math.sqrt(count))
    rows, columns = (jnp.rint(jnp.linspace(0, end, lines)) for end in (bottom, right))
    grid = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)
    return grid.reshape(-1, 2)[:count].astype(jnp.int32)


def cut_windows(
    site: Float[Array, "h w c"], corners: Int32[Array, "n 2"], size: int
) -> Float[Array, "n size size c"]:
    """Cut square windows out of a site."""
    shape = (size, size, site.shape[-1])
    return jax.vmap(lambda corner: jax.lax.dynamic_slice(site, (*corner, 0), shape))(corners)


def pad_to(site: Shaped[Array, "h w c"], size: int, mode: str) -> Shaped[Array, "h2 w2 c"]:
    """Extend height and width to at least `size` pixels, at the bottom and at the right."""
    pad = [(0, max(0, size - length)) for length in site.shape[:2]]
    return jnp.pad(site, [*pad, (0, 0)], mode=mode) if any(map(any, pad)) else site

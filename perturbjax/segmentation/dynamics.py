"""From the network's flows to instance masks: every step over all pixels or all objects at once.

Each pixel of a cell follows the flow; where many end is a sink, and a sink's pixels are an object. The rules, numbers
and orders of precedence are the cellpose package's (Stringer et al. 2021, Methods); its loops over objects are not.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

#: The network's flows are this many times unit vectors, and a step follows a unit.
FLOW_SCALE = 5.0
#: Steps a pixel follows at the network's own scale.
STEPS = 200
#: A sink is where more pixels than this end, most of all within SINK_RADIUS; it takes in neighbours, REACH steps far,
#: where more than SPARSE end.
SINK, SINK_RADIUS, REACH, SPARSE = 10, 2, 5, 2
#: Pixels beyond the image that sinks may use, as the package's histogram has them.
MARGIN = 8
#: Steps between two looks at whether pixels still move, and how far (pixels in two steps) counts as moving.
LOOK_EVERY, STILL = 16, 1e-3
#: Pixels a batch of objects' boxes holds: at 4 bytes it stays in a core's cache through hundreds of steps.
BATCH_PIXELS = 2**16
#: Smallest side of an object's box; others are its doubles, so that few programs serve all.
SMALLEST_BOX = 16


class Rules(NamedTuple):
    """What makes an object; the defaults are the package's, but for `largest`."""

    cell_threshold: float = 0.0
    """Logit above which a pixel is a cell's."""
    flow_threshold: float = 0.4
    """Mean squared difference of an object's flow from what its shape would give, above which it is dropped; 0 keeps
    all."""
    smallest: int = 15
    """Pixels below which an object is dropped."""
    largest: float = 1.0
    """Share of the image above which an object is dropped. The package's 0.4 takes the cell from a crop of one cell."""


class Objects(NamedTuple):
    """The objects of one image, and how much the network's flows support them."""

    labels: Int[np.ndarray, "h w"]
    """uint16 where 65,535 suffice, else uint32; 1, 2, … without gaps."""
    errors: Float[np.ndarray, " found"]
    """Flow error of every object found, dropped ones among them."""


def objects(maps: Float[Array, "hb wb 3"], height: int, width: int, steps: int, rules: Rules | None = None) -> Objects:
    """Instance masks from flows (down, right) and cell logits.

    Args:
        maps: the image is its first `height` rows and `width` columns; the rest is ignored.
        steps: how long pixels follow the flow.
    """
    rules = Rules() if rules is None else rules
    count = int(_cells(maps, height, width, rules.cell_threshold).sum())
    if count == 0:
        return Objects(np.zeros((height, width), np.uint16), np.zeros(0, np.float32))
    size = _rounded(count, maps.shape[0] * maps.shape[1])
    pixels, flow = _start(maps, height, width, rules.cell_threshold, size=size)
    places = follow(flow, pixels, height, width, steps)
    found, areas, boxes = _labels(places, pixels, height, width, rules, shape=maps.shape[:2])
    return _judged(maps, found, np.asarray(areas), np.asarray(boxes), (height, width), rules)


def _rounded(count: int, most: int) -> int:
    """Few sizes, each at most 19 % above `count`."""
    size = 1024.0
    while size < count:
        size *= 2**0.25
    return min(int(size), most)


@jax.jit
def _cells(maps: Array, height: Array, width: Array, threshold: Array) -> Bool[Array, "hb wb"]:
    rows, columns = jnp.arange(maps.shape[0]), jnp.arange(maps.shape[1])
    return (maps[..., 2] > threshold) & (rows[:, None] < height) & (columns < width)


@partial(jax.jit, static_argnames="size")
def _start(maps: Array, height: Array, width: Array, threshold: Array, *, size: int) -> tuple[Array, Array]:
    """Flat positions of the cells' pixels, -1 beyond them; and the flow with what bilinear sampling needs of it side
    by side: one read a step instead of four."""
    cells = _cells(maps, height, width, threshold)
    pixels = jnp.nonzero(cells.ravel(), size=size, fill_value=-1)[0].astype(jnp.int32)
    flow = jnp.where(cells[..., None], maps[..., :2], 0) / FLOW_SCALE
    # The last row and column have no neighbour beyond: they repeat.
    right = jnp.where(jnp.arange(flow.shape[1])[:, None] >= width - 1, 0, jnp.roll(flow, -1, 1) - flow)
    below = jnp.where(jnp.arange(flow.shape[0])[:, None, None] >= height - 1, 0, jnp.roll(flow, -1, 0) - flow)
    corner = jnp.where(jnp.arange(flow.shape[0])[:, None, None] >= height - 1, 0, jnp.roll(right, -1, 0) - right)
    return pixels, jnp.concatenate([flow, right, below, corner], -1)


@jax.jit
def follow(
    flow: Float[Array, "hb wb 8"], pixels: Int[Array, " p"], height: Array, width: Array, steps: Array
) -> Int[Array, "p 2"]:
    """Where each pixel is after `steps` Euler steps, in whole pixels; it stays within the image.

    All stop when none moves any more: after two steps every pixel is where it was (at a sink that the flow overshoots,
    pixels go to and fro).
    """
    table = flow.reshape(-1, 8)
    columns = flow.shape[1]
    start = jnp.stack([pixels // columns, pixels % columns]).astype(jnp.float32)
    last = jnp.stack([height - 1, width - 1]).astype(jnp.float32)[:, None]

    def step(place: Float[Array, "2 p"]) -> Float[Array, "2 p"]:
        whole = place.astype(jnp.int32)
        y, x = place - whole
        near = table.at[whole[0] * columns + whole[1]].get(mode="clip").T
        moved = near[:2] + x * near[2:4] + y * (near[4:6] + x * near[6:])
        return jnp.clip(place + moved, 0, last)

    def look(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        done, place, _ = carry
        todo = jnp.minimum(steps - done, LOOK_EVERY)
        before = jax.lax.fori_loop(0, jnp.maximum(todo - 2, 0), lambda _, place: step(place), place)
        place = jax.lax.fori_loop(0, jnp.minimum(todo, 2), lambda _, place: step(place), before)
        return done + todo, place, jnp.abs(place - before).max()

    def going(carry: tuple[Array, Array, Array]) -> Array:
        return (carry[0] < steps) & (carry[2] > STILL)

    return jax.lax.while_loop(going, look, (0, start, jnp.inf))[1].astype(jnp.int32).T


@partial(jax.jit, static_argnames="shape")
def _labels(
    places: Int[Array, "p 2"], pixels: Int[Array, " p"], height: Array, width: Array, rules: Rules, *, shape
) -> tuple[Int[Array, "hb wb"], Int[Array, " n"], Int[Array, "n 4"]]:
    """Every pixel's sink as a label, and of each label the area and the box (top, left, bottom, right).

    Where two sinks reach a pixel, the one in which more pixels end has it.
    """
    inside = pixels >= 0
    places = jnp.where(inside[:, None], places + MARGIN, 0)
    ends = jnp.zeros((shape[0] + 2 * MARGIN, shape[1] + 2 * MARGIN), jnp.int32)
    ends = ends.at[places[:, 0], places[:, 1]].add(inside.astype(jnp.int32))
    sinks = (ends > SINK) & (ends == _around(ends, SINK_RADIUS))
    most = len(pixels) // (SINK + 1) + 1
    (where,) = jnp.nonzero(sinks.ravel(), size=most, fill_value=ends.size)
    order = jnp.argsort(ends.ravel().at[where].get(mode="fill", fill_value=0), stable=True)
    rank = jnp.zeros(ends.size, jnp.int32).at[where[order]].set(jnp.arange(1, most + 1), mode="drop")
    reached = rank.reshape(ends.shape)
    for _ in range(REACH):
        reached = jnp.where(ends > SPARSE, _around(reached, 1), 0)
    label = jnp.where(inside, reached[places[:, 0], places[:, 1]], 0)
    area = jnp.zeros(most + 1, jnp.int32).at[label].add(1).at[0].set(0)
    kept = (area > 0) & (area <= rules.largest * height * width)
    number = jnp.where(kept, jnp.cumsum(kept), 0)  # 1, 2, … in the order of precedence
    label = number[label]
    areas = jnp.zeros(most + 1, jnp.int32).at[number].add(area).at[0].set(0)
    row, column = pixels // shape[1], pixels % shape[1]
    ends_at = jnp.stack([row, column, -row, -column], 1)
    boxes = jnp.full((most + 1, 4), 2**30, jnp.int32).at[label].min(jnp.where(label[:, None] > 0, ends_at, 2**30))
    boxes = boxes * jnp.array([1, 1, -1, -1]) + jnp.array([0, 0, 1, 1])
    labels = jnp.zeros(shape[0] * shape[1], jnp.int32).at[jnp.where(inside, pixels, 2**30)].set(label, mode="drop")
    return labels.reshape(shape), areas, boxes


def _around(values: Int[Array, "h w"], radius: int) -> Int[Array, "h w"]:
    """Largest value within a square; an axis at a time."""
    for axis in (0, 1):
        padded = jnp.pad(values, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)])
        shifted = [jax.lax.slice_in_dim(padded, k, k + values.shape[axis], axis=axis) for k in range(2 * radius + 1)]
        values = jnp.stack(shifted).max(0) if len(shifted) > 5 else _largest(shifted)
    return values


def _largest(values: list[Array]) -> Array:
    top = values[0]
    for value in values[1:]:
        top = jnp.maximum(top, value)
    return top


def _judged(
    maps: Array, labels: Array, areas: np.ndarray, boxes: np.ndarray, size: tuple[int, int], rules: Rules
) -> Objects:
    """Objects that are large enough and whose flow agrees, their holes filled, numbered anew.

    Numbering is the host's: a table look-up of 1080² pixels takes it 3 ms, and what is written is there anyway.
    """
    ids = np.flatnonzero(areas)
    errors = np.zeros(len(areas), np.float32)
    extent = boxes[ids, 2:] - boxes[ids, :2] + 2  # with the ring of background that shifting relies on
    sides = np.maximum(2 ** np.ceil(np.log2(extent.max(1, initial=1))).astype(int), SMALLEST_BOX)
    holes = [np.zeros((0, 3), int)]
    for side in np.unique(sides):
        members = ids[sides == side]
        # Objects of like extent together: a batch takes as many steps as its largest needs.
        members = members[np.argsort(extent[sides == side].sum(1), kind="stable")]
        batch = max(BATCH_PIXELS // int(side) ** 2, 1)
        for start in range(0, len(members), batch):
            some = np.pad(members[start : start + batch], (0, max(start + batch - len(members), 0)))
            error, filled, any_hole = _check(maps, labels, some, boxes[some], side=int(side))
            errors[some] = np.asarray(error)
            if any_hole:
                number, row, column = np.nonzero(np.asarray(filled))
                corner = boxes[some[number], :2] - 1
                holes.append(np.stack([some[number], row + corner[:, 0], column + corner[:, 1]], 1))
    keep = areas >= rules.smallest
    if rules.flow_threshold > 0:
        keep &= errors <= rules.flow_threshold
    whole = np.asarray(labels)[: size[0], : size[1]]
    table = np.where(keep, np.arange(len(areas)), 0).astype(np.uint32)
    return Objects(_numbered(_filled(table[whole], np.concatenate(holes), keep, areas), rules.smallest), errors[ids])


def _filled(labels: np.ndarray, holes: np.ndarray, keep: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Pixels of holes go to the object around them, and of two such objects to the outer, which is the larger."""
    holes = holes[keep[holes[:, 0]]]
    holes = holes[np.argsort(areas[holes[:, 0]], kind="stable")]
    labels[holes[:, 1], holes[:, 2]] = holes[:, 0]
    return labels


def _numbered(labels: Int[np.ndarray, "h w"], smallest: int) -> Int[np.ndarray, "h w"]:
    """1, 2, … in the order of first pixels, row by row, without the objects that lost all but a few."""
    areas = np.bincount(labels.ravel())
    keep = areas >= max(smallest, 1)
    keep[0] = False
    present, first = np.unique(np.where(keep[labels], labels, 0), return_index=True)
    order = present[np.argsort(first)]
    order = order[order > 0]
    number = np.zeros(len(areas), np.uint16 if len(order) <= np.iinfo(np.uint16).max else np.uint32)
    number[order] = np.arange(1, len(order) + 1)
    return number[labels]


@partial(jax.jit, static_argnames="side")
def _check(
    maps: Array, labels: Int[Array, "hb wb"], ids: Int[Array, " n"], boxes: Int[Array, "n 4"], *, side: int
) -> tuple[Float[Array, " n"], Bool[Array, "n side side"], Bool[Array, ""]]:
    """Of each object the flow error and the pixels of its holes, in a box that a ring of background surrounds."""
    rows = boxes[:, 0, None] - 1 + jnp.arange(side)
    columns = boxes[:, 1, None] - 1 + jnp.arange(side)
    where = jnp.where((rows < 0) | (rows >= len(labels)), len(labels), rows)[:, :, None], columns[:, None, :]
    where = where[0], jnp.where((where[1] < 0) | (where[1] >= labels.shape[1]), labels.shape[1], where[1])
    mine = labels.at[where].get(mode="fill", fill_value=0) == ids[:, None, None]
    mine &= ids[:, None, None] > 0
    flow = maps[..., :2].at[where].get(mode="fill", fill_value=0) / FLOW_SCALE
    extent = boxes[:, 2:] - boxes[:, :2]
    difference = jnp.square(_flow_of(mine, 2 * (extent.sum(1) + 4)) - flow).sum(-1)
    error = jnp.where(mine, difference, 0).sum((1, 2)) / jnp.maximum(mine.sum((1, 2)), 1)
    holes = _holes(mine)
    return error, holes, holes.any()


def _flow_of(mine: Bool[Array, "n s s"], steps: Int[Array, " n"]) -> Float[Array, "n s s 2"]:
    """Unit vectors up the gradient of heat that spreads from each object's middle for `steps` steps."""
    n, side, _ = mine.shape
    rows, columns = jnp.arange(side)[:, None], jnp.arange(side)
    count = jnp.maximum(mine.sum((1, 2)), 1)
    middle_y = (mine * rows).sum((1, 2)) / count
    middle_x = (mine * columns).sum((1, 2)) / count
    distance = (rows - middle_y[:, None, None]) ** 2 + (columns - middle_x[:, None, None]) ** 2
    source = jnp.argmin(jnp.where(mine, distance, jnp.inf).reshape(n, -1), axis=1)
    source = jax.nn.one_hot(source, side * side, dtype=jnp.float32).reshape(-1)
    share = jnp.where(mine, 1 / 9, 0).reshape(-1).astype(jnp.float32)
    steps = jnp.repeat(steps, side * side)
    # Laid out flat, a neighbour is a fixed shift: what wraps round falls on the ring of background, which is zero.
    edge = side + 1
    start = jnp.zeros(n * side * side + 2 * edge)

    def spread(done: Array, heat: Array) -> Array:
        heat = heat.at[edge:-edge].add(source)
        across = heat[:-2] + heat[1:-1] + heat[2:]
        total = across[: -2 * side] + across[side:-side] + across[2 * side :]
        here = heat[edge:-edge]
        return heat.at[edge:-edge].set(jnp.where(done < steps, total * share, here - source))

    heat = jax.lax.fori_loop(0, steps.max(), spread, start)
    down = heat[edge + side : len(heat) - edge + side] - heat[edge - side : len(heat) - edge - side]
    right = heat[edge + 1 : len(heat) - edge + 1] - heat[edge - 1 : len(heat) - edge - 1]
    flow = jnp.stack([down, right], -1)
    largest = jnp.abs(flow).max(-1, keepdims=True)
    flow = jnp.where(largest > 0, flow / largest, 0)  # so that squares of tiny numbers do not vanish
    length = jnp.sqrt(jnp.square(flow).sum(-1, keepdims=True))
    return jnp.where(length > 0, flow / length, 0).reshape(n, side, side, 2)


def _holes(mine: Bool[Array, "n s s"]) -> Bool[Array, "n s s"]:
    """What the background cannot reach from the box's ring by steps along rows and columns."""
    n, side, _ = mine.shape
    edge = side
    free = ~mine.reshape(-1)
    ring = jnp.zeros((side, side), bool).at[jnp.array([0, -1])].set(True).at[:, jnp.array([0, -1])].set(True)
    start = jnp.pad(jnp.tile(ring.reshape(-1), n) & free, edge)

    def flood(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        outside, _ = carry
        here = outside[edge:-edge]
        across = here | outside[edge - 1 : -edge - 1] | outside[edge + 1 : len(outside) - edge + 1]
        near = (across | outside[: -2 * edge] | outside[2 * edge :]) & free
        return outside.at[edge:-edge].set(near), (near != here).any()

    outside, _ = jax.lax.while_loop(lambda carry: carry[1], flood, (start, jnp.array(True)))
    return (~outside[edge:-edge] & free).reshape(mine.shape)

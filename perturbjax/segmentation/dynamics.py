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
from jaxtyping import Array, Bool, Float, Int, Integer

#: The network's flows are this many times unit vectors, and a step follows a unit.
FLOW_SCALE = 5.0
#: Steps a pixel follows at the network's own scale.
STEPS = 200
#: A sink is where more pixels than this end, most of all within SINK_RADIUS; it takes in neighbours, REACH steps far,
#: where more than SPARSE end.
SINK, SINK_RADIUS, REACH, SPARSE = 10, 2, 5, 2
#: Pixels beyond the image that sinks may use, as the package's histogram has them.
MARGIN = 8
#: Steps between two looks at which pixels still move, and how far (pixels in two steps) counts as moving.
LOOK_EVERY, STILL = 32, 1e-3
#: Pixels a batch of objects' boxes holds: at 4 bytes it stays in a core's cache through hundreds of steps. An
#: accelerator takes all objects at once, up to the second number: a step over few costs it no less.
BATCH_PIXELS, MOST_PIXELS = 2**16, 2**22
#: Smallest side of an object's box.
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

    labels: Integer[np.ndarray, "h w"]
    """uint16 where 65,535 suffice, else uint32; 1, 2, … without gaps."""
    errors: Float[np.ndarray, " found"]
    """Flow error of every object found, dropped ones among them."""


def objects(
    maps: Float[Array, "hb wb 3"], height: int, width: int, steps: int, rules: Rules | None = None
) -> Objects:
    """Instance masks from flows (down, right) and cell logits.

    Args:
        maps: the image is its first `height` rows and `width` columns; the rest is ignored.
        steps: how long pixels follow the flow.
    """
    rules = Rules() if rules is None else rules
    cells, flow = _prepared(maps, height, width, rules.cell_threshold)
    # Positions of what is set are listed by the host throughout: of 1088² pixels in 2 ms, which XLA's CPU needs 70 for.
    pixels = np.flatnonzero(cells)
    if not len(pixels):
        return Objects(np.zeros((height, width), np.uint16), np.zeros(0, np.float32))
    pixels = np.pad(pixels, (0, _rounded(len(pixels)) - len(pixels)), constant_values=-1).astype(
        np.int32
    )
    places = follow(flow, pixels, height, width, steps)
    ends, sinks = _ends(places, pixels, shape=maps.shape[:2])
    where = np.flatnonzero(sinks)
    where = where[np.argsort(np.asarray(ends).ravel()[where], kind="stable")]
    where = np.pad(where, (0, _rounded(len(where), 64) - len(where)), constant_values=2**30).astype(
        np.int32
    )
    label = np.asarray(_labels(ends, places, pixels, where))
    areas = np.bincount(label, minlength=len(where) + 1)
    areas[0] = 0
    areas[areas > height * width * rules.largest] = 0
    label = np.where(areas[label] > 0, label, 0)
    labels = np.zeros(maps.shape[:2], np.int32)
    labels.ravel()[pixels[pixels >= 0]] = label[pixels >= 0]
    boxes = _boxes(label, pixels, maps.shape[1], len(areas))
    return _judged(maps, labels, areas, boxes, (height, width), rules)


def _rounded(count: int, least: int = 4096) -> int:
    """Few sizes, each at most 41 % above `count`."""
    size = float(least)
    while int(size) < count:
        size *= 2**0.5
    return int(size)


@jax.jit
def _prepared(
    maps: Array, height: Array, width: Array, threshold: Array
) -> tuple[Bool[Array, "hb wb"], Array]:
    """Which pixels are a cell's; and the flow with what bilinear sampling needs of it side by side: one place to read a
    step instead of four."""
    rows, columns = jnp.arange(maps.shape[0])[:, None], jnp.arange(maps.shape[1])
    cells = (maps[..., 2] > threshold) & (rows < height) & (columns < width)
    flow = jnp.where(cells[..., None], maps[..., :2], 0) / FLOW_SCALE
    # The last row and column have no neighbour beyond: they repeat.
    last_row, last_column = (rows >= height - 1)[..., None], (columns >= width - 1)[:, None]
    right = jnp.where(last_column, 0, jnp.roll(flow, -1, 1) - flow)
    below = jnp.where(last_row, 0, jnp.roll(flow, -1, 0) - flow)
    corner = jnp.where(last_row, 0, jnp.roll(right, -1, 0) - right)
    return cells, jnp.concatenate([flow, right, below, corner], -1)


def follow(
    flow: Float[Array, "hb wb 8"],
    pixels: Integer[np.ndarray, " p"],
    height: int,
    width: int,
    steps: int,
) -> Float[np.ndarray, "p 2"]:
    """Where each pixel is after `steps` Euler steps; it stays within the image.

    On a CPU those that still move are singled out again and again: of a field of nuclei 12 % do after 32 steps and 2 %
    after 64, and without the others all takes a quarter of the time. An accelerator does not wait for that.
    """
    columns = flow.shape[1]
    places = np.stack([pixels // columns, pixels % columns], 1).astype(np.float32)
    places[pixels < 0] = 0
    every = LOOK_EVERY if jax.default_backend() == "cpu" else steps
    moving = np.arange(len(pixels))
    for done in range(0, steps, every):
        some = np.pad(moving, (0, _rounded(len(moving)) - len(moving)), mode="edge")
        moved, distance = _steps(flow, places[some], height, width, min(every, steps - done))
        places[some] = np.asarray(moved)
        moving = moving[np.asarray(distance)[: len(moving)] > STILL]
        if not len(moving):
            break
    return places


@jax.jit
def _steps(
    flow: Float[Array, "hb wb 8"],
    places: Float[Array, "p 2"],
    height: Array,
    width: Array,
    steps: Array,
) -> tuple[Float[Array, "p 2"], Float[Array, " p"]]:
    """Places after some steps, and how far the last two led: to and fro over a sink that it overshoots, a pixel is
    still."""
    table = flow.reshape(-1, 8)
    columns = flow.shape[1]
    last = jnp.stack([height - 1, width - 1]).astype(jnp.float32)

    def step(places: Float[Array, "p 2"]) -> Float[Array, "p 2"]:
        whole = places.astype(jnp.int32)
        y, x = jnp.split(places - whole, 2, axis=1)
        near = table.at[whole[:, 0] * columns + whole[:, 1]].get(mode="promise_in_bounds")
        moved = near[:, :2] + x * near[:, 2:4] + y * (near[:, 4:6] + x * near[:, 6:])
        return jnp.clip(places + moved, 0, last)

    def several(steps: Array, places: Array) -> Array:
        return jax.lax.fori_loop(0, steps, lambda _, places: step(places), places)

    before = several(jnp.maximum(steps - 2, 0), places)
    after = several(jnp.minimum(steps, 2), before)
    return after, jnp.abs(after - before).max(1)


@partial(jax.jit, static_argnames="shape")
def _ends(
    places: Float[Array, "p 2"], pixels: Int[Array, " p"], *, shape: tuple[int, int]
) -> tuple[Int[Array, "hm wm"], Bool[Array, "hm wm"]]:
    """How many pixels end at each place (with a margin around the image), and which places are sinks."""
    inside = pixels >= 0
    places = jnp.where(inside[:, None], places.astype(jnp.int32) + MARGIN, 0)
    ends = jnp.zeros((shape[0] + 2 * MARGIN, shape[1] + 2 * MARGIN), jnp.int32)
    ends = ends.at[places[:, 0], places[:, 1]].add(inside.astype(jnp.int32))
    return ends, (ends > SINK) & (ends == _around(ends, SINK_RADIUS))


@jax.jit
def _labels(
    ends: Int[Array, "hm wm"],
    places: Float[Array, "p 2"],
    pixels: Int[Array, " p"],
    sinks: Int[Array, " n"],
) -> Int[Array, " p"]:
    """The number of each pixel's sink, 0 for none.

    `sinks` are flat positions, those where most pixels end last: where two reach a pixel, the later has it.
    """
    rank = jnp.zeros(ends.size, jnp.int32).at[sinks].set(jnp.arange(1, len(sinks) + 1), mode="drop")
    reached = rank.reshape(ends.shape)
    for _ in range(REACH):
        reached = jnp.where(ends > SPARSE, _around(reached, 1), 0)
    places = places.astype(jnp.int32) + MARGIN
    return jnp.where(pixels >= 0, reached[places[:, 0], places[:, 1]], 0)


def _boxes(
    label: Integer[np.ndarray, " p"], pixels: Integer[np.ndarray, " p"], columns: int, count: int
) -> np.ndarray:
    """(count, 4): the first row and column of each label, and the ones after its last.

    The host's: XLA's CPU scatters a pixel in 80 ns, NumPy in 10.
    """
    row, column = pixels // columns, pixels % columns
    boxes = np.full((4, count), 2**30, np.int32)
    for side, position in zip(boxes, (row, column, -row - 1, -column - 1), strict=True):
        np.minimum.at(side, label, position)
    return boxes.T * np.array([1, 1, -1, -1])


def _around(values: Int[Array, "h w"], radius: int) -> Int[Array, "h w"]:
    """Largest value within a square; an axis at a time."""
    for axis in (0, 1):
        padded = jnp.pad(values, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)])
        shifted = [
            jax.lax.slice_in_dim(padded, k, k + values.shape[axis], axis=axis)
            for k in range(2 * radius + 1)
        ]
        values = jnp.stack(shifted).max(0) if len(shifted) > 5 else _largest(shifted)
    return values


def _largest(values: list[Array]) -> Array:
    top = values[0]
    for value in values[1:]:
        top = jnp.maximum(top, value)
    return top


def _judged(
    maps: Array,
    labels: np.ndarray,
    areas: np.ndarray,
    boxes: np.ndarray,
    size: tuple[int, int],
    rules: Rules,
) -> Objects:
    """Objects that are large enough and whose flow agrees, their holes filled, numbered anew.

    Numbering is the host's: a table look-up of 1080² pixels takes it 3 ms, and what is written is there anyway.
    """
    ids, device_labels = np.flatnonzero(areas), jnp.asarray(labels)
    errors = np.zeros(len(areas), np.float32)
    extent = (
        boxes[ids, 2:] - boxes[ids, :2] + 2
    )  # with the ring of background that shifting relies on
    sides = _sides(extent.max(1, initial=1))
    holes = [np.zeros((0, 3), int)]
    for side in np.unique(sides):
        members = ids[sides == side]
        # Objects of like extent together: a batch takes as many steps as its largest needs.
        members = members[np.argsort(extent[sides == side].sum(1), kind="stable")]
        batch = _together(int(side), len(members))
        for start in range(0, len(members), batch):
            some = np.pad(members[start : start + batch], (0, max(start + batch - len(members), 0)))
            error, filled, any_hole = _check(maps, device_labels, some, boxes[some], side=int(side))
            errors[some] = np.asarray(error)
            if any_hole:
                number, row, column = np.nonzero(np.asarray(filled))
                corner = boxes[some[number], :2] - 1
                holes.append(np.stack([some[number], row + corner[:, 0], column + corner[:, 1]], 1))
    keep = areas >= rules.smallest
    if rules.flow_threshold > 0:
        keep &= errors <= rules.flow_threshold
    whole = labels[: size[0], : size[1]]
    table = np.where(keep, np.arange(len(areas)), 0).astype(np.uint32)
    return Objects(
        _numbered(_filled(table[whole], np.concatenate(holes), keep, areas), rules.smallest),
        errors[ids],
    )


def _together(side: int, count: int) -> int:
    """How many of `count` objects with boxes of one side are looked at in one go; of few numbers, each a program."""
    batch = max(BATCH_PIXELS // side**2, 1)
    if jax.default_backend() == "cpu":
        few = 1  # as in the picture of one cell, where the places of a full batch would stay empty
        while few < min(count, batch):
            few *= 4
        return min(few, batch)
    return min(_rounded(count, batch), max(MOST_PIXELS // side**2, 1))


def _sides(extent: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
    """Sides of boxes: multiples of a quarter of the power of two below, so that few programs serve all objects."""
    step = np.maximum(2 ** np.ceil(np.log2(extent)).astype(int) // 8, SMALLEST_BOX // 2)
    return np.maximum(-(-extent // step) * step, SMALLEST_BOX)


def _filled(
    labels: np.ndarray, holes: np.ndarray, keep: np.ndarray, areas: np.ndarray
) -> np.ndarray:
    """Pixels of holes go to the object around them, and of two such objects to the outer, which is the larger."""
    holes = holes[keep[holes[:, 0]]]
    holes = holes[np.argsort(areas[holes[:, 0]], kind="stable")]
    labels[holes[:, 1], holes[:, 2]] = holes[:, 0]
    return labels


def _numbered(labels: Integer[np.ndarray, "h w"], smallest: int) -> Integer[np.ndarray, "h w"]:
    """1, 2, … in the order of first pixels, row by row, without the objects that lost all but a few."""
    areas = np.bincount(labels.ravel())
    keep = areas >= max(smallest, 1)
    keep[0] = False
    first = np.full(len(areas), labels.size)
    first[labels.ravel()[::-1]] = np.arange(labels.size)[
        ::-1
    ]  # of a pixel named twice the last assignment holds
    order = np.argsort(np.where(keep, first, labels.size), kind="stable")[: keep.sum()]
    number = np.zeros(len(areas), np.uint16 if len(order) <= np.iinfo(np.uint16).max else np.uint32)
    number[order] = np.arange(1, len(order) + 1)
    return number[labels]


@partial(jax.jit, static_argnames="side")
def _check(
    maps: Array,
    labels: Int[Array, "hb wb"],
    ids: Int[Array, " n"],
    boxes: Int[Array, "n 4"],
    *,
    side: int,
) -> tuple[Float[Array, " n"], Bool[Array, "n side side"], Bool[Array, ""]]:
    """Of each object the flow error and the pixels of its holes, in a box that a ring of background surrounds."""
    rows = boxes[:, 0, None] - 1 + jnp.arange(side)
    columns = boxes[:, 1, None] - 1 + jnp.arange(side)
    where = (
        jnp.where((rows < 0) | (rows >= len(labels)), len(labels), rows)[:, :, None],
        columns[:, None, :],
    )
    where = (
        where[0],
        jnp.where((where[1] < 0) | (where[1] >= labels.shape[1]), labels.shape[1], where[1]),
    )
    mine = labels.at[where].get(mode="fill", fill_value=0) == ids[:, None, None]
    mine &= ids[:, None, None] > 0
    flow = maps[..., :2].at[where].get(mode="fill", fill_value=0) / FLOW_SCALE
    extent = jnp.where(ids[:, None] > 0, boxes[:, 2:] - boxes[:, :2], 0)
    difference = jnp.square(_flow_of(mine, 2 * (extent.sum(1) + 4)) - flow).sum(-1)
    error = jnp.where(mine, difference, 0).sum((1, 2)) / jnp.maximum(mine.sum((1, 2)), 1)
    holes = _holes(mine)
    return error, holes, holes.any()


def _flow_of(mine: Bool[Array, "n s s"], steps: Int[Array, " n"]) -> Float[Array, "n s s 2"]:
    """Unit vectors up the gradient of heat that spreads from each object's middle, for as many steps as the object
    that needs most (as the package does on a GPU; on a CPU it takes each object's own number)."""
    n, side, _ = mine.shape
    rows, columns = jnp.arange(side)[:, None], jnp.arange(side)
    count = jnp.maximum(mine.sum((1, 2)), 1)
    middle_y = (mine * rows).sum((1, 2)) / count
    middle_x = (mine * columns).sum((1, 2)) / count
    distance = (rows - middle_y[:, None, None]) ** 2 + (columns - middle_x[:, None, None]) ** 2
    source = jnp.argmin(jnp.where(mine, distance, jnp.inf).reshape(n, -1), axis=1)
    source = jax.nn.one_hot(source, side * side, dtype=jnp.float32).reshape(n * side, side)
    share = jnp.where(mine, 1 / 9, 0).reshape(n * side, side).astype(jnp.float32)
    inflow = _neighbourhood(source) * share
    heat = jax.lax.fori_loop(
        0,
        steps.max(),
        lambda _, heat: _neighbourhood(heat) * share + inflow,
        jnp.zeros_like(inflow),
    )
    down = jnp.roll(heat, -1, 0) - jnp.roll(heat, 1, 0)
    right = jnp.roll(heat, -1, 1) - jnp.roll(heat, 1, 1)
    flow = jnp.stack([down, right], -1)
    largest = jnp.abs(flow).max(-1, keepdims=True)
    flow = jnp.where(
        largest > 0, flow / largest, 0
    )  # so that squares of tiny numbers do not vanish
    length = jnp.sqrt(jnp.square(flow).sum(-1, keepdims=True))
    flow = jnp.where(length > 0, flow / length, 0).reshape(n, side, side, 2)
    return jnp.where(mine[..., None], flow, 0)


def _neighbourhood(heat: Float[Array, "rows s"]) -> Float[Array, "rows s"]:
    """Sums over 3×3 pixels of boxes one below the other: what one box gives the next falls on rings of background."""
    tall = jnp.pad(heat, ((1, 1), (0, 0)))
    # Without the barrier both sums become one loop over nine values, which takes twice as long.
    tall = jax.lax.optimization_barrier(tall[:-2] + tall[1:-1] + tall[2:])
    wide = jnp.pad(tall, ((0, 0), (1, 1)))
    return wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]


def _holes(mine: Bool[Array, "n s s"]) -> Bool[Array, "n s s"]:
    """What the background cannot reach from the box's ring by steps along rows and columns."""
    n, side, _ = mine.shape
    edge = side
    free = ~mine.reshape(-1)
    ring = (
        jnp.zeros((side, side), bool)
        .at[jnp.array([0, -1])]
        .set(True)
        .at[:, jnp.array([0, -1])]
        .set(True)
    )
    start = jnp.pad(jnp.tile(ring.reshape(-1), n) & free, edge)

    def flood(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        outside, _ = carry
        here = outside[edge:-edge]
        across = here | outside[edge - 1 : -edge - 1] | outside[edge + 1 : len(outside) - edge + 1]
        near = (across | outside[: -2 * edge] | outside[2 * edge :]) & free
        return outside.at[edge:-edge].set(near), (near != here).any()

    outside, _ = jax.lax.while_loop(lambda carry: carry[1], flood, (start, jnp.array(True)))
    return (~outside[edge:-edge] & free).reshape(mine.shape)

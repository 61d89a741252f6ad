"""Turn labeled pixels into checked objects: flow error, size, holes, numbering.

Pixels that end in one peak (`dynamics`) need not form a real object. The flow error compares the
network's flow with the flow that the object's own shape implies: heat is released at its center,
spreads inside the object, and the unit vectors along its gradient are the implied flow g. The error
is the mean of |g - f|^2 over the object; objects above `Rules.flow_threshold` are dropped (Stringer
et al. 2021). Objects are processed in batches of square boxes of the same size, each with a ring of
background, so that one array operation serves hundreds of objects."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from perturbjax.segmentation.dynamics import FLOW_SCALE, assign_pixels, padded_length

#: Pixels of a batch of boxes on a CPU, so that it stays in a core's cache through hundreds of
#: steps, and the maximum on an accelerator, where a step over few boxes costs as much as one over
#: many.
BATCH_PIXELS, MAX_PIXELS = 2**16, 2**22
#: Smallest height and width of a box, in pixels.
SMALLEST_BOX = 16


class Rules(NamedTuple):
    """Thresholds for objects; the defaults are those of the cellpose package, except `largest`."""

    cell_threshold: float = 0.0
    """Logit above which a pixel is foreground."""
    flow_threshold: float = 0.4
    """Flow error above which an object is dropped; 0 keeps all objects."""
    smallest: int = 15
    """Area in pixels below which an object is dropped."""
    largest: float = 1.0
    """Fraction of the image above which an object is dropped. Cellpose's 0.4 drops the cell of a
    single-cell crop."""


class Objects(NamedTuple):
    """Objects of one image."""

    labels: Integer[np.ndarray, "h w"]
    """1, 2, ... without gaps, 0 for background; uint16, or uint32 above 65,535 objects."""
    errors: Float[np.ndarray, " n"]
    """Flow error of every object, including those that were dropped."""
    present: bool = True
    """Whether the image was bright enough to contain objects."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], present: bool = False) -> Objects:
        """Return the result for an image (height, width, ...) without objects."""
        return cls(np.zeros(shape[:2], np.uint16), np.zeros(0, np.float32), present)


def compute_objects(
    maps: Float[Array, "hb wb 3"], height: int, width: int, steps: int, rules: Rules | None = None
) -> Objects:
    """Compute instance masks from the network's maps.

    Args:
        maps: flow down, flow right and cell logit; only the first `height` rows and `width` columns
            are used.
        height: of the image in pixels.
        width: of the image in pixels.
        steps: number of Euler steps along the flow.
        rules: thresholds for objects.
    """
    rules = Rules() if rules is None else rules
    label, pixels, count = assign_pixels(maps, height, width, steps, rules.cell_threshold)
    areas = np.bincount(label, minlength=count)
    # An area of 0 marks the background and dropped labels.
    areas[0] = 0
    areas[areas > height * width * rules.largest] = 0
    label = np.where(areas[label] > 0, label, 0)
    if not label.any():
        return Objects.empty((height, width), present=True)
    # Write the list of pixels back into an image; a position of -1 is padding.
    labels = np.zeros(maps.shape[:2], np.int32)
    labels.ravel()[pixels[pixels >= 0]] = label[pixels >= 0]
    boxes = _bounding_boxes(label, pixels, maps.shape[1], len(areas))
    errors, holes = _measure_objects(maps, labels, areas, boxes)
    keep = areas >= rules.smallest
    if rules.flow_threshold > 0:
        keep &= errors <= rules.flow_threshold
    # Numbered on the host: a table lookup of 1080 x 1080 pixels takes 3 ms, and the result is
    # needed there anyway.
    table = np.where(keep, np.arange(len(areas)), 0).astype(np.uint32)
    filled = _fill_holes(table[labels[:height, :width]], holes, keep, areas)
    return Objects(_renumber(filled, rules.smallest), errors[np.flatnonzero(areas)])


def _bounding_boxes(
    label: Integer[np.ndarray, " p"], pixels: Integer[np.ndarray, " p"], columns: int, count: int
) -> Integer[np.ndarray, "count 4"]:
    """Return the first row and column of each label, and the row and column after its last.

    On the host: NumPy scatters a pixel in 10 ns, XLA on a CPU in 80.
    """
    row, column = pixels // columns, pixels % columns
    # A maximum is minus the minimum of the negated positions, so one operation finds all four
    # bounds.
    boxes = np.full((4, count), 2**30, np.int32)
    for bound, position in zip(boxes, (row, column, -row - 1, -column - 1), strict=True):
        np.minimum.at(bound, label, position)
    return boxes.T * np.array([1, 1, -1, -1])


def _measure_objects(
    maps: Array, labels: np.ndarray, areas: np.ndarray, boxes: np.ndarray
) -> tuple[Float[np.ndarray, " count"], Integer[np.ndarray, "n 3"]]:
    """Return the flow error of each object, and its holes as (label, row, column) of each pixel."""
    ids, device_labels = np.flatnonzero(areas), jnp.asarray(labels)
    errors = np.zeros(len(areas), np.float32)
    extent = boxes[ids, 2:] - boxes[ids, :2] + 2  # with the ring of background
    sides = _box_sides(extent.max(1, initial=1))
    holes = [np.zeros((0, 3), int)]
    for side in np.unique(sides):
        members = ids[sides == side]
        # Objects of similar extent share a batch: it takes as many steps as its largest object.
        members = members[np.argsort(extent[sides == side].sum(1), kind="stable")]
        batch = _batch_size(int(side), len(members))
        for start in range(0, len(members), batch):
            # The last batch is filled with label 0, for which `_check` uses an empty mask.
            some = np.pad(members[start : start + batch], (0, max(start + batch - len(members), 0)))
            error, hole, any_hole = _check(maps, device_labels, some, boxes[some], side=int(side))
            errors[some] = np.asarray(error)
            if any_hole:
                number, row, column = np.nonzero(np.asarray(hole))
                # A box begins one pixel above and left of its object.
                corner = boxes[some[number], :2] - 1
                holes.append(np.stack([some[number], row + corner[:, 0], column + corner[:, 1]], 1))
    return errors, np.concatenate(holes)


def _batch_size(side: int, count: int) -> int:
    """Return the number of boxes per batch: one of few numbers, each of which is a program."""
    batch = max(BATCH_PIXELS // side**2, 1)
    if jax.default_backend() == "cpu":
        small = 1  # a crop of one cell would leave the rest of a full batch empty
        while small < min(count, batch):
            small *= 4
        return min(small, batch)
    # All boxes of this size are one batch, up to `MAX_PIXELS`.
    return min(padded_length(count, batch), max(MAX_PIXELS // side**2, 1))


def _box_sides(extent: Integer[np.ndarray, " n"]) -> Integer[np.ndarray, " n"]:
    """Round up to multiples of a quarter of the power of two below, so that few programs serve all
    objects."""
    # Example: extents of 65 to 80 pixels share boxes of 80, and 81 to 96 share boxes of 96.
    step = np.maximum(2 ** np.ceil(np.log2(extent)).astype(int) // 8, SMALLEST_BOX // 2)
    return np.maximum(-(-extent // step) * step, SMALLEST_BOX)


def _fill_holes(
    labels: np.ndarray, holes: np.ndarray, keep: np.ndarray, areas: np.ndarray
) -> np.ndarray:
    """Assign pixels of holes to the object around them; of two nested objects, to the larger."""
    holes = holes[keep[holes[:, 0]]]
    # The last assignment to a pixel remains, so larger objects are written last.
    holes = holes[np.argsort(areas[holes[:, 0]], kind="stable")]
    labels[holes[:, 1], holes[:, 2]] = holes[:, 0]
    return labels


def _renumber(labels: Integer[np.ndarray, "h w"], smallest: int) -> Integer[np.ndarray, "h w"]:
    """Number objects 1, 2, ... by their first pixel, row by row, and drop those that became too
    small."""
    areas = np.bincount(labels.ravel())
    keep = areas >= max(smallest, 1)
    keep[0] = False
    first = np.full(len(areas), labels.size)
    # Assigned in reverse, because the last assignment to an index remains.
    first[labels.ravel()[::-1]] = np.arange(labels.size)[::-1]
    # Dropped labels have the largest key: they are sorted to the end, and the slice removes them.
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
    """Return flow errors, the pixels of holes, and whether there is any hole."""
    # (n, side) each: rows and columns of the boxes, with the ring of background.
    rows = boxes[:, 0, None] - 1 + jnp.arange(side)
    columns = boxes[:, 1, None] - 1 + jnp.arange(side)
    height, width = labels.shape
    # Indices outside the image are set to its size: `get` fills them with 0.
    where = (
        jnp.where((rows < 0) | (rows >= height), height, rows)[:, :, None],
        jnp.where((columns < 0) | (columns >= width), width, columns)[:, None, :],
    )
    # (n, side, side): only the pixels of the box's object, not those of its neighbors.
    mask = labels.at[where].get(mode="fill", fill_value=0) == ids[:, None, None]
    mask &= ids[:, None, None] > 0
    flow = maps[..., :2].at[where].get(mode="fill", fill_value=0) / FLOW_SCALE
    extent = jnp.where(ids[:, None] > 0, boxes[:, 2:] - boxes[:, :2], 0)
    # The number of steps, 2 (height + width + 4), is the same as in `flow_targets`.
    difference = jnp.square(_implied_flow(mask, 2 * (extent.sum(1) + 4)) - flow).sum(-1)
    error = jnp.where(mask, difference, 0).sum((1, 2)) / jnp.maximum(mask.sum((1, 2)), 1)
    holes = _find_holes(mask)
    return error, holes, holes.any()


def _implied_flow(mask: Bool[Array, "n s s"], steps: Int[Array, " n"]) -> Float[Array, "n s s 2"]:
    """Return unit vectors along the gradient of heat that spreads from each object's center.

    All objects take the maximum of `steps`, as in the package on a GPU. (On a CPU the package takes
    each object's own number.)"""
    n, side, _ = mask.shape
    rows, columns = jnp.arange(side)[:, None], jnp.arange(side)
    count = jnp.maximum(mask.sum((1, 2)), 1)
    center_y = (mask * rows).sum((1, 2)) / count
    center_x = (mask * columns).sum((1, 2)) / count
    distance = (rows - center_y[:, None, None]) ** 2 + (columns - center_x[:, None, None]) ** 2
    # Heat is released at the object's pixel nearest to its centroid. The centroid of a concave
    # object may be outside of it.
    source = jnp.argmin(jnp.where(mask, distance, jnp.inf).reshape(n, -1), axis=1)
    source = jax.nn.one_hot(source, side * side, dtype=jnp.float32).reshape(n * side, side)
    # Each step, every pixel of the object becomes the mean of its 3 x 3 neighborhood.
    weight = jnp.where(mask, 1 / 9, 0).reshape(n * side, side).astype(jnp.float32)
    # The source adds 1 before each averaging; averaging is linear, so this term is constant.
    inflow = _sum_3x3(source) * weight
    heat = jax.lax.fori_loop(
        0,
        steps.max(),
        lambda _, heat: _sum_3x3(heat) * weight + inflow,
        jnp.zeros_like(inflow),
    )
    # Central differences. No object touches the edge of its box, so values that wrap around are
    # masked.
    down = jnp.roll(heat, -1, 0) - jnp.roll(heat, 1, 0)
    right = jnp.roll(heat, -1, 1) - jnp.roll(heat, 1, 1)
    flow = jnp.stack([down, right], -1)
    # Scaled first, so that squares of tiny numbers do not become 0.
    largest = jnp.abs(flow).max(-1, keepdims=True)
    flow = jnp.where(largest > 0, flow / largest, 0)
    length = jnp.sqrt(jnp.square(flow).sum(-1, keepdims=True))
    flow = jnp.where(length > 0, flow / length, 0).reshape(n, side, side, 2)
    return jnp.where(mask[..., None], flow, 0)


def _sum_3x3(heat: Float[Array, "rows s"]) -> Float[Array, "rows s"]:
    """Sum 3 x 3 pixels. Boxes are stacked vertically: heat that crosses their borders meets rings
    of background."""
    tall = jnp.pad(heat, ((1, 1), (0, 0)))
    # Without the barrier XLA fuses both sums into one loop over nine values, which takes twice as
    # long.
    tall = jax.lax.optimization_barrier(tall[:-2] + tall[1:-1] + tall[2:])
    wide = jnp.pad(tall, ((0, 0), (1, 1)))
    return wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]


def _find_holes(mask: Bool[Array, "n s s"]) -> Bool[Array, "n s s"]:
    """Return the background pixels that are not connected with the ring around the box
    (4-connectivity).

    The background is flooded from the ring. Boxes are one flat array: a row above is `side`
    positions before."""
    n, side, _ = mask.shape
    free = ~mask.reshape(-1)
    edge = jnp.array([0, -1])
    ring = jnp.zeros((side, side), bool).at[edge].set(True).at[:, edge].set(True)
    # One row of padding at both ends, so that the slices for the rows above and below exist.
    start = jnp.pad(jnp.tile(ring.reshape(-1), n) & free, side)

    def flood(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        outside, _ = carry
        here = outside[side:-side]
        # At the end of a row these shifts read another row. Both pixels belong to rings, which are
        # outside from the start.
        across = here | outside[side - 1 : -side - 1] | outside[side + 1 : len(outside) - side + 1]
        near = (across | outside[: -2 * side] | outside[2 * side :]) & free
        return outside.at[side:-side].set(near), (near != here).any()

    # Repeat until a round adds no pixel.
    outside, _ = jax.lax.while_loop(lambda carry: carry[1], flood, (start, jnp.array(True)))
    return (~outside[side:-side] & free).reshape(mask.shape)

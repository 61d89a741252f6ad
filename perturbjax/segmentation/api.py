"""Segment images with Cellpose networks: used by `perturbjax.segment` and by `perturbjax build`."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer, Num

from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.models.layers import Mode
from perturbjax.segmentation import dynamics, objects, tiles, weight_files
from perturbjax.segmentation.diameter_estimation import segment_at_own_scale
from perturbjax.segmentation.diameters import diameter_warning, measure_diameters
from perturbjax.segmentation.foreground import (
    Foreground,
    analyze_foreground,
    remove_implausible_objects,
)
from perturbjax.segmentation.objects import Objects, Rules
from perturbjax.segmentation.weights import build, load_weights

Precision = Literal["auto", "float32", "bfloat16"]

#: Full-size tiles in one batch of the network; of smaller tiles, as many as have the same number of
#: pixels.
TILES_PER_BATCH = {"cpu": 4, "gpu": 32, "tpu": 32}
#: Height or width in pixels above which an image is segmented in blocks, and their overlap in
#: diameters.
BLOCK, OVERLAP = 4096, 4
#: Threads that compute masks from flows, and the maximum number of images that wait for them.
THREADS, MAX_PENDING = 2, 4
#: Images without objects that a batch may take up in passing.
MAX_BATCH = 64
#: Allowed diameters in pixels.
MIN_DIAMETER, MAX_DIAMETER = 2.0, 2000.0


class WeightDefaults(NamedTuple):
    """Settings that belong to published weights."""

    rules: Rules = Rules()
    own_scale: bool = False
    """Whether the diameter is estimated for each image unless one is given."""
    diam_mean: float | None = None
    """Diameter in pixels that the network expects, if the file does not state it."""


#: By name of the weights. The flow threshold of `nuclei_small` was chosen on images that trained no
#: network: average precision at IoU 0.5, 0.75, 0.9 is 0.829, 0.667, 0.435 with Cellpose's 0.4, and
#: 0.847, 0.660, 0.425 with 0.8.
DEFAULTS = {
    "nuclei_small": WeightDefaults(Rules(flow_threshold=0.8), own_scale=True),
    "nuclei": WeightDefaults(diam_mean=17.0),
}


class _Input(NamedTuple):
    """An image on its way to the network."""

    image: Num[np.ndarray, "h w c"]
    foreground: Foreground


class Segmenter:
    """A segmentation network with its weights.

    Attributes:
        path: weights file.
        config: shape of the network, and the diameters it was trained on.
        precision: floating-point type of the network; masks are always computed in float32.
        rules: thresholds that remove objects.
        seconds: time spent in the network and, in parallel, in computing masks.
    """

    def __init__(
        self,
        weights: str | Path,
        diameter: float | Literal["per-image"] = 0.0,
        precision: Precision = "auto",
        rules: Rules | None = None,
    ):
        """
        Args:
            weights: name of published weights (see `weight_files.FILES`), or path of a weights
                file.
            diameter: typical diameter of an object in pixels. "per-image" estimates it for each
                image. 0 takes the default of the weights: "per-image" for nuclei_small, else the
                diameter of the training images.
            precision: auto is bfloat16 for cpsam and float32 for the others.
            rules: thresholds for objects; None takes the defaults of the weights.

        Raises:
            InputError: the weights or the diameter cannot be used.
        """
        pixels = 0.0 if isinstance(diameter, str) else float(diameter)
        if pixels and not MIN_DIAMETER <= pixels <= MAX_DIAMETER:  # NaN too
            raise InputError(
                f"--diameter {diameter}: must be {MIN_DIAMETER:g} to {MAX_DIAMETER:g} pixels, or 0 "
                "for the default"
            )
        self.path = weight_files.find(weights)
        defaults = DEFAULTS.get(str(weights), WeightDefaults())
        config, params = load_weights(self.path)
        # The file of these weights does not contain the diameter.
        if defaults.diam_mean:
            config = replace(config, diam_mean=defaults.diam_mean)
        self.config = config
        self.diameter = pixels
        self.own_scale = not pixels and (diameter == "per-image" or defaults.own_scale)
        self.precision = config.precision if precision == "auto" else precision
        self.rules = defaults.rules if rules is None else rules
        self.seconds = {"network": 0.0, "masks": 0.0}
        # The structure is a static argument of the compiled program; parameters are its inputs.
        self._graph, self._state = nnx.split(build(config, params))
        self._full_batch: tuple[tuple[int, ...], int] = ((), 0)

    def with_diameter(self, diameter: float) -> Segmenter:
        """Return a segmenter with the same network and another diameter in pixels."""
        # A shallow copy shares the parameters.
        other = copy.copy(self)
        other.diameter, other.own_scale = diameter, False
        return other

    @property
    def expected_diameter(self) -> float:
        """Diameter in pixels that objects are assumed to have."""
        return self.diameter or self.config.diam_labels

    @property
    def rescale(self) -> float:
        """Pixels of the network's input for each pixel of an image."""
        return self.config.diam_mean / self.expected_diameter

    def masks(self, images: Iterable[Num[np.ndarray, "..."]]) -> Iterator[Objects]:
        """Segment images in order.

        Neighbors of one shape share a batch. While the network works on the next batch, threads
        compute the masks of the previous ones. Images without objects do not reach the network.

        Raises:
            InputError: an image is empty, or has more channels than the network.
        """
        if self.own_scale:
            yield from segment_at_own_scale(self, images)
            return
        with ThreadPoolExecutor(THREADS) as threads:
            pending: deque[Future[Objects]] = deque()
            for batch in self._batches(images):
                # In order, for the images with objects only.
                maps = iter(self._timed_maps([each for each in batch if each.foreground.present]))
                for each in batch:
                    if not each.foreground.present:
                        # Empty results pass through the same queue, so that the results remain in
                        # order.
                        pending.append(threads.submit(Objects.empty, each.image.shape))
                    elif max(each.image.shape[:2]) > BLOCK:
                        pending.append(threads.submit(self._segment_blocks, each))
                    else:
                        pending.append(threads.submit(self._objects, each, next(maps)))
                # A pending image holds its maps in memory, so their number is limited.
                while len(pending) > MAX_PENDING:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _batches(self, images: Iterable[np.ndarray]) -> Iterator[list[_Input]]:
        """Collect neighbors of one shape until the batch is full; a very large image is a batch of
        its own."""
        batch: list[_Input] = []
        present = 0
        for image in images:
            image = self._with_channels(np.asarray(image))
            item = _Input(image, analyze_foreground(image))
            large = max(image.shape[:2]) > BLOCK
            plan = self.plan(image)
            # Only images with objects reach the network, so only these fill a batch.
            full = present * plan.count >= self._tiles_per_batch(plan) or len(batch) >= MAX_BATCH
            if batch and (full or batch[0].image.shape != image.shape or large):
                yield batch
                batch, present = [], 0
            batch.append(item)
            present += item.foreground.present
        if batch:
            yield batch

    def _timed_maps(self, batch: list[_Input]) -> Iterable[Float[Array, "hb wb 3"]]:
        if not batch or max(batch[0].image.shape[:2]) > BLOCK:
            return ()
        start = time.monotonic()
        images = [each.image for each in batch]
        ranges = np.stack([each.foreground.ranges for each in batch])
        # The last batch of a series is filled up, so that it needs no further program.
        shape, size = self._full_batch
        if images[0].shape == shape and len(images) < size:
            missing = size - len(images)
            images += images[-1:] * missing
            ranges = np.concatenate([ranges, np.repeat(ranges[-1:], missing, 0)])
        self._full_batch = images[0].shape, len(images)
        maps = jax.block_until_ready(self.maps(images, ranges))
        self.seconds["network"] += time.monotonic() - start
        return maps

    def _objects(self, item: _Input, maps: Float[Array, "hb wb 3"]) -> Objects:
        start = time.monotonic()
        height, width = item.image.shape[:2]
        result = objects.compute_objects(maps, height, width, self._steps, self.rules)
        result = self._plausible(result, item)
        self.seconds["masks"] += time.monotonic() - start
        return result

    def _plausible(self, result: Objects, item: _Input) -> Objects:
        labels = remove_implausible_objects(
            result.labels, item.image, item.foreground.noise, self.diameter
        )
        return result._replace(labels=labels)

    @property
    def _steps(self) -> int:
        """Steps that pixels follow the flow: fewer where the image is enlarged for the network."""
        return max(int(dynamics.STEPS / self.rescale), 1)

    def plan(self, image: np.ndarray) -> tiles.Plan:
        """Return the tiling of an image of this shape."""
        return tiles.Plan(image.shape[0], image.shape[1], self.rescale, self.config.tiling)

    def maps(
        self, images: Sequence[np.ndarray], ranges: Float[np.ndarray, "b c 2"]
    ) -> Float[Array, "b hb wb 3"]:
        """Run the network on images of one shape.

        Args:
            images: (height, width, channels) each.
            ranges: of each channel the intensity that becomes 0, and the difference to the one that
                becomes 1.

        Returns:
            Flow down, flow right and cell logit of each pixel, padded at the bottom and right.
        """
        plan = self.plan(images[0])
        padding = [
            (0, padded - size)
            for padded, size in zip(plan.padded, images[0].shape[:2], strict=True)
        ]
        stacked = np.stack([np.pad(image, (*padding, (0, 0))) for image in images])
        cut = tiles.cut(stacked, ranges, plan.y.cut, plan.x.cut)
        count, grid = len(images) * plan.count, (plan.y.tiles, plan.x.tiles)
        # A power of two, so that few programs are compiled.
        size = min(self._tiles_per_batch(plan), 2 ** math.ceil(math.log2(count)))
        dtype = jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32
        chunks = tuple(
            _forward(self._graph, self._state, tiles.chunk(cut, grid, start, size), dtype=dtype)
            for start in range(0, count, size)
        )
        rows, columns = plan.y.join(plan.padded[0]), plan.x.join(plan.padded[1])
        return tiles.join(chunks, rows, columns, grid, len(images))

    def _tiles_per_batch(self, plan: tiles.Plan) -> int:
        # Pixels of a batch of full-size tiles.
        full = TILES_PER_BATCH.get(jax.default_backend(), 8) * tiles.TILE**2
        return max(2 ** int(math.log2(full / (plan.tile[0] * plan.tile[1]))), 1)

    def _segment_blocks(self, item: _Input) -> Objects:
        """Segment a large image block by block, in the memory of one block.

        Each block keeps the objects with their centroid in its part. The result is that of the
        whole image, except for objects wider than the overlap."""
        image, ranges = item.image, item.foreground.ranges[None]
        margin = int(OVERLAP * self.expected_diameter) + self.config.tiling.side
        labels, errors, count = np.zeros(image.shape[:2], np.uint32), [], 0
        for top in range(0, image.shape[0], BLOCK):
            for left in range(0, image.shape[1], BLOCK):
                y, x = max(top - margin, 0), max(left - margin, 0)
                block = image[y : top + BLOCK + margin, x : left + BLOCK + margin]
                # The intensity range is that of the whole image, so that blocks are normalized
                # alike.
                result = self._objects(item._replace(image=block), self.maps([block], ranges)[0])
                own = _centroids_inside(result.labels, (top - y, left - x), BLOCK)
                # Continue the numbering of the previous blocks; 0 drops an object of a neighboring
                # block.
                number = np.where(own, np.cumsum(own) + count, 0).astype(np.uint32)
                part = labels[y : y + block.shape[0], x : x + block.shape[1]]
                # Pixels of objects of previous blocks are not overwritten.
                np.copyto(part, number[result.labels], where=(part == 0))
                count += int(own.sum())
                errors.append(result.errors)
        dtype = np.uint16 if count <= np.iinfo(np.uint16).max else np.uint32
        return Objects(labels.astype(dtype), np.concatenate(errors))

    def _with_channels(self, image: np.ndarray) -> Num[np.ndarray, "h w c"]:
        """Add the channel axis and empty channels up to the network's number."""
        image = image[..., None] if image.ndim == 2 else image
        channels = self.config.channels
        if image.ndim != 3 or 0 in image.shape or image.shape[2] > channels:
            raise InputError(
                f"an image of shape {image.shape} cannot be segmented: these weights take (height, "
                "width) or "
                f"(height, width, channels) with up to {channels} channels"
            )
        missing = channels - image.shape[2]
        return np.pad(image, ((0, 0), (0, 0), (0, missing))) if missing else image


def segment(
    images: np.ndarray | Sequence[np.ndarray],
    weights: str | Path = "nuclei_small",
    diameter: float = 0.0,
    precision: Precision = "auto",
) -> Integer[np.ndarray, "h w"] | list[Integer[np.ndarray, "h w"]]:
    """Segment nuclei or cells, as `perturbjax build --diameter per-site` does.

    A warning is printed if the objects do not have the given diameter.

    Args:
        images: one image (height, width) or (height, width, channels), or a sequence of them, of
            any intensities. If there are two channels, the first shows the cells and the second
            their nuclei.
        weights: `nuclei_small` (included), Cellpose's `nuclei`, `cyto`, `cyto2`, `cyto3` or `cpsam`
            (downloaded once), or path of a weights file.
        diameter: typical diameter of an object in pixels. 0 takes the default of the weights:
            nuclei_small estimates it for each image, the others use the diameter of their training
            images.
        precision: floating-point type of the network; auto is bfloat16 for cpsam and float32 for
            the others.

    Returns:
        Instance masks of each image: 0 is background, 1, 2, ... are objects; uint16, or uint32
        above 65,535 objects.

    Raises:
        InputError: weights, diameter or an image cannot be used.

    Example:
        >>> y, x = np.mgrid[:96, :96] % 48 - 24
        >>> nuclei = 1000 * np.exp(-((y**2 + x**2) / 120) ** 2)
        >>> perturbjax.segment(nuclei, diameter=24).max()
        np.uint16(4)
    """
    # Up to 4 channels on the last axis; a longer last axis means a stack of 2-D images.
    single = isinstance(images, np.ndarray) and (
        images.ndim == 2 or (images.ndim == 3 and images.shape[2] <= 4)
    )
    segmenter = Segmenter(weights, diameter, precision)
    results = list(segmenter.masks([np.asarray(images)] if single else images))
    if not segmenter.own_scale:
        measurements = [(each.errors, measure_diameters(each.labels)) for each in results]
        warning = diameter_warning(
            measurements, segmenter.expected_diameter, segmenter.rules.flow_threshold
        )
        if warning:
            console.print(f"warning: {warning}")
    return results[0].labels if single else [each.labels for each in results]


@partial(jax.jit, static_argnames=("graph", "dtype"))
def _forward(
    graph: nnx.GraphDef, state: nnx.State, x: Float[Array, "n h w c"], *, dtype
) -> Float[Array, "n h w o"]:
    # A network may have further maps for additional classes, which are not used here.
    return nnx.merge(graph, state)(x, Mode(dtype=dtype)).maps[..., :3]


def _centroids_inside(
    labels: Integer[np.ndarray, "h w"], start: tuple[int, int], side: int
) -> np.ndarray:
    """Return for each label whether its centroid lies in the square of `side` pixels from `start`
    on."""
    count = np.bincount(labels.ravel()).astype(float)
    inside = np.ones(len(count), bool)
    for axis, first in enumerate(start):
        # (h, w): the row or the column of each pixel.
        position = np.broadcast_to(
            np.expand_dims(np.arange(labels.shape[axis]), 1 - axis), labels.shape
        )
        centroid = np.bincount(labels.ravel(), position.ravel()) / np.maximum(count, 1)
        inside &= (centroid >= first) & (centroid < first + side)
    inside[0] = False
    return inside & (count > 0)

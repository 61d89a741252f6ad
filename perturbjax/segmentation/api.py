"""Images in, instance masks out, for the networks of cellpose: what `perturbjax.segment` and the engines call."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer, Num

from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.models.layers import Mode
from perturbjax.segmentation import diameters as sizes
from perturbjax.segmentation import dynamics, tiles
from perturbjax.segmentation import weight_files as names
from perturbjax.segmentation.dynamics import Objects, Rules
from perturbjax.segmentation.weights import build, load_weights

Precision = Literal["auto", "float32", "bfloat16"]

#: Tiles of full size that go through the network together, and the pixels that these are: of smaller tiles, more.
TILES_TOGETHER = {"cpu": 4, "gpu": 32, "tpu": 32}
#: Sides of an image beyond which it is segmented in blocks, and how far these overlap, in diameters.
BLOCK, OVERLAP = 4096, 4
#: Threads that make masks, and images that may be ahead of the one asked for.
THREADS, AHEAD = 2, 4
#: Diameters, in pixels, that images can sensibly have objects of.
SMALLEST, LARGEST = 2.0, 2000.0


class Segmenter:
    """A network with its weights, ready for images.

    Attributes:
        path: the file of the weights.
        config: the network's shape, and the sizes its weights know.
        precision: what the network computes in; masks are always made in float32.
        seconds: what it spent so far in the network and, beside it, in making masks.
    """

    def __init__(
        self,
        weights: str | Path,
        diameter: float = 0.0,
        precision: Precision = "auto",
        rules: Rules | None = None,
    ):
        """
        Args:
            weights: name of a published model (see `names.FILES`), or path of a weights file.
            diameter: typical diameter of an object in pixels; 0 takes that of the images of the weights' training.
            precision: see above; auto is bfloat16 for cpsam and float32 for the others.
            rules: what makes an object.

        Raises:
            InputError: the weights or the diameter cannot be used.
        """
        if diameter and not SMALLEST <= diameter <= LARGEST:  # NaN too
            raise InputError(
                f"--diameter {diameter}: wants {SMALLEST:g} to {LARGEST:g} pixels, or 0 for the weights' own"
            )
        self.path = names.find(weights)
        config, params = load_weights(self.path)
        if str(weights) == "nuclei":  # the published file does not say so itself
            config = replace(config, diam_mean=17.0)
        self.config, self.diameter = config, diameter
        self.precision = config.precision if precision == "auto" else precision
        self.rules = Rules() if rules is None else rules
        self.seconds = {"network": 0.0, "masks": 0.0}
        self._graph, self._state = nnx.split(build(config, params))

    @property
    def expected(self) -> float:
        """The diameter in pixels that objects are taken to have."""
        return self.diameter or self.config.diam_labels

    @property
    def rescale(self) -> float:
        """Pixels of the network's image for each of an image's."""
        return self.config.diam_mean / self.expected

    def masks(self, images: Iterable[Num[np.ndarray, "..."]]) -> Iterator[Objects]:
        """The objects of each image, in order.

        Neighbours of one shape go through the network together, and while it works on the next ones, threads make the
        masks of those before, a few images ahead at most.

        Raises:
            InputError: an image is empty, or has more channels than the network.
        """
        with ThreadPoolExecutor(THREADS) as threads:
            pending: deque[Future[Objects]] = deque()
            for batch in self._batches(images):
                if max(batch[0].shape[:2]) > BLOCK:
                    pending.append(threads.submit(self._in_blocks, batch[0]))
                else:
                    for image, maps in zip(batch, self._timed_maps(batch), strict=True):
                        pending.append(
                            threads.submit(self._objects, maps, (image.shape[0], image.shape[1]))
                        )
                while len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _batches(self, images: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Neighbours of one shape, as many as fill the network once; an image too large for that alone."""
        together: list[np.ndarray] = []
        for image in images:
            image = self._with_channels(np.asarray(image))
            plan = self.plan(image)
            full = len(together) * plan.count >= self._at_once(plan)
            if together and (
                full or together[0].shape != image.shape or max(image.shape[:2]) > BLOCK
            ):
                yield together
                together = []
            together.append(image)
        if together:
            yield together

    def _timed_maps(self, images: list[np.ndarray]) -> Float[Array, "b hb wb 3"]:
        start = time.monotonic()
        maps = jax.block_until_ready(self.maps(images))
        self.seconds["network"] += time.monotonic() - start
        return maps

    def _objects(self, maps: Float[Array, "hb wb 3"], shape: tuple[int, int]) -> Objects:
        start = time.monotonic()
        found = dynamics.objects(
            maps, *shape, max(int(dynamics.STEPS / self.rescale), 1), self.rules
        )
        self.seconds["masks"] += time.monotonic() - start
        return found

    def plan(self, image: np.ndarray) -> tiles.Plan:
        return tiles.Plan(image.shape[0], image.shape[1], self.rescale, self.config.tiling)

    def maps(
        self, images: Sequence[np.ndarray], ends: Float[np.ndarray, "b c 2"] | None = None
    ) -> Float[Array, "b hb wb 3"]:
        """The network's flows and logits for images of one shape; padded at the bottom and right."""
        plan = self.plan(images[0])
        ends = np.stack([tiles.percentiles(image) for image in images]) if ends is None else ends
        more = [
            (0, padded - size)
            for padded, size in zip(plan.padded, images[0].shape[:2], strict=True)
        ]
        stacked = np.stack([np.pad(image, (*more, (0, 0))) for image in images])
        cut = tiles.cut(stacked, ends, plan.y.cut, plan.x.cut)
        count, grid = len(images) * plan.count, (plan.y.tiles, plan.x.tiles)
        at_once = min(self._at_once(plan), 2 ** math.ceil(math.log2(count)))
        mode = jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32
        chunks = tuple(
            _forward(self._graph, self._state, tiles.chunk(cut, grid, start, at_once), dtype=mode)
            for start in range(0, count, at_once)
        )
        rows, columns = plan.y.join(plan.padded[0]), plan.x.join(plan.padded[1])
        return tiles.join(chunks, rows, columns, grid, len(images))

    def _at_once(self, plan: tiles.Plan) -> int:
        full = TILES_TOGETHER.get(jax.default_backend(), 8) * tiles.TILE**2
        return max(2 ** int(math.log2(full / (plan.tile[0] * plan.tile[1]))), 1)

    def _in_blocks(self, image: Num[np.ndarray, "h w c"]) -> Objects:
        """As the whole at once, but for objects wider than the blocks' overlap, in the memory of one block.

        Each block keeps the objects whose middle lies in its own part, which no other block has.
        """
        ends = tiles.percentiles(image)[None]
        margin = int(OVERLAP * self.expected) + self.config.tiling.side
        labels, errors, count = np.zeros(image.shape[:2], np.uint32), [], 0
        for top in range(0, image.shape[0], BLOCK):
            for left in range(0, image.shape[1], BLOCK):
                y, x = max(top - margin, 0), max(left - margin, 0)
                block = image[y : top + BLOCK + margin, x : left + BLOCK + margin]
                found = self._objects(self.maps([block], ends)[0], (block.shape[0], block.shape[1]))
                own = _middles_in(found.labels, (top - y, left - x), BLOCK)
                number = np.where(own, np.cumsum(own) + count, 0).astype(np.uint32)
                part = labels[y : y + block.shape[0], x : x + block.shape[1]]
                np.copyto(part, number[found.labels], where=(part == 0))
                count += int(own.sum())
                errors.append(found.errors)
        small = np.uint16 if count <= np.iinfo(np.uint16).max else np.uint32
        return Objects(labels.astype(small), np.concatenate(errors))

    def _with_channels(self, image: np.ndarray) -> Num[np.ndarray, "h w c"]:
        image = image[..., None] if image.ndim == 2 else image
        channels = self.config.channels
        if image.ndim != 3 or 0 in image.shape or image.shape[2] > channels:
            raise InputError(
                f"an image of shape {image.shape}: these weights take (height, width) with up to {channels} channels"
            )
        missing = channels - image.shape[2]
        return np.pad(image, ((0, 0), (0, 0), (0, missing))) if missing else image


def segment(
    images: np.ndarray | Sequence[np.ndarray],
    weights: str | Path = "nuclei_small",
    diameter: float = 0.0,
    precision: Precision = "auto",
) -> Integer[np.ndarray, "h w"] | list[Integer[np.ndarray, "h w"]]:
    """Instance masks: 0 is background, 1, 2, … the objects; uint16, or uint32 where there are more than 65,535.

    Args:
        images: one image (height, width) or (height, width, channels), or a sequence of them; any intensities. Of two
            channels the first holds the cells and the second their nuclei.
        weights: `nuclei_small`, which comes with the program, cellpose's `nuclei`, `cyto`, `cyto2`, `cyto3` or
            `cpsam`, which are fetched once, or path of a weights file.
        diameter: typical diameter of an object in pixels; 0 takes that of the images the weights were trained on.
        precision: what the network computes in; auto is bfloat16 for cpsam and float32 for the others.

    Raises:
        InputError: weights, diameter or an image cannot be used.

    A line on stderr says where the objects do not seem to have the diameter.

    Examples:
        >>> y, x = np.mgrid[:96, :96] % 48 - 24
        >>> nuclei = 1000 * np.exp(-((y**2 + x**2) / 120) ** 2)
        >>> perturbjax.segment(nuclei, diameter=24).max()
        np.uint16(4)
    """
    one = isinstance(images, np.ndarray) and (
        images.ndim == 2 or (images.ndim == 3 and images.shape[2] <= 4)
    )
    segmenter = Segmenter(weights, diameter, precision)
    found = list(segmenter.masks([np.asarray(images)] if one else images))
    doubt = sizes.doubt(
        [(each.labels, each.errors) for each in found],
        segmenter.expected,
        segmenter.rules.flow_threshold,
    )
    if doubt:
        console.print(f"note: {doubt}")
    return found[0].labels if one else [objects.labels for objects in found]


@partial(jax.jit, static_argnames=("graph", "dtype"))
def _forward(
    graph: nnx.GraphDef, state: nnx.State, x: Float[Array, "n h w c"], *, dtype
) -> Float[Array, "n h w o"]:
    return nnx.merge(graph, state)(x, Mode(dtype=dtype)).maps[..., :3]


def _middles_in(
    labels: Integer[np.ndarray, "h w"], start: tuple[int, int], side: int
) -> np.ndarray:
    """Which labels' middles lie in the square of `side` from `start` on."""
    count = np.bincount(labels.ravel()).astype(float)
    own = np.ones(len(count), bool)
    for axis, first in enumerate(start):
        position = np.broadcast_to(
            np.expand_dims(np.arange(labels.shape[axis]), 1 - axis), labels.shape
        )
        middle = np.bincount(labels.ravel(), position.ravel()) / np.maximum(count, 1)
        own &= (middle >= first) & (middle < first + side)
    own[0] = False
    return own & (count > 0)

"""Engines that run a Cellpose network in JAX: `nuclei` and `cellpose`."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import UInt, UInt16

from data_prep.segment import Failure, SegmenterConfig, to_uint16
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest
from perturbjax.segmentation.api import Segmenter
from perturbjax.segmentation.diameter_estimation import estimate_diameter
from perturbjax.segmentation.diameters import diameter_warning, measure_diameters

Image = UInt[np.ndarray, "_h _w _c"]


class NetworkSegmenter:
    """A network in this process, which then owns the accelerator."""

    def __init__(self, config: SegmenterConfig, weights: str):
        """
        Args:
            config: engine, diameter and precision.
            weights: name or path, as for `perturbjax.segment`.

        Raises:
            InputError: the weights cannot be found, read or used, or the diameter is out of range.
        """
        self.config = config
        self.network = Segmenter(
            weights,
            # `pixels` is 0 for the default diameter, and for one that is estimated per plate later.
            "per-image" if config.diameter_mode == "per-site" else config.pixels,
            config.precision,
        )
        # Flow errors and diameters of all sites, for `warning`.
        self._measurements: list[tuple[np.ndarray, np.ndarray]] = []

    def describe(self) -> dict[str, Any]:
        network, mode = self.network, self.config.diameter_mode
        diameter: float | str = mode
        if mode == "fixed":
            diameter = self.config.pixels
        elif mode == "trained":
            diameter = f"trained, {network.config.diam_labels:.4g}"
        return {
            "engine": self.config.engine,
            "version": f"perturbjax {version('perturbjax')}",
            "weights": network.path.name,
            "sha256": file_digest(network.path),
            "precision": network.precision,
            "parameters": {"diameter": diameter, **network.rules._asdict()},
        }

    def estimate_diameter(self, images: Sequence[Image]) -> float:
        return estimate_diameter(self.network, images)

    def segment(
        self, image: UInt[np.ndarray, "h w c"], diameter: float = 0.0
    ) -> UInt16[np.ndarray, "h w"]:
        """Segment one site. Of two channels, the first shows cells and the second their nuclei.

        Raises:
            InputError: there are more channels than the network takes, or too many objects.
        """
        mask = next(self.segment_all([(image, diameter)]))
        if isinstance(mask, Failure):
            raise InputError(mask.reason)
        return mask

    def segment_all(
        self, images: Iterable[tuple[Image, float]]
    ) -> Iterator[UInt16[np.ndarray, "_h _w"] | Failure]:
        """Segment (image, diameter) pairs in order; neighbors of one shape and diameter share
        batches.

        Raises:
            InputError: an image has more channels than the network.
        """
        # A diameter of 0 means that of the configuration.
        for diameter, group in itertools.groupby(images, key=lambda pair: pair[1]):
            segmenter = self.network.with_diameter(diameter) if diameter else self.network
            yield from self._segment_group(segmenter, (image for image, _ in group))

    def _segment_group(
        self, segmenter: Segmenter, images: Iterator[Image]
    ) -> Iterator[UInt16[np.ndarray, "_h _w"] | Failure]:
        """Segment images of one diameter; after an error, continue with the next image."""
        while True:
            # Images that the segmenter has read, but for which it has not returned a result.
            waiting: deque[Image] = deque()
            try:
                for result in segmenter.masks(_remember(images, waiting)):
                    waiting.popleft()
                    self._measurements.append((result.errors, measure_diameters(result.labels)))
                    yield _mask_or_failure(result.labels)
                return
            # An invalid input or setting ends the run; other errors concern one site.
            except InputError:
                raise
            except Exception as error:  # for example, XLA runs out of memory
                if not waiting:
                    raise
                waiting.popleft()
                # Results are in order, so the first waiting image is reported as failed. The rest
                # are segmented again.
                images = itertools.chain(list(waiting), images)
                yield Failure(f"{type(error).__name__}: {error}".splitlines()[0])

    def warning(self) -> str:
        """Return one line if the objects do not have the assumed diameter, else an empty text."""
        # An estimated diameter needs no warning: it was derived from the objects.
        if self.config.diameter_mode not in ("fixed", "trained"):
            return ""
        network = self.network
        return diameter_warning(
            self._measurements, network.expected_diameter, network.rules.flow_threshold
        )


def _remember(images: Iterable[Image], waiting: deque[Image]) -> Iterator[Image]:
    for image in images:
        waiting.append(image)
        yield image


# Too many objects are a failure of one site only.
def _mask_or_failure(labels: np.ndarray) -> UInt16[np.ndarray, "_h _w"] | Failure:
    try:
        return to_uint16(labels)
    except InputError as error:
        return Failure(error.message)

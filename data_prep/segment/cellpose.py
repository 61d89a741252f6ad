"""The network engine: cellpose's network and dynamics in JAX. torch is not needed, and never imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt, UInt16

from data_prep.segment import Precision
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest

if TYPE_CHECKING:
    from perturbjax.segmentation.diameter_estimation import AnySize

#: Objects that a mask of 16 bits can number.
MOST = int(np.iinfo(np.uint16).max)


class Cellpose:
    """A network of cellpose for one process, which then owns the accelerator."""

    def __init__(self, weights: str, diameter: float = 0.0, precision: Precision = "auto"):
        """
        Args:
            weights: `nuclei`, `cyto`, `cyto2`, `cyto3` or `cpsam` (from the cellpose package's cache, or fetched into
                it), or path of a weights file.
            diameter: typical diameter of an object in pixels; 0 takes that of the images of the weights' training.
            precision: what the network computes in; auto is bfloat16 for cpsam and float32 for the others.

        Raises:
            InputError: the weights cannot be found, read or used, or the diameter makes no sense.
        """
        from perturbjax.segmentation import Segmenter

        if not weights:
            raise InputError(
                "--segmenter cellpose: needs --weights NAME or PATH; nothing is chosen for you"
            )
        self.network = Segmenter(weights, diameter, precision)
        self.finder: Segmenter | AnySize = self.network
        self.doubted: list[Any] = []

    def describe(self) -> dict[str, Any]:
        network = self.network
        return {
            "engine": "cellpose",
            "version": f"perturbjax {version('perturbjax')}",
            "weights": network.path.name,
            "sha256": file_digest(network.path),
            "precision": network.precision,
            "parameters": {
                "diameter": network.diameter or f"the weights' own, {network.expected:.4g}",
                **network.rules._asdict(),
            },
        }

    def segment(self, image: UInt[np.ndarray, "h w c"]) -> UInt16[np.ndarray, "h w"]:
        """One channel holds the objects; of two the second holds the nuclei of the first's cells.

        Raises:
            InputError: there are more channels than the network takes, or more objects than 16 bits can number.
        """
        return next(self.segment_all([image]))

    def segment_all(
        self, images: Iterable[UInt[np.ndarray, "_h _w _c"]]
    ) -> Iterator[UInt16[np.ndarray, "_h _w"]]:
        """As `segment`, of many sites in their order: neighbours of one size go through the network together."""
        for found in self.finder.masks(images):
            if found.labels.dtype != np.uint16:
                raise InputError(
                    f"cellpose found {found.labels.max()} objects in one site; a mask holds up to {MOST}"
                )
            self.doubted.append((found.errors, _diameters(found.labels)))
            yield found.labels

    def doubt(self) -> str:
        """One line where the objects found so far do not have the size the network was told; else nothing."""
        from perturbjax.segmentation import diameters as sizes

        return sizes.doubt_of(
            self.doubted, self.network.expected, self.network.rules.flow_threshold
        )


def _diameters(labels: UInt16[np.ndarray, "h w"]) -> np.ndarray:
    from perturbjax.segmentation import diameters as sizes

    return sizes.diameters(labels)

"""Segmentation behind one small protocol: an image in, one instance mask out, and how it was made.

An engine is built inside the process that runs it (`pipeline` says which): it is described by a `SegmenterConfig`,
which travels between processes, and made by `create`. `nuclei` is the network that comes with the program, `cellpose`
cellpose's in JAX, and `cellpose-torch` the cellpose package, against which that is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.core.options import require, require_sound

Engine = Literal["nuclei", "cellpose", "cellpose-torch", "watershed"]
Precision = Literal["auto", "float32", "bfloat16"]
#: Engines of networks in JAX: one process owns the accelerator that they run on.
NETWORKS = ("nuclei", "cellpose")


@runtime_checkable
class Segmenter(Protocol):
    """What an engine must do."""

    def segment(self, image: UInt[np.ndarray, "h w c"]) -> UInt16[np.ndarray, "h w"]:
        """Instance labels 1, 2, … of the cells of one site; 0 is background."""
        ...

    def describe(self) -> dict[str, Any]:
        """Provenance: engine, version, weights and their SHA-256 (None where there are none), parameters."""
        ...


@dataclass(frozen=True)
class SegmenterConfig:
    """Segmentation engine and its settings."""

    engine: Engine = "watershed"
    weights: str = ""
    """Weights for cellpose: name of a published model or a file."""
    diameter: float = 0.0
    """Object diameter in pixels; 0: estimated by the engine."""
    precision: Precision = "auto"
    """Number format of a JAX network; auto: bfloat16 for cpsam, float32 for others."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("diameter", self.diameter, self.diameter >= 0, "0 (estimated) or more")


def create(config: SegmenterConfig) -> Segmenter:
    """The engine of a configuration, ready to run in this process.

    Raises:
        InputError: the engine cannot run as configured.
    """
    if config.precision != "auto" and config.engine not in NETWORKS:
        raise InputError(
            f"--precision {config.precision}: --segmenter {config.engine} has none; {' and '.join(NETWORKS)} do"
        )
    if config.engine == "cellpose":
        from data_prep.segment.cellpose import Cellpose

        return Cellpose(config.weights, config.diameter, config.precision)
    if config.engine == "nuclei":
        from data_prep.segment.nuclei import Nuclei

        return Nuclei(config.weights, config.diameter, config.precision)
    if config.engine == "cellpose-torch":
        from data_prep.segment.cellpose_torch import CellposeTorch

        return CellposeTorch(config.weights, config.diameter)
    from data_prep.segment.watershed import Watershed

    return Watershed(config.weights, config.diameter)

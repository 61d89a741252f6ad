"""Segmentation engines: one record per engine, from which the command line, checks and workers take
all they know.

To add an engine, write a class with the methods of `Segmenter` and add a record to `ENGINES`. A
`SegmenterConfig` travels between processes; `create` builds the engine in the process that runs it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt, UInt16

from perturbjax.core.choices import Choice
from perturbjax.core.errors import InputError
from perturbjax.core.options import require, require_sound

Precision = Literal["auto", "float32", "bfloat16"]
#: Diameter in pixels as a number or text, or one of DIAMETER_MODES.
Diameter = str | float
DIAMETER_MODES = ("auto", "per-plate", "per-site")
#: Largest number of objects in a mask of 16 bits.
MAX_OBJECTS = int(np.iinfo(np.uint16).max)


@runtime_checkable
class Segmenter(Protocol):
    """An engine, ready to run in this process."""

    def segment(
        self, image: UInt[np.ndarray, "h w c"], diameter: float = 0.0
    ) -> UInt16[np.ndarray, "h w"]:
        """Return instance labels 1, 2, ... of one site; 0 is background.

        `diameter` is the plate's in pixels; 0 uses the one of the configuration.
        """
        ...

    def estimate_diameter(self, images: Sequence[UInt[np.ndarray, "_h _w _c"]]) -> float:
        """Return one diameter in pixels for sites of a plate, 0 if they contain no objects."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the provenance: engine, version, weights with SHA-256 (None without weights),
        parameters."""
        ...


class Failure(NamedTuple):
    """A site that could not be segmented; the build records it and continues."""

    reason: str


@dataclass(frozen=True)
class SegmenterConfig:
    """Segmentation engine and its settings."""

    engine: Engine = "watershed"
    weights: str = ""
    """Weights for cellpose: name of a published model or a file."""
    diameter: Diameter = "auto"
    """Object diameter: pixels, per-plate, per-site, or auto (the engine's default)."""
    precision: Precision = "auto"
    """Number format of a JAX network; auto: bfloat16 for cpsam, float32 for others."""

    def __post_init__(self) -> None:
        require_sound(self)
        # A frozen dataclass refuses normal assignment.
        object.__setattr__(self, "diameter", parse_diameter(self.diameter))

    @property
    def diameter_mode(self) -> Literal["fixed", "per-plate", "per-site", "trained"]:
        """How the diameter of a site is found."""
        match self.diameter:
            case "per-plate" | "per-site" as mode:
                return mode
            # 0 means the engine's default, as "auto" does.
            case "auto" | 0:
                return ENGINES[self.engine].diameter
        return "fixed"

    @property
    def pixels(self) -> float:
        """The fixed diameter in pixels, 0 if there is none."""
        # Text is one of DIAMETER_MODES, because `__post_init__` converts numbers.
        return 0.0 if isinstance(self.diameter, str) else float(self.diameter)


def parse_diameter(diameter: Diameter) -> Diameter:
    """Return a number of pixels as float; "auto", "per-plate" and "per-site" unchanged.

    Raises:
        InputError: it is neither.
    """
    if diameter in DIAMETER_MODES:
        return diameter
    try:
        pixels = float(diameter)
    except ValueError:
        # NaN fails the range check below.
        pixels = math.nan
    valid = 0 <= pixels < math.inf
    require("diameter", diameter, valid, "auto, per-plate, per-site, or a number of pixels")
    return pixels


@dataclass(frozen=True)
class EngineRecord(Choice):
    """Everything that is known about an engine."""

    load: Callable[[SegmenterConfig], Segmenter]
    """Build the engine.

    Raises `InputError` if it cannot run as configured."""
    diameter: Literal["per-plate", "trained"]
    """Default: one estimated diameter per plate, or that of the images the weights were trained on.
    """
    single_stain: bool = True
    """Whether the weights know one stain, so that a mixture of channels is refused."""
    network: bool = False
    """Whether it runs JAX. One process then owns the accelerator, and the workers only read images.
    """


def _engine_class(module: str, name: str) -> Callable[..., Segmenter]:
    """Import an engine by name when it is used: the engines import this module."""
    return getattr(importlib.import_module(f"data_prep.segment.{module}"), name)


def _load_nuclei(config: SegmenterConfig) -> Segmenter:
    if config.weights:
        raise InputError(
            f"--weights {config.weights}: --segmenter nuclei has its own weights; "
            "choose --segmenter cellpose to use others"
        )
    return _engine_class("network", "NetworkSegmenter")(config, "nuclei_small")


def _load_cellpose(config: SegmenterConfig) -> Segmenter:
    if not config.weights:
        raise InputError(
            "--segmenter cellpose: needs --weights NAME or PATH; there is no default model"
        )
    return _engine_class("network", "NetworkSegmenter")(config, config.weights)


def _load_cellpose_torch(config: SegmenterConfig) -> Segmenter:
    return _engine_class("cellpose_torch", "CellposeTorch")(config)


def _load_watershed(config: SegmenterConfig) -> Segmenter:
    return _engine_class("watershed", "Watershed")(config)


ENGINES: dict[str, EngineRecord] = {
    "nuclei": EngineRecord(
        "network for nuclei in one channel, included in perturbjax",
        _load_nuclei,
        diameter="per-plate",
        network=True,
    ),
    "cellpose": EngineRecord(
        "Cellpose network in JAX with the weights of --weights",
        _load_cellpose,
        diameter="trained",
        network=True,
    ),
    "cellpose-torch": EngineRecord(
        "the cellpose package (needs the extra perturbjax[cellpose])",
        _load_cellpose_torch,
        diameter="trained",
    ),
    "watershed": EngineRecord(
        "threshold, distance transform and watershed; works on a mixture of channels",
        _load_watershed,
        diameter="per-plate",
        single_stain=False,
    ),
}
if TYPE_CHECKING:
    Engine = str
    EngineChoice = str
else:  # the choices of --segmenter
    Engine = Literal[tuple(ENGINES)]
    EngineChoice = Literal[("auto", *ENGINES)]


def create(config: SegmenterConfig) -> Segmenter:
    """Build the engine of a configuration in this process.

    Raises:
        InputError: the engine cannot run as configured.
    """
    record = ENGINES[config.engine]
    if config.precision != "auto" and not record.network:
        # Only engines that run JAX have a precision.
        networks = " and ".join(name for name, each in ENGINES.items() if each.network)
        raise InputError(
            f"--precision {config.precision}: --segmenter {config.engine} has no precision "
            "setting; "
            f"{networks} have one"
        )
    return record.load(config)


def to_uint16(mask: np.ndarray) -> UInt16[np.ndarray, "h w"]:
    """Return the mask as uint16.

    Raises:
        InputError: it has more objects than 16 bits can number.
    """
    if mask.max(initial=0) > MAX_OBJECTS:
        raise InputError(f"{mask.max()} objects in one site; a mask can hold {MAX_OBJECTS}")
    return mask.astype(np.uint16)

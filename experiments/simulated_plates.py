"""Simulated plates whose compounds differ in one aspect alone, as datasets that `experiments.presets` takes.

    python -m experiments.simulated_plates --out runs/simulated

writes a dataset an aspect, of fields and of single cells (sites so small that one cell or two have room), and prints
the words for `--data`. What is there already is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.runs import command
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.options import require, require_sound

Aspect = Literal["count", "size", "shape", "intensity", "texture"]
#: Pixels of a site; the typical cell has a radius of 15.
SIDES = {"fields": 128, "cells": 40}


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for plates and datasets."""
    aspects: tuple[Aspect, ...] = ("count", "shape", "intensity", "texture")
    """What the compounds of a dataset differ in."""
    units: tuple[Literal["fields", "cells"], ...] = ("fields", "cells")
    """What a site shows."""
    effect: float = 4.0
    """As in `perturbjax simulate`."""
    plates: int = 5
    """Plates a dataset, each of a layout of its own."""
    wells: int = 24
    """Wells a plate, of two sites each."""
    compounds: int = 6
    """Compounds beside DMSO."""

    def __post_init__(self) -> None:
        require_sound(self)
        for name in ("aspects", "units"):
            require(name, getattr(self, name), bool(getattr(self, name)), "at least one")
        more = set(self.aspects) != {"count"} or "fields" in self.units
        require(
            "aspects",
            self.aspects,
            more,
            "one besides count: of single cells the number tells nothing",
        )


def main(options: Config) -> None:
    """Draw the plates and build the datasets, those of single cells without that of their number."""
    made = [
        dataset(options, unit, aspect)
        for unit in options.units
        for aspect in options.aspects
        if (unit, aspect) != ("cells", "count")
    ]
    print("--data " + " ".join(f"simulated_{folder.name}={folder}" for folder in made))


def dataset(options: Config, unit: str, aspect: str) -> Path:
    """The dataset of one aspect."""
    plates, built = options.out / "plates" / f"{unit}_{aspect}", options.out / f"{unit}_{aspect}"
    numbers = {name: getattr(options, name) for name in ("plates", "wells", "compounds", "effect")}
    flags = [word for name, value in numbers.items() for word in (f"--{name}", value)]
    drawn = ("--aspects", aspect, "--sites", 2, "--size", SIDES[unit])
    command("perturbjax.cli", "simulate", "--out", plates, *flags, *drawn)
    source = ("--load-data", plates / "load_data.csv", "--images", plates)
    command(
        "data_prep",
        "build",
        *source,
        "--out",
        built,
        "--aggregate",
        "none",
        "--segment-channels",
        "DNA",
    )
    return built


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))

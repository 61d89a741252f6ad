"""Build datasets of simulated plates with compounds that differ in one aspect.

    python -m experiments.simulated_plates --out runs/simulated

Writes one dataset per aspect, of fields and of single cells (sites of 40 pixels with one or two
cells), or of large fields (`--units large_fields`: one site of 1080 pixels and about 1,000 cells
per well, 4 s of processor time each). Prints the value of `--data` for `python -m experiments.grid
--grid presets`.

Existing folders are skipped. Scores on these datasets: docs/presets.md.
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
#: Height and width of a site in pixels. A typical cell has a radius of 15 pixels.
SIZES = {"fields": 128, "cells": 40, "large_fields": 1080}
#: Sites of a well.
SITES = {"fields": 2, "cells": 2, "large_fields": 1}


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for plates and datasets."""
    aspects: tuple[Aspect, ...] = ("count", "shape", "intensity", "texture")
    """Aspects in which compounds differ; one dataset for each."""
    units: tuple[Literal["fields", "cells", "large_fields"], ...] = ("fields", "cells")
    """Content of a site: a field of many cells, single cells, or a field of 1080 pixels."""
    effect: float = 4.0
    """Effect size, as in `perturbjax simulate`."""
    plates: int = 5
    """Plates per dataset. Each plate has a different layout."""
    wells: int = 24
    """Wells per plate, with two sites each."""
    compounds: int = 6
    """Compounds in addition to DMSO."""

    def __post_init__(self) -> None:
        require_sound(self)
        for name in ("aspects", "units"):
            require(name, getattr(self, name), bool(getattr(self, name)), "at least one")
        possible = set(self.aspects) != {"count"} or set(self.units) != {"cells"}
        expected = "more than count: single cells do not differ in number"
        require("aspects", self.aspects, possible, expected)


def main(options: Config) -> None:
    """Simulate the plates and build the datasets. Single cells have no dataset of counts."""
    folders = [
        build_dataset(options, unit, aspect)
        for unit in options.units
        for aspect in options.aspects
        if (unit, aspect) != ("cells", "count")
    ]
    print("--data " + " ".join(f"simulated_{folder.name}={folder}" for folder in folders))


def build_dataset(options: Config, unit: str, aspect: str) -> Path:
    """Build the dataset of one aspect and return its folder. Finished commands are skipped."""
    plates, out = options.out / "plates" / f"{unit}_{aspect}", options.out / f"{unit}_{aspect}"
    numbers = {name: getattr(options, name) for name in ("plates", "wells", "compounds", "effect")}
    flags = [word for name, value in numbers.items() for word in (f"--{name}", value)]
    flags += ["--aspects", aspect, "--sites", SITES[unit], "--size", SIZES[unit]]
    command("perturbjax.cli", "simulate", "--out", plates, *flags)
    source = ("--load-data", plates / "load_data.csv", "--images", plates)
    segment = ("--aggregate", "none", "--segment-channels", "DNA")
    command("data_prep", "build", *source, "--out", out, *segment)
    return out


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))

"""Calibration and power of the tests of `perturbjax hits`, on simulated profiles.

    python -m experiments.screening_calibration --out runs/screening_calibration

Each design is a screen of treatments and negative controls on plates with plate effects and a
gradient over the columns. Wells of treatments without an effect are drawn like control wells. The
tables give for each method

- `p <= 0.05`: fraction of p-values at or below 0.05, for treatments without an effect.
- `p <= 0.5`: the same for 0.5.
- `false discoveries`: fraction of the called treatments that have no effect, at q <= 0.05, in
  screens where a fifth of the treatments have an effect (expected: at most 0.05).
- `power`: fraction of the treatments with an effect that are called.

The effect is a shift in a random direction, in standard deviations between wells of that direction.

Cost: minutes. Result: docs/howto/screening.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.bench.tables import markdown
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.files import make_folder
from perturbjax.core.options import require, require_output, require_seed, require_sound
from perturbjax.core.plates import PLATE, WELL, well_name
from perturbjax.screening.hit_tests import METHODS, Settings
from perturbjax.screening.hits import hit_table
from perturbjax.screening.wells import Wells

#: Features, and independent directions that explain them besides noise.
FEATURES, FACTORS = 60, 15
#: Standard deviation of the plate effect, and shift from the first to the last column.
PLATE_EFFECT, GRADIENT = 2.0, 3.0
#: Fraction of the treatments with an effect in the tables of power.
ACTIVE = 0.2


@dataclass(frozen=True)
class Design:
    """Layout of a screen.

    Attributes:
        plates: number of plates.
        per_plate: wells of each treatment on each plate.
        controls: negative control wells on each plate.
        one_layout: all plates have the same layout.
    """

    plates: int
    per_plate: int
    controls: int
    one_layout: bool = False

    @property
    def row(self) -> dict[str, object]:
        """Columns of the tables."""
        return {
            "wells": self.plates * self.per_plate,
            "plates": self.plates,
            "controls per plate": self.controls,
            "layout": "one" if self.one_layout else "random",
        }


DESIGNS = (
    Design(2, 1, 16),
    Design(4, 1, 4),
    Design(4, 1, 16),
    Design(4, 1, 64),
    Design(1, 4, 16),
    Design(4, 2, 32),
    Design(4, 8, 64),
    Design(4, 1, 24, one_layout=True),
)
#: Designs in the table of power.
POWER_DESIGNS = (Design(2, 1, 16), Design(4, 1, 16), Design(4, 2, 32))


@dataclass(frozen=True)
class Config:
    """Measure calibration and power of the tests of `perturbjax hits`."""

    out: Path
    """Folder for calibration.csv and power.csv."""
    screens: int = 20
    """Screens per design. Treatments of one screen share the controls, so that their p-values are
    correlated. The table of power has a quarter of the screens."""
    treatments: int = 30
    """Treatments per screen."""
    effects: tuple[float, ...] = (2.0, 3.0, 4.0, 6.0)
    """Effect sizes of the table of power, in standard deviations between wells."""
    permutations: int = 1999
    """Maximum number of permutations per test."""
    seed: int = 0
    """Seed of the profiles."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("screens", self.screens, self.screens >= 1, "1 or more")
        require("treatments", self.treatments, self.treatments >= 10, "10 or more")
        require("permutations", self.permutations, self.permutations >= 999, "999 or more")
        require_seed(self.seed)


def main(options: Config) -> None:
    """Measure both tables, write them, and print them as Markdown."""
    settings = Settings(permutations=options.permutations)
    calibration = pd.DataFrame(_calibrate(options, settings))
    power = pd.DataFrame(_measure_power(options, settings))
    out = make_folder(options.out)
    for name, table in (("calibration", calibration), ("power", power)):
        table.to_csv(out / f"{name}.csv", index=False)
        print(markdown(table.round(3).to_dict("records")))


def _calibrate(options: Config, settings: Settings) -> Iterator[dict[str, object]]:
    """One row per design: rates of small p-values without any effect."""
    for number, design in enumerate(DESIGNS):
        seeds = [options.seed + 1000 * number + screen for screen in range(options.screens)]
        none = np.zeros(options.treatments)
        screens = [hit_table(simulate(design, none, seed), settings) for seed in seeds]
        table = pd.concat(screens)
        yield design.row | {
            f"{method.replace('_', ' ')}, p <= {level:g}": _rate(table[f"{method}_p"], level)
            for method in METHODS
            for level in (0.05, 0.5)
        }


def _rate(p: pd.Series, level: float) -> float:
    return float((p.dropna() <= level).mean())


def _measure_power(options: Config, settings: Settings) -> Iterator[dict[str, object]]:
    """One row per design and effect: power and false discoveries of every method."""
    active = np.arange(options.treatments) < max(1, round(ACTIVE * options.treatments))
    cells = ((design, effect) for design in POWER_DESIGNS for effect in options.effects)
    for number, (design, effect) in enumerate(cells):
        rows = []
        for screen in range(max(1, options.screens // 4)):
            seed = options.seed + 100_000 + 1000 * number + screen
            table = hit_table(simulate(design, effect * active, seed), settings)
            has_effect = table["treatment"].isin([f"t{n}" for n in np.flatnonzero(active)])
            calls = {name: (table[f"{name}_q"] <= settings.fdr) for name in METHODS}
            calls["two of three"] = table["active"].astype(bool)
            row = {}
            for name, called in calls.items():
                words, false = name.replace("_", " "), (called & ~has_effect).sum()
                row[f"{words}, power"] = called[has_effect].mean()
                row[f"{words}, false discoveries"] = false / max(called.sum(), 1)
            rows.append(row)
        yield design.row | {"effect": effect} | pd.DataFrame(rows).mean().to_dict()


def simulate(design: Design, effects: np.ndarray, seed: int) -> Wells:
    """Simulate well profiles of a screen.

    Args:
        design: plates, replicates and controls.
        effects: effect size of each treatment.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    loadings = rng.standard_normal((FACTORS, FEATURES)) / np.sqrt(FACTORS)
    names = [f"t{number}" for number in range(len(effects)) for _ in range(design.per_plate)]
    names += ["DMSO"] * design.controls
    # A plate holds all treatments, so that they share the controls.
    spots = rng.permutation(len(names))
    shifts = np.stack([_shift(effect, rng, loadings) for effect in effects])
    gradient = rng.standard_normal(FEATURES) / np.sqrt(FEATURES)
    rows, values = [], []
    for plate in range(design.plates):
        if not design.one_layout:
            spots = rng.permutation(len(names))
        offset = PLATE_EFFECT * rng.standard_normal(FEATURES)
        noise = rng.standard_normal((len(names), FACTORS)) @ loadings
        profiles = noise + 0.5 * rng.standard_normal(noise.shape) + offset
        column = spots % 24
        profiles += GRADIENT * (column / 23 - 0.5)[:, None] * gradient * np.sqrt(FEATURES)
        for spot, name, profile in zip(spots, names, profiles, strict=True):
            rows.append((f"P{plate}", well_name(int(spot) // 24 % 16, int(spot) % 24), name))
            values.append(profile + (shifts[int(name[1:])] if name != "DMSO" else 0))
    metadata = pd.DataFrame(rows, columns=[PLATE, WELL, "Metadata_pert_iname"])
    label = metadata["Metadata_pert_iname"]
    return Wells(
        metadata=metadata,
        values=np.array(values),
        features=tuple(f"feature_{number}" for number in range(FEATURES)),
        treatment=label,
        control=(label == "DMSO").to_numpy(),
        positive=np.zeros(len(label), dtype=bool),
        cell_count=None,
    )


def _shift(effect: float, rng: np.random.Generator, loadings: np.ndarray) -> np.ndarray:
    """Shift of one treatment along a random combination of the factors."""
    direction = rng.standard_normal(FACTORS)
    profile = (direction / np.linalg.norm(direction)) @ loadings
    return effect * profile


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))

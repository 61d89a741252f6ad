"""Ground truth of a simulated plate: treatment of each well, and traits of each well and site.

A trait is a property of the cells in an image, such as the nucleus radius. Its value is
typical * exp(log(1 + standard deviation) * z), where z is the sum of treatment effect, plate
effect, well effect, position gradient and site effect, all in units of the between-well standard
deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.plates import SOLVENT, plate_shape, well_name

#: Metadata of the wells with solvent.
NEGATIVE_CONTROL = {
    "pert_iname": SOLVENT,
    "broad_sample": SOLVENT,
    "moa": "negative control",
    "control_type": "negcon",
}
#: Fraction of wells with solvent, as on JUMP-Target-1 (64 of 384).
SOLVENT_FRACTION = 1 / 6
#: Number of compounds with the same mechanism of action, which have part of their effect in common.
COMPOUNDS_PER_MOA = 2
#: Standard deviations of site and plate effects, in units of the between-well standard deviation.
SITE_SPREAD = 0.5
PLATE_SPREAD = 0.5


@dataclass(frozen=True)
class Trait:
    """Typical value of a trait, and its relative between-well standard deviation.

    In `ORGANIZATION`, `deviation` is the absolute change for each unit of a shift.
    """

    typical: float
    deviation: float


#: Lengths are in cell radii, intensities in gray values above background.
TRAITS = {
    "count": Trait(14.0, 0.10),
    "cell_radius": Trait(1.0, 0.05),
    "nucleus_radius": Trait(0.48, 0.05),
    "elongation": Trait(1.25, 0.06),
    "irregularity": Trait(0.10, 0.20),
    "dna": Trait(5200.0, 0.08),
    "actin": Trait(3400.0, 0.08),
    "tubulin": Trait(3000.0, 0.08),
    "granularity": Trait(0.35, 0.15),
    "fibres": Trait(0.40, 0.15),
}
#: Organization of the cells: typical value, and change for each unit of a shift. It varies between
#: treatments only, and only in the design "screen". None of the three changes brightness or count.
ORGANIZATION = {
    # Distance from the center of the cell to that of its nucleus, in cell radii.
    "polarity": Trait(0.0, 0.1),
    # Number of microtubule strands of a cell.
    "strands": Trait(9.0, -1.0),
    # Size of texture grains, relative to the typical size.
    "grain": Trait(1.0, 0.3),
}
#: Groups of related traits. A compound shifts all traits of several aspects.
ASPECTS = {
    "count": ("count",),
    "size": ("cell_radius", "nucleus_radius"),
    "shape": ("elongation", "irregularity"),
    "intensity": ("dna", "actin", "tubulin"),
    "texture": ("granularity", "fibres"),
}


def well_names(wells: int) -> list[str]:
    """Return the names of the first `wells` wells, row by row from A01."""
    _, columns = plate_shape(wells)
    return [well_name(*divmod(well, columns)) for well in range(wells)]


def perturbations(
    compounds: int, effect: float, rng: np.random.Generator, aspects: Sequence[str] = ()
) -> pd.DataFrame:
    """Draw the treatments of a simulation.

    By default, a compound shifts the traits of two aspects like the other compounds of its
    mechanism, and those of one further aspect of its own, each by plus or minus `effect`.

    Args:
        compounds: Number of compounds.
        effect: Shift of each trait, in units of the between-well standard deviation.
        rng: Random generator.
        aspects: If not empty, every compound shifts all traits of these aspects, each by a
        different
            amount from -2 to 2 effects.

    Returns:
        One row per treatment, solvent first: names, mechanism, and the shift of each trait.
    """
    rows: list[dict[str, Any]] = [dict(NEGATIVE_CONTROL)]
    shifts = (
        _graded_shifts(compounds, effect, aspects, rng)
        if aspects
        else _random_shifts(compounds, effect, rng)
    )
    for compound, compound_shifts in enumerate(shifts):
        rows.append(
            {
                "pert_iname": f"compound-{compound + 1:02d}",
                "broad_sample": f"SIM-{compound + 1:05d}",
                "moa": f"mechanism {compound // COMPOUNDS_PER_MOA + 1}",
                "control_type": "trt",
                **compound_shifts,
            }
        )
    return treatment_table(rows)


def treatment_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return one row per treatment: names, mechanism, and the shift of each trait (0 if absent)."""
    columns = ["pert_iname", "broad_sample", "moa", "control_type", *TRAITS, *ORGANIZATION]
    return pd.DataFrame(rows).reindex(columns=columns).fillna(0.0)


def _random_shifts(
    compounds: int, effect: float, rng: np.random.Generator
) -> list[dict[str, float]]:
    """Shifts of two aspects per mechanism plus one aspect per compound, with random signs."""

    def draw(n_aspects: int, used: dict[str, float]) -> dict[str, float]:
        # Aspects without a trait that is already used.
        free = [aspect for aspect, traits in ASPECTS.items() if not set(traits) & set(used)]
        return {
            trait: effect * float(rng.choice((-1, 1)))
            for aspect in rng.choice(free, n_aspects, replace=False)
            for trait in ASPECTS[aspect]
        }

    shifts, mechanism = [], dict[str, float]()
    for compound in range(compounds):
        # Each block of `COMPOUNDS_PER_MOA` compounds shares one mechanism.
        if compound % COMPOUNDS_PER_MOA == 0:
            mechanism = draw(2, {})
        # The part of the mechanism is shared; one further aspect distinguishes the compounds.
        shifts.append(mechanism | draw(1, mechanism))
    return shifts


def _graded_shifts(
    compounds: int, effect: float, aspects: Sequence[str], rng: np.random.Generator
) -> list[dict[str, float]]:
    """Evenly spaced shifts from -2 to 2 effects, in random order of the mechanisms for each trait.

    Compounds of one mechanism have neighboring values.
    """
    mechanisms = -(-compounds // COMPOUNDS_PER_MOA)
    # (mechanisms, compounds per mechanism): a row contains neighboring values.
    levels = np.linspace(-2 * effect, 2 * effect, mechanisms * COMPOUNDS_PER_MOA).reshape(
        mechanisms, -1
    )
    traits = [trait for aspect in aspects for trait in ASPECTS[aspect]]
    by_trait = {trait: levels[rng.permutation(mechanisms)].ravel() for trait in traits}
    return [
        {trait: float(values[compound]) for trait, values in by_trait.items()}
        for compound in range(compounds)
    ]


def assign_wells(
    wells: int, compounds: int, rng: np.random.Generator, empty: int = 0
) -> np.ndarray:
    """Assign treatments to wells at random.

    Args:
        wells: Number of wells.
        compounds: Number of compounds.
        rng: Random generator.
        empty: Number of wells without cells; they get the row number after the last compound.

    Returns:
        Row number in the table of treatments for each well: solvent in `SOLVENT_FRACTION` of the
        wells, compounds in (almost) equal numbers.
    """
    solvent = max(round(wells * SOLVENT_FRACTION), 1)
    # Row 0 is the solvent, so compounds count from 1.
    treated = np.arange(wells - solvent - empty) % compounds + 1
    rows = [np.zeros(solvent, int), treated, np.full(empty, compounds + 1)]
    return rng.permutation(np.concatenate(rows))


def trait_values(z: Float[np.ndarray, "... traits"]) -> Float[np.ndarray, "... traits"]:
    """Convert standardized values (between-well standard deviations, log scale) to trait values."""
    typical = np.array([trait.typical for trait in TRAITS.values()])
    # The log scale makes a standard deviation relative and values positive.
    scale = np.array([math.log1p(trait.deviation) for trait in TRAITS.values()])
    return typical * np.exp(scale * z)


def organization_values(
    shifts: Float[np.ndarray, "... traits"],
) -> Float[np.ndarray, "... traits"]:
    """Convert shifts of the traits of `ORGANIZATION` to their values."""
    table = ORGANIZATION.values()
    return np.array([t.typical for t in table]) + shifts * np.array([t.deviation for t in table])


def position_gradient(
    wells: int, strength: float, direction: Float[np.ndarray, "2 traits"]
) -> Float[np.ndarray, "wells traits"]:
    """Return the position effect of each well: linear, with mean 0.

    Args:
        wells: Number of wells.
        strength: Difference between opposite plate edges, in between-well standard deviations.
        direction: Sign of the gradient along rows and along columns for each trait.
    """
    rows, columns = plate_shape(wells)
    row, column = np.divmod(np.arange(wells), columns)
    # Row and column from -0.5 to 0.5, (wells, 2).
    place = np.stack([row / max(rows - 1, 1) - 0.5, column / max(columns - 1, 1) - 0.5], axis=-1)
    return strength * place @ direction

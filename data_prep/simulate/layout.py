"""What stands in which well, and how each perturbation, well and site differs: all the truth of a simulated plate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from data_prep.csv_tables import SOLVENT
from perturbjax.core.plates import plate_shape, well_name

#: Share of the wells that hold the solvent, as on JUMP-Target-1 (64 of 384).
SOLVENT_SHARE = 1 / 6
#: Compounds that share a mechanism, and so some of their effect.
COMPOUNDS_PER_MOA = 2
#: Spread of sites about their well, and of plates about each other, in units of the between-well deviation.
SITE_SPREAD = 0.5
PLATE_SPREAD = 0.5


@dataclass(frozen=True)
class Trait:
    """One thing that varies between cells' images: its typical value, and its between-well deviation as a ratio."""

    typical: float
    deviation: float


#: Lengths are in units of the cell's radius, intensities in grey values above the background.
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
#: Traits that move together belong to one aspect; a perturbation shifts several aspects.
ASPECTS = {
    "count": ("count",),
    "size": ("cell_radius", "nucleus_radius"),
    "shape": ("elongation", "irregularity"),
    "intensity": ("dna", "actin", "tubulin"),
    "texture": ("granularity", "fibres"),
}


def well_names(wells: int) -> list[str]:
    """The wells used: spread over the plate's columns, row after row from A01."""
    _, columns = plate_shape(wells)
    return [well_name(*divmod(well, columns)) for well in range(wells)]


def perturbations(
    compounds: int, effect: float, rng: np.random.Generator, aspects: Sequence[str] = ()
) -> pd.DataFrame:
    """One row per perturbation, the solvent first: names, mechanism, and the shift of each trait.

    Shifts are in units of the between-well deviation. A compound moves two aspects with its mechanism and one of
    its own; within an aspect every trait moves by `effect`, up or down. The solvent moves nothing. Where `aspects` are
    named, every compound moves all their traits, and no others, each by an amount of its own (`_apart`).
    """
    rows: list[dict[str, Any]] = [
        {
            "pert_iname": SOLVENT,
            "broad_sample": SOLVENT,
            "moa": "negative control",
            "control_type": "negcon",
        }
    ]
    drawn = (
        _apart(compounds, effect, aspects, rng)
        if aspects
        else _three_aspects(compounds, effect, rng)
    )
    for compound, shifts in enumerate(drawn):
        rows.append(
            {
                "pert_iname": f"compound-{compound + 1:02d}",
                "broad_sample": f"SIM-{compound + 1:05d}",
                "moa": f"mechanism {compound // COMPOUNDS_PER_MOA + 1}",
                "control_type": "trt",
                **shifts,
            }
        )
    table = pd.DataFrame(rows)
    return table.reindex(
        columns=["pert_iname", "broad_sample", "moa", "control_type", *TRAITS]
    ).fillna(0.0)


def _three_aspects(
    compounds: int, effect: float, rng: np.random.Generator
) -> list[dict[str, float]]:
    """Shifts of each compound's traits: of two aspects with its mechanism, and of one that is its own."""
    shifts, mechanism = [], dict[str, float]()
    for compound in range(compounds):
        if compound % COMPOUNDS_PER_MOA == 0:
            mechanism = _shifts(rng, 2, effect, exclude=())
        taken = [aspect for aspect, traits in ASPECTS.items() if set(traits) & set(mechanism)]
        shifts.append(mechanism | _shifts(rng, 1, effect, exclude=taken))
    return shifts


def _shifts(
    rng: np.random.Generator, aspects: int, effect: float, exclude: Sequence[str]
) -> dict[str, float]:
    free = [aspect for aspect in ASPECTS if aspect not in exclude]
    chosen = rng.choice(free, aspects, replace=False)
    return {
        trait: effect * float(rng.choice((-1, 1))) for aspect in chosen for trait in ASPECTS[aspect]
    }


def _apart(
    compounds: int, effect: float, aspects: Sequence[str], rng: np.random.Generator
) -> list[dict[str, float]]:
    """Shifts evenly spaced from -2 to 2 effects, in an order of each trait's own: neighbours share a mechanism."""
    mechanisms = -(-compounds // COMPOUNDS_PER_MOA)
    levels = np.linspace(-2 * effect, 2 * effect, mechanisms * COMPOUNDS_PER_MOA).reshape(
        mechanisms, -1
    )
    traits = [trait for aspect in aspects for trait in ASPECTS[aspect]]
    of_traits = {trait: levels[rng.permutation(mechanisms)].ravel() for trait in traits}
    return [
        {trait: float(shifts[compound]) for trait, shifts in of_traits.items()}
        for compound in range(compounds)
    ]


def assign_wells(wells: int, compounds: int, rng: np.random.Generator) -> np.ndarray:
    """Row of `perturbations` for each well, in random places: solvent in its share, compounds as evenly as can be."""
    solvent = max(round(wells * SOLVENT_SHARE), 1)
    treated = np.arange(wells - solvent) % compounds + 1
    return rng.permutation(np.concatenate([np.zeros(solvent, int), treated]))


def trait_values(deviations: Float[np.ndarray, "... traits"]) -> Float[np.ndarray, "... traits"]:
    """Values of all traits from their deviations: one unit is one between-well deviation, on a log scale."""
    typical = np.array([trait.typical for trait in TRAITS.values()])
    ratio = np.array([math.log1p(trait.deviation) for trait in TRAITS.values()])
    return typical * np.exp(ratio * deviations)


def position_gradient(
    wells: int, strength: float, direction: Float[np.ndarray, "2 traits"]
) -> Float[np.ndarray, "wells traits"]:
    """Deviation of each well by its place: `strength` from one edge of the plate to the other, centred on 0."""
    rows, columns = plate_shape(wells)
    row, column = np.divmod(np.arange(wells), columns)
    place = np.stack([row / max(rows - 1, 1) - 0.5, column / max(columns - 1, 1) - 0.5], axis=-1)
    return strength * place @ direction

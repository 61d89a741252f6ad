"""Well profiles with known effects, for tests of the screening statistics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from perturbjax.core.plates import PLATE, WELL, well_name
from perturbjax.screening.wells import Wells

FEATURES = 12


def simulate_wells(
    *,
    treatments: Mapping[str, float],
    plates: int = 3,
    replicates: int = 2,
    controls: int = 16,
    gradient: float = 0.0,
    plate_effect: float = 1.0,
    count_effect: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Wells:
    """Draw wells of randomized plates.

    Args:
        treatments: shift of each treatment along one feature, in standard deviations.
        plates: number of plates, each with its own layout.
        replicates: wells per treatment and plate.
        controls: negative controls per plate.
        gradient: shift from the first to the last column, in standard deviations.
        plate_effect: standard deviation of the shift of each plate.
        count_effect: factor on the cell count of a treatment.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    rows, values, counts = [], [], []
    names = [*(name for name in treatments for _ in range(replicates)), *["DMSO"] * controls]
    for plate in range(plates):
        shift = plate_effect * rng.standard_normal(FEATURES)
        for spot, name in zip(rng.permutation(96), names, strict=False):
            profile = rng.standard_normal(FEATURES) * np.linspace(2, 0.5, FEATURES) + shift
            profile[0] += gradient * (spot % 12) / 11
            profile[1] += 2 * treatments.get(name, 0.0)
            values.append(profile)
            counts.append(100 * (count_effect or {}).get(name, 1.0) + rng.normal(0, 5))
            rows.append((f"P{plate}", well_name(spot // 12, spot % 12), name))
    metadata = pd.DataFrame(rows, columns=[PLATE, WELL, "Metadata_pert_iname"])
    label = metadata["Metadata_pert_iname"]
    return Wells(
        metadata=metadata,
        values=np.array(values),
        features=tuple(f"feature_{number}" for number in range(FEATURES)),
        treatment=label,
        control=(label == "DMSO").to_numpy(),
        positive=np.zeros(len(label), dtype=bool),
        cell_count=np.array(counts),
    )

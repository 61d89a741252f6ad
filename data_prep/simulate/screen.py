"""Design "screen": treatments with named effects, one toxic and one inactive, and empty wells.

The effects change shape, texture and organization of the cells. Brightness and cell count stay
the same, except for the toxic treatment, so that only the appearance of the cells distinguishes
the others.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from data_prep.simulate.layout import NEGATIVE_CONTROL, treatment_table
from perturbjax.core.plates import EMPTY

#: Treatment -> mechanism and shift of each trait at an effect of 1.
SCREEN: dict[str, tuple[str, dict[str, float]]] = {
    # Longer cells with the same area.
    "elongate": ("cell shape", {"elongation": 3.5}),
    # Lobed outlines.
    "ruffle": ("cell shape", {"irregularity": 2.0}),
    # The nucleus is not in the center of its cell.
    "polarize": ("organization", {"polarity": 1.3}),
    # Fewer and wider bundles of microtubules.
    "bundle": ("organization", {"strands": 1.7, "fibres": 1.0}),
    # Coarse texture with the same contrast.
    "coarsen": ("texture", {"grain": 1.3}),
    # Fewer and smaller cells.
    "toxic": ("toxicity", {"count": -4.0, "cell_radius": -1.0}),
    "inactive": ("none", {}),
}
#: Fraction of wells without cells.
EMPTY_FRACTION = 1 / 24


def screen_treatments(effect: float) -> pd.DataFrame:
    """Return the treatments of the design, solvent first and empty wells last.

    Args:
        effect: Factor on all shifts of `SCREEN`.

    Returns:
        The table of `layout.treatment_table`.
    """
    rows: list[dict[str, Any]] = [dict(NEGATIVE_CONTROL)]
    for number, (name, (mechanism, shifts)) in enumerate(SCREEN.items(), start=1):
        rows.append(
            {
                "pert_iname": name,
                "broad_sample": f"SIM-{number:05d}",
                "moa": mechanism,
                "control_type": "trt",
                **{trait: effect * shift for trait, shift in shifts.items()},
            }
        )
    rows.append({"pert_iname": EMPTY, "broad_sample": EMPTY, "moa": EMPTY, "control_type": EMPTY})
    return treatment_table(rows)

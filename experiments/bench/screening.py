"""Time and memory of `perturbjax hits` on a screen of 9,216 wells with 1,000 features.

    python -m experiments.bench --only screening --out runs/bench

24 plates of 384 wells with 64 negative controls each, 4 wells per treatment on 4 plates with
different layouts, a fifth of the treatments with an effect, and a cell count. The command runs in a
separate process with default settings, on all cores of the machine and on two. The limits are 120 s
and 2 GB on two cores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from experiments.bench.commands import run_measured
from experiments.bench.plates import work_folder
from experiments.bench.tables import Row
from perturbjax.core.plates import PLATE, WELL, well_name

#: quick -> (plates, wells per plate, controls per plate, features).
SIZES = {False: (24, 384, 64, 1000), True: (4, 24, 8, 20)}
#: Plates that share their treatments.
GROUP = 4


def run(quick: bool, folder: Path | None = None) -> list[Row]:
    """Write the table, run the command, and return one row."""
    folder = folder or work_folder(quick)
    folder.mkdir(parents=True, exist_ok=True)
    plates, wells, controls, features = SIZES[quick]
    table = folder / "screen.parquet"
    simulate_table(plates, wells, controls, features).to_parquet(table, index=False)
    result = run_measured(
        ["hits", "--features", table, "--out", folder / "hits"], folder / "hits.log"
    )
    table.unlink()
    return [
        {
            "wells": plates * wells,
            "features": features,
            "treatments": (wells - controls) * plates // GROUP,
            **{name: result[name] for name in ("s", "processor s", "all MB", "private MB")},
        }
    ]


def simulate_table(plates: int, wells: int, controls: int, features: int) -> pd.DataFrame:
    """Simulate the profiles of a screen.

    Args:
        plates: number of plates, a multiple of `GROUP`.
        wells: wells per plate.
        controls: negative controls per plate.
        features: number of features.
    """
    rng = np.random.default_rng(0)
    loadings = rng.standard_normal((50, features)).astype(np.float32)
    columns = 24 if wells == 384 else 6
    parts = []
    for plate in range(plates):
        group = plate // GROUP
        names = np.array(["DMSO"] * controls + [f"g{group}_t{n}" for n in range(wells - controls)])
        # The generator of a group gives its treatments the same shifts on every plate.
        shift = np.random.default_rng(group).standard_normal((wells, 50)).astype(np.float32)
        shift *= ((np.arange(wells) % 5 == 0) & (names != "DMSO"))[:, None]
        factors = rng.standard_normal((wells, 50), dtype=np.float32) + shift
        values = factors @ loadings / 7
        values += 0.7 * rng.standard_normal((wells, features), dtype=np.float32)
        spots = rng.permutation(wells)
        metadata = pd.DataFrame(
            {
                PLATE: f"P{plate:02d}",
                WELL: [well_name(spot // columns, spot % columns) for spot in spots],
                "Metadata_pert_iname": names,
                "n_cells": rng.poisson(200, wells),
            }
        )
        names_of_features = [f"feature_{number}" for number in range(features)]
        parts.append(pd.concat([metadata, pd.DataFrame(values, columns=names_of_features)], axis=1))
    return pd.concat(parts, ignore_index=True)

"""Simulated screens of the calibration table and of the benchmark."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.bench.screening import simulate_table
from experiments.screening_calibration import Design, simulate
from perturbjax.core.plates import PLATE, WELL


def test_simulate_draws_the_design_and_the_effect():
    design = Design(plates=4, per_plate=2, controls=10)
    wells = simulate(design, np.array([0.0, 8.0, 0.0]), seed=0)
    assert wells.treatment.value_counts().to_dict() == {"DMSO": 40, "t0": 8, "t1": 8, "t2": 8}
    plate_means = pd.DataFrame(wells.values).groupby(wells.plates).transform("mean").to_numpy()
    length = np.linalg.norm(wells.values - plate_means, axis=1)
    assert length[wells.treatment == "t1"].min() > np.median(length[wells.control])


def test_simulate_table_has_treatments_on_four_plates():
    table = simulate_table(plates=8, wells=24, controls=8, features=5)
    assert not table.duplicated([PLATE, WELL]).any()
    plates = table.groupby("Metadata_pert_iname")[PLATE].nunique()
    assert plates["DMSO"] == 8 and (plates.drop("DMSO") == 4).all() and len(plates) == 33

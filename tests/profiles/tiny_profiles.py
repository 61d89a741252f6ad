"""Small tables of profiles: plates of wells whose classes differ in a few features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.profile_table import Profiles

COMPOUNDS = ["DMSO", "taxol", "nocodazole", "etoposide", "latrunculin", "ALLN"]


def make_table(
    plates: int = 4,
    wells: int = 24,
    features: int = 12,
    *,
    signal: float = 3.0,
    seed: int = 0,
    classes: int = 6,
) -> pd.DataFrame:
    """Return compounds in random wells of plates that differ in shift and scale."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, features)) * signal
    centers[0] = 0
    tables = []
    for plate in range(plates):
        kinds = rng.permutation(np.resize(np.arange(classes), wells))
        values = (centers[kinds] + rng.normal(size=(wells, features))) * (1 + plate) + 10 * plate
        table = pd.DataFrame(values, columns=[f"Cells_f{i}" for i in range(features)])
        table.insert(0, "Metadata_Plate", f"P{plate}")
        table.insert(
            1, "Metadata_Well", [f"{chr(65 + w // 6)}{w % 6 + 1:02d}" for w in range(wells)]
        )
        table.insert(2, "Metadata_pert_iname", np.asarray(COMPOUNDS)[kinds])
        table.insert(3, "Metadata_control_type", np.where(kinds == 0, "negcon", ""))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def write(table: pd.DataFrame, path: Path) -> Path:
    """Write a table as parquet or CSV, depending on the name."""
    table.to_parquet(path, index=False) if path.suffix == ".parquet" else table.to_csv(
        path, index=False
    )
    return path


def as_profiles(table: pd.DataFrame, folder: Path) -> Profiles:
    """Write a table to a file and read it."""
    return read_profiles([write(table, folder / "screen.parquet")])

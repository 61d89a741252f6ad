"""A plate with half of its wells empty: cell counts, features, and the pages of data and run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from commands import SMALL
from report.screens import Page

from perturbjax.dataset import open_dataset

KEYS = ["Metadata_Plate", "Metadata_Well"]


def empty_every_second_well(plates: Path) -> set[tuple[str, str]]:
    """Replace the images of every second well by camera noise; return (plate, well) of these."""
    rng = np.random.default_rng(0)
    table = pd.read_csv(plates / "load_data.csv", dtype=str)
    wells = table[KEYS]
    empty = set(wells.drop_duplicates().iloc[::2].itertuples(index=False, name=None))
    channels = [c.removeprefix("FileName_") for c in table if c.startswith("FileName_")]
    rows = table[pd.MultiIndex.from_frame(wells).isin(empty)].to_dict("records")
    for path in (
        plates / row[f"PathName_{c}"] / row[f"FileName_{c}"] for row in rows for c in channels
    ):
        noise = rng.poisson(300, tifffile.imread(path).shape) + rng.normal(0, 10)
        tifffile.imwrite(path, noise.astype(np.uint16), metadata=None)
    return empty


# Six processes, each of which imports its libraries: about a minute of processor time.
@pytest.mark.slow
def test_half_of_the_wells_are_empty(command, plates, tmp_path):
    plates = Path(shutil.copytree(plates, tmp_path / "plates"))
    empty = empty_every_second_well(plates)
    dataset, run = tmp_path / "dataset", tmp_path / "run"
    tables = ("--load-data", plates / "load_data.csv", "--images", plates)
    flags = ("--aggregate", "none", "--segment-channels", "DNA", "--workers", 1)
    done = command("data_prep build", *tables, "--out", dataset, *flags)
    assert "no objects in 24 of 48 newly segmented sites" in done.stderr

    index = open_dataset(dataset).index
    counts = index.groupby(KEYS)["n_cells"].agg(["min", "max"])
    assert len(empty) == 12 and set(counts.index[counts["max"] == 0]) == empty
    assert (counts["min"] > 0).sum() == 12

    features = ("--data", dataset, "--backbone", "cellprofiler")
    command("features", *features, "--level", "cell", "--out", tmp_path / "cells.parquet")
    cells = pd.read_parquet(tmp_path / "cells.parquet")
    with_cells = set(zip(cells["Metadata_Plate"], cells["Metadata_Well"], strict=True))
    assert with_cells == set(counts.index) - empty
    command("features", *features, "--level", "well", "--out", tmp_path / "wells.parquet")
    wells = pd.read_parquet(tmp_path / "wells.parquet").set_index(KEYS)
    missing = wells.filter(like="Cells_").isna()
    assert set(wells.index[missing.all(axis=1)]) == empty

    assert "24 sites without cells" in (dataset / "preview.html").read_text()
    command("train", "--data", dataset, "--out", run, *SMALL)
    command("evaluate", "--run", run, "--replicates", 100)
    command("report", run)
    drawn = Page((run / "report.html").read_text()).data("plates")
    cells = dict(zip(zip(drawn["plate"], drawn["well"], strict=True), drawn["cells"], strict=True))
    assert {well for well, count in cells.items() if count == 0} == empty & set(cells)
    mean = index.groupby(KEYS)["n_cells"].mean()
    assert all(count == pytest.approx(mean[well]) for well, count in cells.items())

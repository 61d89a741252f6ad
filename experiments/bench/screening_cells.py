"""Time and memory of the screening commands on a table of 1,000,000 cells with 50 features.

    python -m experiments.bench --only screening_cells --out runs/bench

The wells are those of the benchmark `screening`: 4 plates of 384 wells, 320 treatments. Each has
about 651 cells. The commands aggregate the cells to wells. Each runs in a separate process with
default settings. The limit is 2 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.bench.commands import run_measured
from experiments.bench.plates import work_folder
from experiments.bench.screening import simulate_table
from experiments.bench.tables import Row
from perturbjax.core.plates import PLATE

#: quick -> (plates, wells per plate, controls per plate, features, cells).
SIZES = {False: (4, 384, 64, 50, 1_000_000), True: (4, 24, 8, 5, 60_000)}
COMMANDS = ("hits", "similar", "differences")


def run(quick: bool, folder: Path | None = None) -> Iterator[list[Row]]:
    """Write the table, run the commands, and yield one row for each."""
    folder = folder or work_folder(quick)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "cells.parquet"
    *design, cells = SIZES[quick]
    write_cells(table, simulate_table(*design), cells)
    rows: list[Row] = []
    for command in COMMANDS:
        words = [command, "--features", table, "--out", folder / command]
        result = run_measured(words, folder / f"{command}.log")
        measured = {name: result[name] for name in ("s", "processor s", "all MB", "private MB")}
        rows.append({"command": command, "cells": cells, "features": design[-1], **measured})
        yield rows
    table.unlink()


def write_cells(path: Path, wells: pd.DataFrame, cells: int) -> None:
    """Write a table of cells: the profile of the well plus independent noise.

    One plate is in memory at a time, and becomes one row group.

    Args:
        path: parquet file to write.
        wells: profiles of wells; numbers in `feature_*`.
        cells: number of rows.
    """
    rng = np.random.default_rng(0)
    features = [name for name in wells.columns if name.startswith("feature_")]
    # The first wells have one cell more if the number is not a multiple.
    number = cells // len(wells) + (np.arange(len(wells)) < cells % len(wells))
    writer = None
    for _, plate in wells.drop(columns="n_cells").groupby(PLATE):
        rows = plate.loc[plate.index.repeat(number[plate.index])].reset_index(drop=True)
        noise = rng.standard_normal((len(rows), len(features)), dtype=np.float32)
        rows[features] = rows[features].to_numpy(np.float32) + noise
        group = pa.Table.from_pandas(rows, preserve_index=False)
        writer = writer or pq.ParquetWriter(path, group.schema)
        writer.write_table(group, row_group_size=len(rows))
    if writer is not None:
        writer.close()

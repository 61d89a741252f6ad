"""Rate and memory of `perturbjax features --level cell` on large fields.

    python -m experiments.bench --only cells --out runs/bench [--quick]

Sites of 1080 x 1080 pixels with five channels and 150 cells of 30 pixels diameter, which give crops
of 80 pixels. EfficientNet-Lite0, pooled stages, random weights. The command runs in a separate
process: once without and once with compiled programs in the cache, which is the row that counts.
`plate min` is the time of 384 sites at this rate. `processor s` is CPU time on all cores. `private
MB` is the peak of memory without mapped files. The target is 60 minutes and 3 GB for a plate.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.ndimage as ndi

from experiments.bench.commands import run_measured, stage_seconds
from experiments.bench.tables import Row
from perturbjax.dataset import SitePixels, write_dataset

CHANNELS = ("DNA", "ER", "RNA", "AGP", "Mito")
#: (sites, height and width in pixels, cells of a site) of the full and the quick benchmark.
SIZES = (16, 1080, 150), (2, 270, 9)
DIAMETER, PLATE_SITES = 30, 384


def run(quick: bool) -> Iterator[list[Row]]:
    """Extract the features of every cell; yield the rows so far."""
    sites, size, cells = SIZES[quick]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data = write_fields(work / "dataset", sites, size, cells)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "compiled")
        for programs in ("compiled in this run", "from the cache"):
            words = ["features", "--data", data, "--out", work / f"{len(rows)}.parquet"]
            words += ["--backbone", "efficientnet_lite0", "--weights", "untrained"]
            words += ["--pool", "stages", "--level", "cell"]
            result = run_measured(words, work / "log")
            seconds = max(stage_seconds(result["log"], "Extracting features"), 0.1)
            rows.append(
                {
                    "programs": programs,
                    "sites": sites,
                    "cells": len(pd.read_parquet(words[4], columns=["Metadata_cell_id"])),
                    "cells/s": sites * cells / seconds,
                    "plate min": round(PLATE_SITES * seconds / sites / 60, 1),
                    "s": result["s"],
                    "processor s": result["processor s"],
                    "peak MB": result["main MB"],
                    "private MB": result["private MB"],
                }
            )
            yield rows


def write_fields(path: Path, sites: int, size: int, cells: int) -> Path:
    """Write fields of blurred noise with disks on a grid; no cell touches the border."""
    random = np.random.default_rng(0)
    grid = int(np.ceil(np.sqrt(cells)))
    centers = (np.arange(grid) + 0.5) * size / grid
    # Relative position of each pixel to the center of its square of the grid.
    nearest = np.abs(np.arange(size)[:, None] - centers).argmin(axis=1)
    offset = np.arange(size) - centers[nearest]
    inside = np.hypot(offset[:, None], offset) <= DIAMETER / 2
    labels = nearest[:, None] * grid + nearest + 1
    mask = np.where(inside & (labels <= cells), labels, 0).astype(np.uint16)

    def draw() -> SitePixels:
        noise = random.normal(size=(size, size, len(CHANNELS)))
        smooth = ndi.gaussian_filter(noise, (2, 2, 0))
        light = 2000 + 8000 * (mask > 0)[..., None] + 4000 * smooth
        return SitePixels(np.clip(light, 0, 65535).astype(np.uint16), mask)

    table = pd.DataFrame({"Metadata_Well": [f"A{number + 1:02d}" for number in range(sites)]})
    table = table.assign(Metadata_Plate="P1", Metadata_Site="1")
    table.insert(0, "site_id", "P1_" + table["Metadata_Well"] + "_1")
    return write_dataset(
        path,
        table,
        (draw() for _ in range(sites)),
        channel_names=CHANNELS,
        image_dtype=np.uint16,
        label_column="",
    )

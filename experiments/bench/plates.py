"""Time and memory of `perturbjax build`: whole plates, sources, numbers of workers and of plates.

    python -m experiments.bench --only plates --out runs/bench

Builds a whole plate (384 wells, 2 sites, 1080 x 1080 pixels, 3 channels, uncompressed TIFF) and
parts of a plate (24 wells): from TIFF, OME-Zarr (Zstd) and S3 (a moto server on the loopback
interface, on the same cores), with 1, 2 and 4 workers, and 1, 2 and 4 parts in one dataset. Every
build is a separate process with the shipped network and without mask cache.

`checking s`, `segmenting s` and `writing s` are the stages, `build s` is the command, `processor s`
its CPU time on all cores. `main MB`, `worker MB` and `all MB` are memory peaks of the first
process, of the largest worker, and of all processes. Datasets of the same part must have the same
checksum, whatever the source and the number of workers.

An interrupted benchmark continues with the next row. Plates and datasets stay in `runs/plates`
(12 GB) for the benchmarks `epochs` and `limits`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from experiments.bench import mosaic
from experiments.bench.commands import run_measured, stage_seconds
from experiments.bench.sources import BUCKET, serve_s3
from experiments.bench.tables import Row
from perturbjax.core.files import make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.dataset import open_dataset

#: Column -> label of the stage in the log.
STAGES = {"checking s": "Checking files", "segmenting s": "Segmenting", "writing s": "Writing"}
#: (wells of a plate, wells of a part, field size in pixels) of the full and the quick benchmark.
SIZES = (384, 24, 1080), (4, 2, 64)
SITES = 2


class Case(NamedTuple):
    """One build."""

    data: str
    """plate: a whole plate; part: some wells."""
    format: str
    plates: int
    workers: int


CASES = (
    Case("part", "TIFF", 1, 2),
    Case("part", "OME-Zarr", 1, 2),
    Case("part", "TIFF in S3", 1, 2),
    Case("part", "TIFF", 1, 1),
    Case("part", "TIFF", 1, 4),
    Case("part", "TIFF", 2, 2),
    Case("plate", "TIFF", 1, 2),
    Case("part", "TIFF", 4, 2),
)


def run(quick: bool, folder: Path | None = None) -> Iterator[list[Row]]:
    """Build all cases; yield the rows so far."""
    folder = make_folder(folder or work_folder(quick))
    file = folder / "rows.json"
    rows: list[Row] = read_json(file) if file.is_file() else []
    yield rows
    for case in CASES:
        if any(all(row.get(k) == v for k, v in case._asdict().items()) for row in rows):
            continue
        rows = [*rows, build_case(folder, case, SIZES[quick])]
        console.print(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
        write_json(file, rows)
        yield rows


def work_folder(quick: bool) -> Path:
    """Return the folder of plates and datasets, which several benchmarks use."""
    return Path("runs") / ("plates_quick" if quick else "plates")


def make_plates(folder: Path, data: str, sizes: tuple[int, int, int]) -> Path:
    """Write one whole plate or four parts as TIFF, unless they exist."""
    plate_wells, part_wells, size = sizes
    number, wells = (1, plate_wells) if data == "plate" else (4, part_wells)
    return mosaic.write_plates(
        folder / f"{data}s", plates=number, wells=wells, sites=SITES, size=size
    )


def dataset_path(folder: Path, data: str) -> Path:
    """Return the dataset of one plate or part."""
    return folder / f"{data}_dataset"


def build_case(folder: Path, case: Case, sizes: tuple[int, int, int]) -> Row:
    """Build one case and return its row.

    The first dataset of a plate or part stays on disk; later ones must be equal.
    """
    source, out = make_plates(folder, case.data, sizes), folder / "out"
    for leftover in (out, folder / ".out.building"):
        shutil.rmtree(leftover, ignore_errors=True)
    table = pd.read_csv(source / "load_data.csv", dtype=str)
    names = sorted(table["Metadata_Plate"].unique())[: case.plates]
    table = table[table["Metadata_Plate"].isin(names)]
    with contextlib.ExitStack() as stack:
        images, files = _images(stack, folder, case, source, names)
        if case.format == "OME-Zarr":
            table = table[[column for column in table if column.startswith("Metadata_")]]
        table.to_csv(folder / "load_data.csv", index=False)
        os.environ["PERTURBJAX_MASK_CACHE"] = "none"
        words: list[Any] = ["build", "--load-data", folder / "load_data.csv", "--images", images]
        words += ["--out", out, "--aggregate", "none", "--segment-channels", "DNA"]
        words += ["--segmenter", "nuclei", "--workers", case.workers]
        result = run_measured(words, folder / "build.log")
    row = {**case._asdict(), "sites": len(table)}
    row |= {column: stage_seconds(result["log"], label) for column, label in STAGES.items()}
    row |= {"build s": result["s"], "processor s": result["processor s"]}
    row |= {name: result[name] for name in ("main MB", "worker MB", "all MB")}
    row |= {"images MB": megabytes(files), "dataset MB": megabytes([out])}
    if case.plates == 1:
        _keep_or_compare(out, dataset_path(folder, case.data))
    return row


def _images(
    stack: contextlib.ExitStack, folder: Path, case: Case, source: Path, names: list[str]
) -> tuple[Path | str, list[Path]]:
    """Return the value of `--images`, and the folders with the same images on disk."""
    if case.format == "OME-Zarr":
        store = mosaic.as_ome_zarr(source, names[0], folder / f"{names[0]}.zarr")
        return store, [store]
    files = [source / "images" / name for name in names]
    if case.format == "TIFF":
        return source / "images", files
    upload = stack.enter_context(serve_s3())
    for path in files:
        upload(path)
    return f"s3://{BUCKET}", files


def _keep_or_compare(out: Path, first: Path) -> None:
    if not first.is_dir():
        out.rename(first)
        return
    if open_dataset(out).fingerprint != open_dataset(first).fingerprint:
        raise RuntimeError(f"{out} differs from {first}, although the images are the same")
    shutil.rmtree(out)


def megabytes(folders: list[Path]) -> float:
    """Return the size of all files in MB."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return round(sum(path.stat().st_size for path in files) / 1e6, 1)

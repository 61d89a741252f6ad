"""How do a whole plate, other sources, more workers and more plates cost: from images to a dataset?

    python -m experiments.bench --only plates --out runs/bench

A plate of full size (384 wells × 2 sites × 1080² × 3 channels, uncompressed TIFFs), then parts of one (24 wells): from
TIFFs, from OME-Zarr (Zstd) and from S3 (moto's server in Python on the loopback interface, which shares the cores),
with 1, 2 and 4 workers, and 1, 2 and 4 such parts together. Every build is the real command in processes of its own,
with the network that comes with the program and no cache of masks. `checking s`, `segmenting s` and `writing s` are its
stages as it reports them, `build s` is all of it, `processor s` what it took of all cores together, `main MB` and
`worker MB` the peaks of its first and of its largest other process, `all MB` that of all together. The
dataset of a part is the same, to its digest, whatever it was built from and by how many workers.

Rows are kept as they come: killed and started again, it goes on with the next. What it makes stays in `runs/plates`
(12 GB), for `epochs` and `limits`, until it is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from experiments.bench import mosaic
from experiments.bench.commands import measured, seconds_of
from experiments.bench.sources import BUCKET, served_s3
from experiments.bench.tables import Row, markdown
from perturbjax.core.files import make_folder, read_json, write_json
from perturbjax.core.messages import console
from perturbjax.dataset import open_dataset

STAGES = ("checking files", "segmenting", "writing")
#: (wells of a whole plate, of a part, side of a field in pixels): in full and in the quick benchmark.
SIZES = (384, 24, 1080), (4, 2, 64)
SITES = 2


class Case(NamedTuple):
    """One build."""

    what: str
    """plate: a whole one; part: some wells."""
    kept_as: str
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
    """The rows so far, one more each time."""
    folder = make_folder(folder or place(quick))
    kept = folder / "rows.json"
    rows: list[Row] = read_json(kept) if kept.is_file() else []
    yield rows
    for case in CASES:
        if any(
            all(row[name.replace("_", " ")] == value for name, value in case._asdict().items())
            for row in rows
        ):
            continue
        rows = [*rows, built(folder, case, SIZES[quick])]
        console.print(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
        write_json(kept, rows)
        yield rows


def place(quick: bool) -> Path:
    """Where plates and datasets stay from one benchmark to the next."""
    return Path("runs") / ("plates_quick" if quick else "plates")


def plates_of(folder: Path, what: str, sizes: tuple[int, int, int]) -> Path:
    """One whole plate, or four parts, as TIFFs; made where they are not there."""
    wells, some, size = sizes
    number, wells = (1, wells) if what == "plate" else (4, some)
    return mosaic.write_plates(
        folder / f"{what}s", plates=number, wells=wells, sites=SITES, size=size
    )


def dataset_of(folder: Path, what: str) -> Path:
    """The dataset of one plate or part."""
    return folder / f"{what}_dataset"


def built(folder: Path, case: Case, sizes: tuple[int, int, int]) -> Row:
    """One build, its row. The dataset of the first build of each `what` stays, and later ones of it must be equal."""
    source, out = plates_of(folder, case.what, sizes), folder / "out"
    for leftover in (out, folder / ".out.building"):
        shutil.rmtree(leftover, ignore_errors=True)
    table = pd.read_csv(source / "load_data.csv", dtype=str)
    names = sorted(table["Metadata_Plate"].unique())[: case.plates]
    table = table[table["Metadata_Plate"].isin(names)]
    with contextlib.ExitStack() as held:
        images, files = _images(held, folder, case, source, names)
        if case.kept_as == "OME-Zarr":
            table = table[[column for column in table if column.startswith("Metadata_")]]
        table.to_csv(folder / "load_data.csv", index=False)
        os.environ["PERTURBJAX_MASK_CACHE"] = "none"
        words: list[Any] = [
            "build",
            "--load-data",
            folder / "load_data.csv",
            "--images",
            images,
            "--out",
            out,
        ]
        words += [
            "--aggregate",
            "none",
            "--segment-channels",
            "DNA",
            "--segmenter",
            "nuclei",
        ]
        found = measured([*words, "--workers", case.workers], folder / "build.log")
    row = {
        **{name.replace("_", " "): value for name, value in case._asdict().items()},
        "sites": len(table),
    }
    row |= {f"{stage.split()[0]} s": seconds_of(found["said"], stage) for stage in STAGES}
    row |= {"build s": found["s"], "processor s": found["processor s"]}
    row |= {
        name: value for name, value in found.items() if name in ("main MB", "worker MB", "all MB")
    }
    row |= {"images MB": megabytes(files), "dataset MB": megabytes([out])}
    if case.plates == 1:
        _keep(out, dataset_of(folder, case.what))
    return row


def _images(
    held: contextlib.ExitStack, folder: Path, case: Case, source: Path, names: list[str]
) -> tuple[Path | str, list[Path]]:
    """What `--images` names, and the folders that hold it."""
    if case.kept_as == "OME-Zarr":
        store = mosaic.as_ome_zarr(source, names[0], folder / f"{names[0]}.zarr")
        return store, [store]
    files = [source / "images" / name for name in names]
    if case.kept_as == "TIFF":
        return source / "images", files
    upload = held.enter_context(served_s3())
    for path in files:
        upload(path)
    return f"s3://{BUCKET}", files


def _keep(out: Path, kept: Path) -> None:
    if not kept.is_dir():
        out.rename(kept)
        return
    if open_dataset(out).fingerprint != open_dataset(kept).fingerprint:
        raise RuntimeError(
            f"{out} is not the dataset that {kept} is, though its pixels are the same"
        )
    shutil.rmtree(out)


def megabytes(folders: list[Path]) -> float:
    """Of all files."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return round(sum(path.stat().st_size for path in files) / 1e6, 1)


def main() -> None:
    *_, rows = run(quick="--quick" in sys.argv[1:])
    print(markdown(rows))


if __name__ == "__main__":
    main()

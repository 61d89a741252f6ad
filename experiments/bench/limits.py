"""Upper limits of reading and writing a plate: speed of disk and codec in one process.

    python -m experiments.bench --only limits --out runs/bench

Uses the plate of benchmark `plates`: reads its files from disk (after dropping them from the page
cache) and from the page cache, decodes them, compresses their pixels like the shards of a dataset,
decompresses them, and writes the same number of bytes to disk. `MB/s` counts uncompressed pixels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from experiments.bench.plates import SIZES, make_plates, work_folder
from experiments.bench.tables import Row
from perturbjax.dataset.shards import compress_tensor

#: Number of files to read.
FILES = 300


def run(quick: bool, folder: Path | None = None) -> list[Row]:
    """Measure every operation; one row each."""
    folder = folder or work_folder(quick)
    files = sorted((make_plates(folder, "plate", SIZES[quick]) / "images").rglob("*.tiff"))[:FILES]
    for path in files:
        _drop_from_page_cache(path)
    rows: list[Row] = []

    def timed(operation: str, work: Callable[[], list[Any]]) -> list[Any]:
        start = time.perf_counter()
        result = work()
        rows.append({"operation": operation, "MB/s": pixels / 1e6 / (time.perf_counter() - start)})
        return result

    pixels = sum(path.stat().st_size for path in files)
    timed("read, from the disk", lambda: [path.read_bytes() for path in files])
    timed("read, from the page cache", lambda: [path.read_bytes() for path in files])
    planes: list[np.ndarray] = timed(
        "read and decode", lambda: [tifffile.imread(path) for path in files]
    )
    deflated = timed("deflate", lambda: [compress_tensor(plane) for plane in planes])
    timed(
        "inflate",
        lambda: [imagecodecs.zlib_decode(part, out=planes[0].nbytes) for part in deflated],
    )
    timed(
        "write, to the disk",
        lambda: [_write(folder / "written", b"".join(plane.tobytes() for plane in planes))],
    )
    rows[3]["deflated to"] = sum(map(len, deflated)) / pixels
    return [{**row, "MB": pixels / 1e6} for row in rows]


def _drop_from_page_cache(path: Path) -> None:
    """Remove a file from the page cache, if the system supports it."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write(path: Path, content: bytes) -> None:
    """Write a file, wait until it is on disk, and delete it."""
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    path.unlink()

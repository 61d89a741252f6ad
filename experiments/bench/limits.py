"""What can disk and codec do with a plate's files, alone in one process?

    python -m experiments.bench --only limits --out runs/bench

On the plate that `plates` wrote: reading its files from the disk (they are put out of the page cache first) and from
the page cache, decoding them, deflating their pixels as a dataset's shards do and inflating them again, and writing as
many bytes to the disk until it has them. `MB/s` counts pixels as they are in memory.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from experiments.bench.plates import SIZES, place, plates_of
from experiments.bench.tables import Row, markdown

#: Files that are read: some sites of all their channels.
FILES = 300


def run(quick: bool, folder: Path | None = None) -> list[Row]:
    """One row for each thing that is done."""
    folder = folder or place(quick)
    files = sorted((plates_of(folder, "plate", SIZES[quick]) / "images").rglob("*.tiff"))[:FILES]
    for path in files:
        _forget(path)
    rows: list[Row] = []

    def timed(what: str, work: Callable[[], list[Any]]) -> list[Any]:
        start = time.perf_counter()
        found = work()
        rows.append({"what": what, "MB/s": pixels / 1e6 / (time.perf_counter() - start)})
        return found

    pixels = sum(path.stat().st_size for path in files)
    timed("read, from the disk", lambda: [path.read_bytes() for path in files])
    timed("read, from the page cache", lambda: [path.read_bytes() for path in files])
    planes: list[np.ndarray] = timed(
        "read and decode", lambda: [tifffile.imread(path) for path in files]
    )
    deflated = timed("deflate", lambda: [zlib.compress(plane.tobytes()) for plane in planes])
    timed(
        "inflate",
        lambda: [imagecodecs.zlib_decode(part, out=planes[0].nbytes) for part in deflated],
    )
    timed(
        "write, to the disk",
        lambda: [_written(folder / "written", b"".join(plane.tobytes() for plane in planes))],
    )
    rows[3]["deflated to"] = sum(map(len, deflated)) / pixels
    return [{**row, "MB": pixels / 1e6} for row in rows]


def _forget(path: Path) -> None:
    """Put a file out of the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _written(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    path.unlink()


def main() -> None:
    print(markdown(run(quick="--quick" in sys.argv[1:])))


if __name__ == "__main__":
    main()

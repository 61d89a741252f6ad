"""Helpers of build tests: options, folder checksums, processes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import tifffile

from data_prep.build import BuildConfig


def options(plate: Path, out: Path, **changes) -> BuildConfig:
    """Options of a build with the watershed, which starts immediately."""
    settings = {
        "aggregate": "none",
        "segment_channels": "DNA",
        "segmenter": "watershed",
        "workers": 1,
        **changes,
    }
    return BuildConfig(load_data=plate / "load_data.csv", images=plate, out=out, **settings)


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of all files by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def children(pid: int) -> list[int]:
    """Return the process ids of the children; empty without /proc."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def running(pid: int) -> bool:
    """Return whether a process runs (and is not a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def swap_pixels(plate: Path, site: str) -> None:
    """Change the pixels of a file, but not its name, size and date."""
    path = plate / f"images/SIM001/{site}_DNA.tiff"
    before = path.stat()
    tifffile.imwrite(path, tifffile.imread(path)[::-1].copy(), metadata=None)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

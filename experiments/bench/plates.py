"""How do a whole plate, more workers and more plates cost: from TIFFs to a dataset, and an epoch of training on it?

    python -m experiments.bench.plates --out runs/plates                      # 384 wells × 2 sites × 1080² × 3 channels
    python -m experiments.bench.plates --out runs/plates --wells 12 --size 256 --plates 1 2 --workers 1 2    # a minute

Plates are simulated once. Every build and every epoch is the real command in a process of its own: `checking s`,
`segmenting s` and `writing s` are its stages as it reports them, `build s` is all of it, `processor s` what it took of
all cores together, `peak MB` the largest of its processes, `disk MB` the dataset. `limits` is what disk and codec do
with the same files: reading them, decoding them, and deflating the pixels, each alone in one process.
Needs about 10 GB for a plate of full size. No table of a full-size plate stands in the documentation yet.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import tifffile

from experiments.bench.tables import markdown
from perturbjax.console import console, parse_options, require, require_sound, run_command
from perturbjax.files import make_folder, write_json

STAGES = ("checking files", "segmenting", "writing")


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for plates, datasets and the tables."""
    wells: int = 384
    """Wells of a plate."""
    sites: int = 2
    """Sites of a well."""
    size: int = 1080
    """Side of an image in pixels."""
    plates: tuple[int, ...] = (1, 2, 4)
    """Numbers of plates to build together, with as many workers as there are cores."""
    workers: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes to build the first plate with."""
    segmenter: str = "watershed"
    """Engine of the masks."""
    flags: str = ""
    """More flags for `perturbjax build`."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("wells", self.wells, self.wells >= 4, "4 or more")
        require("sites", self.sites, self.sites >= 1, "at least one")
        require("size", self.size, self.size >= 64, "64 or more")
        require("plates", self.plates, all(1 <= number <= 99 for number in self.plates), "from 1 to 99")
        require("workers", self.workers, all(1 <= number <= 999 for number in self.workers), "from 1 to 999")


def measured(words: list[object], log: Path) -> dict[str, Any]:
    """Run `perturbjax …` in its own process: its seconds, its processors' and its largest process; what it said."""
    start = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "-m", "perturbjax", *map(str, words)], stderr=file, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"perturbjax {words[0]} failed: {log.read_text()[-2000:]}")
    return {
        "s": round(seconds, 1),
        "processor s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak MB": round(usage.ru_maxrss / 1024),
        "said": log.read_text(),
    }


def seconds_of(said: str, label: str) -> float:
    """Of a stage, from the line that it ends with: `label: n/n sites in 12.3 s` or `… in 1:02:03`."""
    took = re.search(rf"^{label}: \S+ \w+ in ([\d:.]+)", said, re.MULTILINE)
    if took is None:
        raise RuntimeError(f"{label} is not in what was said: {said[-2000:]}")
    total = 0.0
    for part in took[1].split(":"):
        total = 60 * total + float(part)
    return round(total, 1)


def simulated(options: Config, plates: int) -> Path:
    """Plates as TIFFs, made once."""
    out = options.out / f"plates_{plates}"
    if not out.exists():
        words = ["simulate", "--out", out, "--plates", plates, "--wells", options.wells, "--sites", options.sites]
        words += ["--compounds", min(8, options.wells - 1)]
        measured([*words, "--size", options.size], options.out / "simulate.log")
    return out


def built(options: Config, plates: int, workers: int) -> dict[str, Any]:
    """One build, its row; the dataset of one plate stays, for training."""
    source, out = simulated(options, plates), options.out / f"dataset_{plates}"
    shutil.rmtree(out, ignore_errors=True)
    words = ["build", "--load-data", source / "load_data.csv", "--images", source, "--out", out, "--aggregate", "none"]
    words += ["--segment-channels", "DNA", "--segmenter", options.segmenter, "--workers", workers]
    found = measured([*words, "--mask-cache", "none", *options.flags.split()], options.out / "build.log")
    sites = plates * options.wells * options.sites
    row = {"plates": plates, "workers": workers, "sites": sites, "build s": found["s"]}
    row |= {f"{stage.split()[0]} s": seconds_of(found["said"], stage) for stage in STAGES}
    row |= {"processor s": found["processor s"], "peak MB": found["peak MB"]}
    row["disk MB"] = round(sum(path.stat().st_size for path in out.iterdir()) / 1e6, 1)
    return row


def trained(options: Config, feed: str) -> dict[str, Any]:
    """One epoch on the first plate's dataset."""
    run = options.out / f"run_{feed}"
    shutil.rmtree(run, ignore_errors=True)
    words = ["train", "--data", options.out / "dataset_1", "--out", run, "--epochs", 1, "--feed", feed, "--folds", 2]
    found = measured(words, options.out / "train.log")
    keys = ("s", "processor s", "peak MB")
    return {"feed": feed, "epoch s": seconds_of(found["said"], "train"), **{key: found[key] for key in keys}}


def limits(options: Config) -> dict[str, Any]:
    """MB of pixels a second that one process reads, decodes and deflates, of the first plate's files; what is in the
    page cache is not read from the disk."""
    files = sorted((simulated(options, 1) / "images").rglob("*.tif*"))[:300]
    start = time.perf_counter()
    contents = [path.read_bytes() for path in files]
    read = time.perf_counter()
    planes = [tifffile.imread(path) for path in files]
    decoded = time.perf_counter()
    deflated = sum(len(imagecodecs.deflate_encode(plane.tobytes(), level=6)) for plane in planes)
    end = time.perf_counter()
    pixels = sum(plane.nbytes for plane in planes) / 1e6
    return {
        "files": len(files),
        "MB of files": round(sum(map(len, contents)) / 1e6, 1),
        "MB of pixels": round(pixels, 1),
        "read MB/s": round(pixels / (read - start)),
        "read and decode MB/s": round(pixels / (decoded - read)),
        "deflate MB/s": round(pixels / (end - decoded)),
        "deflated to": round(deflated / 1e6 / pixels, 3),
    }


def run(options: Config) -> dict[str, list[dict[str, Any]]]:
    """Everything; the tables by name, written to `plates.json` too."""
    make_folder(options.out)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tables = {
        "limits": [limits(options)],
        "plates": [built(options, plates, cores) for plates in options.plates],
        "workers": [built(options, 1, workers) for workers in options.workers],
    }
    tables["epoch"] = [trained(options, feed) for feed in ("resident", "streamed")]
    write_json(options.out / "plates.json", tables)
    for name, rows in tables.items():
        console.print(f"\n{name}\n{markdown(rows)}")
    return tables


def main() -> None:
    run_command(lambda: run(parse_options(Config)))


if __name__ == "__main__":
    main()

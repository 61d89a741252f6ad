"""The storm of odd places: full disks, homes that are missing, names that are code to somebody, other terminals."""

from __future__ import annotations

import os
import pty
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from tests.storms.arena import Arena, Ended, Order, classify
from tests.storms.files import Finding
from tests.storms.material import BUILT, SIMULATED, TRAINED, Material

#: Texts that are code to some interpreter: matplotlib, rich, HTML, a spreadsheet, a shell, a path.
HOSTILE_NAMES = (
    "$x_{$",
    "benzo[a]pyrene",
    "[/b]",
    "=HYPERLINK(1)",
    "<script>alert(1)</script>",
    "../../x",
    "a\tb",
    "´é漢",
)
#: Kilobytes of one file at which the disk is full.
FULL_AT_KB = (0, 1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Oddity:
    """One kind of odd place; `run` yields its cases."""

    name: str
    run: Callable[[Arena, Material, Path], Iterator[Finding]]


@dataclass(frozen=True)
class _Try:
    command: Sequence[object]
    environment: Mapping[str, str] = field(default_factory=dict)
    without: Sequence[str] = ()


def _writers(made: Material, root: Path) -> dict[str, Sequence[object]]:
    plates = ("--load-data", made.plates / "load_data.csv", "--images", made.plates)
    out = root / "OUT"
    return {
        "simulate": ("data_prep", "simulate", "--out", out, *SIMULATED),
        "build": ("data_prep", "build", *plates, "--out", out, *BUILT),
        "train": ("perturbjax", "train", "--data", made.dataset, "--out", out, *TRAINED, "--compile-cache", "none"),
        "predict": ("perturbjax", "predict", "--run", made.run, "--data", made.dataset, "--out", root / "OUT.parquet"),
        "split": ("perturbjax", "split", "--data", made.dataset, "--out", root / "OUT.parquet", "--folds", 2),
        "import-torch": ("perturbjax", "import-torch", "--checkpoint", made.safetensors, "--out", out),
        "export-torch": ("perturbjax", "export-torch", "--run", made.run, "--out", root / "OUT.pth"),
    }


def _clean(root: Path) -> None:
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _finding(name: str, what: str, ended: Ended, root: Path) -> Finding:
    said = (ended.errors or ended.stderr.strip().splitlines() or [""])[-1]
    return Finding(name, what, "", classify(ended, same=True, may_differ=True, marker=root / "executed"), said)


def full_disks(arena: Arena, made: Material, root: Path) -> Iterator[Finding]:
    """Every writer, with files that cannot grow; then again with room, which must finish what was begun."""
    for name, command in _writers(made, root).items():
        for kilobytes in FULL_AT_KB:
            _clean(root)
            ended = arena.run(Order(command, root, file_bytes=kilobytes * 1024))
            yield _finding("disk full", f"{name} at {kilobytes} KB", ended, root)
            if ended.status:
                again = arena.run(Order(command, root))
                finding = _finding("disk full, then room", f"{name} after {kilobytes} KB", again, root)
                yield finding if again.status == 0 else Finding(**{**vars(finding), "outcome": "traceback"})


def environments(arena: Arena, made: Material, root: Path) -> Iterator[Finding]:
    """No home, a home that cannot be written, other locales, zones and widths: the same answers."""
    readonly = "/proc/nowhere"
    odd = {
        "no HOME": ({}, ("HOME", "XDG_CACHE_HOME")),
        "HOME that cannot be written": ({"HOME": readonly, "XDG_CACHE_HOME": readonly}, ()),
        "40 columns": ({"COLUMNS": "40"}, ()),
        "locale C": ({"LC_ALL": "C", "LANG": "C"}, ()),
        "locale tr_TR": ({"LC_ALL": "tr_TR.UTF-8"}, ()),
        "a zone 14 hours ahead": ({"TZ": "Pacific/Kiritimati"}, ()),
        "SOURCE_DATE_EPOCH=x": ({"SOURCE_DATE_EPOCH": "x"}, ()),
        "no TERM": ({}, ("TERM",)),
    }
    for what, (environment, without) in odd.items():
        for name, command in _writers(made, root).items():
            _clean(root)
            ended = arena.run(Order(command, root, environment, without))
            refused_well = what == "SOURCE_DATE_EPOCH=x" and ended.status == 2
            finding = _finding("odd environment", f"{name}, {what}", ended, root)
            yield finding if ended.status == 0 or refused_well else Finding(**{**vars(finding), "outcome": "traceback"})


def hostile_names(arena: Arena, made: Material, root: Path) -> Iterator[Finding]:
    """Classes and folders with names that are code to somebody, from the CSV to the report."""
    for name in HOSTILE_NAMES:
        _clean(root)
        table = pd.read_csv(made.plates / "load_data.csv", dtype=str, keep_default_na=False)
        other = table["Metadata_pert_iname"].ne("DMSO")
        first = table.loc[other, "Metadata_pert_iname"].iloc[0]
        table.loc[table["Metadata_pert_iname"].eq(first), "Metadata_pert_iname"] = name
        table.to_csv(root / "load_data.csv", index=False)
        folder = root / name.replace("/", "_").replace("\t", " ")
        plates = ("--load-data", root / "load_data.csv", "--images", made.plates)
        for command in (
            ("data_prep", "build", *plates, "--out", root / "data", *BUILT),
            ("perturbjax", "train", "--data", root / "data", "--out", folder, *TRAINED),
            ("perturbjax", "evaluate", "--run", folder, "--replicates", 50),
            ("perturbjax", "classify", *("--features", folder / "evaluation" / "features.parquet", "--models", "lda"),
             *("--folds", 2, "--split", "well", "--out", root / "classified", "--replicates", 50)),
        ):  # fmt: skip
            ended = arena.run(Order(command, root))
            finding = _finding("hostile name", f"{command[1]}, {name!r}", ended, root)
            yield finding if ended.status == 0 else Finding(**{**vars(finding), "outcome": "traceback"})
            if ended.status:
                break
        report = folder / "report.html"
        if report.is_file() and "<script>alert" in report.read_text():
            yield Finding("hostile name", f"report, {name!r}", "", "executed", "the page holds the script")


def odd_places(arena: Arena, made: Material, root: Path) -> Iterator[Finding]:
    """Outputs that are no files or hold a user's own, inputs that are no files."""
    build = ("data_prep", "build", "--load-data", made.plates / "load_data.csv", "--images", made.plates, *BUILT)
    predict = ("perturbjax", "predict", "--run", made.run, "--data", made.dataset)
    os.mkfifo(root / "fifo")
    device = _device(root)
    tries = {
        "build --out .": (*build, "--out", "."),
        "build --out /": (*build, "--out", "/"),
        "build --out ''": (*build, "--out", ""),
        "CSV is a FIFO": ("data_prep", "inspect", "--load-data", root / "fifo", "--images", made.plates),
        "CSV is a folder": ("data_prep", "inspect", "--load-data", root, "--images", made.plates),
        "predict to a device": (*predict, "--out", device),
        "predict to a folder": (*predict, "--out", root),
        "dataset is a file": ("perturbjax", "split", "--data", made.split, "--out", root / "s.parquet"),
        "run is a dataset": ("perturbjax", "evaluate", "--run", made.dataset),
        "weights are a FIFO": ("perturbjax", "import-torch", "--checkpoint", root / "fifo", "--out", root / "o"),
    }
    for what, command in tries.items():
        ended = arena.run(Order(command, root, limit_s=45))
        finding = _finding("odd place", what, ended, root)
        yield finding if ended.status == 2 else Finding(**{**vars(finding), "outcome": "silently different"})
    if not device.is_char_device():
        yield Finding("odd place", "predict to a device", "", "silently different", "the device became a file")


def _device(root: Path) -> Path:
    """A device that may be spoilt: one of our own where the user may make one, else a terminal's end."""
    own = root / "null"
    try:
        os.mknod(own, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return Path(os.ttyname(pty.openpty()[1]))
    return own


ODDITIES = [
    Oddity("disk full", full_disks),
    Oddity("odd environment", environments),
    Oddity("hostile name", hostile_names),
    Oddity("odd place", odd_places),
]

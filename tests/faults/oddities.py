"""The storm of odd places: full disks, homes that are missing, names that are code to somebody, other terminals."""

from __future__ import annotations

import os
import pty
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from tests.faults.arena import Arena, Order
from tests.faults.hostile import hostile_files
from tests.faults.material import BUILT, SIMULATED, TRAINED, Material, read_plates
from tests.faults.outcomes import Finding, finding

#: Texts that are code to some interpreter: matplotlib, rich, HTML, a spreadsheet, a path, a terminal.
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
#: Kilobytes that a file can have at most where the disk is full by a limit, and that a small disk has in all.
LIMITS_KB, DISKS_KB = (4, 64), (64, 512)
WRITERS = ("simulate", "build", "train", "predict", "split", "import-torch", "export-torch")
NOWHERE = "/proc/nowhere"
#: What → variables set, and variables taken away.
ENVIRONMENTS: dict[str, tuple[Mapping[str, str], Sequence[str]]] = {
    "no HOME": ({}, ("HOME", "XDG_CACHE_HOME")),
    "HOME that cannot be written": ({"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE}, ()),
    "40 columns": ({"COLUMNS": "40"}, ()),
    "locale C": ({"LC_ALL": "C", "LANG": "C"}, ()),
    "locale tr_TR": ({"LC_ALL": "tr_TR.UTF-8"}, ()),
    "a zone 14 hours ahead": ({"TZ": "Pacific/Kiritimati"}, ()),
    "SOURCE_DATE_EPOCH=x": ({"SOURCE_DATE_EPOCH": "x"}, ()),
    "no TERM": ({}, ("TERM",)),
}


@dataclass(frozen=True)
class Oddity:
    """One kind of odd place; `run` yields its cases."""

    name: str
    run: Callable[[Arena, Material, Path], Iterator[Finding]]


def oddities() -> list[Oddity]:
    """All of them, in parts that take alike."""
    return [
        *(Oddity(f"disk full, {name}", partial(full_disks, name=name)) for name in WRITERS),
        *(
            Oddity(f"odd environment, {name}", partial(environment, name=name))
            for name in ENVIRONMENTS
        ),
        Oddity("hostile file", hostile_files),
        Oddity("hostile name", hostile_names),
        Oddity("odd place", odd_places),
    ]


def _writer(name: str, made: Material, root: Path) -> Sequence[object]:
    """The command line of one of `WRITERS`, which needs of the material no more than its own."""
    out, table = ("--out", root / "OUT"), ("--out", root / "OUT.parquet")
    commands: dict[str, Callable[[], Sequence[object]]] = {
        "simulate": lambda: ("data_prep", "simulate", *out, *SIMULATED),
        "build": lambda: ("data_prep", "build", *read_plates(made), *out, *BUILT),
        "train": lambda: ("perturbjax", "train", "--data", made.dataset, *out, *TRAINED),
        "predict": lambda: (
            "perturbjax",
            "predict",
            "--run",
            made.run,
            "--data",
            made.dataset,
            *table,
        ),
        "split": lambda: ("perturbjax", "split", "--data", made.dataset, *table, "--folds", 2),
        "import-torch": lambda: (
            "perturbjax",
            "import-torch",
            "--checkpoint",
            made.safetensors,
            *out,
        ),
        "export-torch": lambda: (
            "perturbjax",
            "export-torch",
            "--run",
            made.run,
            "--out",
            root / "OUT.pth",
        ),
    }
    return commands[name]()


def _clean(root: Path) -> None:
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def full_disks(arena: Arena, made: Material, root: Path, *, name: str) -> Iterator[Finding]:
    """A writer where files cannot grow, and on a small disk; then again with room, where it must finish."""
    command = _writer(name, made, root)
    for kilobytes in LIMITS_KB:
        _clean(root)
        ended = arena.run(Order(command, root, file_bytes=kilobytes * 1024))
        yield finding("disk full", f"{name}, files of {kilobytes} KB", ended)
        yield from _with_room(arena, command, root, f"{name} after files of {kilobytes} KB")
    for kilobytes in DISKS_KB:
        _clean(root)
        with _disk(root / "disk", kilobytes) as disk:
            if disk is None:
                return
            command = _writer(name, made, disk)
            yield finding(
                "disk full", f"{name}, a disk of {kilobytes} KB", arena.run(Order(command, root))
            )
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            yield from _with_room(arena, command, root, f"{name} after a disk of {kilobytes} KB")


def _with_room(arena: Arena, command: Sequence[object], root: Path, what: str) -> Iterator[Finding]:
    again = arena.run(Order(command, root))
    yield finding("disk full, then room", what, again).unless(again.status == 0, "traceback")


@contextmanager
def _disk(folder: Path, kilobytes: int) -> Iterator[Path | None]:
    """A file system of that size; None where the user may mount none."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def environment(arena: Arena, made: Material, root: Path, *, name: str) -> Iterator[Finding]:
    """No home, a home that cannot be written, other locales, zones and widths: commands end as anywhere else."""
    variables, without = ENVIRONMENTS[name]
    for verb in WRITERS:
        _clean(root)
        ended = arena.run(Order(_writer(verb, made, root), root, variables, without))
        refused_well = name == "SOURCE_DATE_EPOCH=x" and ended.status == 2
        yield finding("odd environment", f"{verb}, {name}", ended).unless(
            ended.status == 0 or refused_well, "traceback"
        )


def hostile_names(arena: Arena, made: Material, root: Path) -> Iterator[Finding]:
    """Classes with names that are code to somebody, from the CSV to the report; then folders with such names."""
    plates, csv = root / "plates", root / "load_data.csv"
    drawn = (
        "--plates",
        2,
        "--wells",
        20,
        "--sites",
        1,
        "--compounds",
        len(HOSTILE_NAMES),
        "--size",
        48,
    )
    arena.run(Order(("data_prep", "simulate", "--out", plates, *drawn), root))
    table = pd.read_csv(plates / "load_data.csv", dtype=str, keep_default_na=False)
    label = table["Metadata_pert_iname"]
    names = dict(zip(sorted(set(label) - {"DMSO"}), HOSTILE_NAMES, strict=True))
    table.assign(Metadata_pert_iname=label.replace(names)).to_csv(csv, index=False)
    run = root / "run"
    profiles = (
        "--features",
        run / "evaluation" / "features.parquet",
        "--models",
        "lda",
        "--split",
        "plate",
    )
    for command in (
        ("data_prep", "inspect", "--load-data", csv, "--images", plates),
        (
            "data_prep",
            "build",
            "--load-data",
            csv,
            "--images",
            plates,
            "--out",
            root / "data",
            *BUILT,
        ),
        (
            "perturbjax",
            "train",
            "--data",
            root / "data",
            "--out",
            run,
            *TRAINED,
            "--split",
            "plate",
        ),
        ("perturbjax", "evaluate", "--run", run, "--replicates", 50),
        (
            "perturbjax",
            "classify",
            *profiles,
            "--folds",
            2,
            "--out",
            root / "classified",
        ),
        ("perturbjax", "predict", "--run", run, "--data", root / "data", "--out", root / "p.csv"),
    ):
        ended = arena.run(Order(command, root))
        yield finding("hostile name", f"{command[1]}, classes", ended).unless(
            ended.status == 0, "traceback"
        )
        if ended.status:
            return
    report, cells = (run / "report.html").read_text(), pd.read_csv(root / "p.csv", dtype=str)
    escaped = "<script>alert" not in report and not cells["label"].str.startswith("=").any()
    yield finding("hostile name", "report and table", ended).unless(escaped, "executed")
    for name in HOSTILE_NAMES:
        folder = root / "named" / name.replace("/", "_").replace("\t", " ")
        for command in (
            (
                "perturbjax",
                "split",
                "--data",
                made.dataset,
                "--out",
                folder / "s.parquet",
                "--folds",
                2,
            ),
            (
                "perturbjax",
                "train",
                "--data",
                made.dataset,
                "--out",
                folder / "run",
                "--split-file",
                folder / "none",
            ),
        ):
            ended = arena.run(Order(command, root))
            right = ended.status == (0 if command[1] == "split" else 2)
            shown = str(folder) in "".join(ended.stderr.splitlines())
            yield finding("hostile name", f"{command[1]}, folder {name}", ended).unless(
                right and shown, "traceback"
            )


def odd_places(arena: Arena, made: Material, root: Path) -> Iterator[Finding]:
    """Outputs that are no files or hold a user's own, inputs that are no files: each is refused."""
    predict = ("perturbjax", "predict", "--run", made.run, "--data", made.dataset)
    os.mkfifo(root / "fifo")
    os.mkfifo(root / "fifo.parquet")
    (root / "folder.parquet").mkdir()
    device = _device(root)
    (root / "device.csv").symlink_to(device)
    mine = Path(shutil.copytree(made.dataset, root / "mine"))
    (mine / "notes.txt").write_text("mine")
    build = ("data_prep", "build", *read_plates(made), *BUILT)
    tries: dict[str, Sequence[object]] = {
        "build --out .": (*build, "--out", "."),
        "build --out /": (*build, "--out", "/"),
        "build --out ''": (*build, "--out", ""),
        "build --overwrite over a user's file": (
            *build,
            "--out",
            mine,
            "--overwrite",
            "--resize",
            24,
        ),
        "CSV is a FIFO": (
            "data_prep",
            "inspect",
            "--load-data",
            root / "fifo",
            "--images",
            made.plates,
        ),
        "CSV is a folder": ("data_prep", "inspect", "--load-data", root, "--images", made.plates),
        "predict to a device": (*predict, "--out", device),
        "predict to a link to a device": (*predict, "--out", root / "device.csv"),
        "predict to a pipe": (*predict, "--out", root / "fifo.parquet"),
        "predict to a folder": (*predict, "--out", root / "folder.parquet"),
        "predict to standard output": (*predict, "--out", "/dev/stdout"),
        "dataset is a file": (
            "perturbjax",
            "split",
            "--data",
            made.split,
            "--out",
            root / "s.parquet",
        ),
        "run is a dataset": ("perturbjax", "evaluate", "--run", made.dataset),
        "weights are a FIFO": (
            "perturbjax",
            "import-torch",
            "--checkpoint",
            root / "fifo",
            "--out",
            root / "o",
        ),
    }
    for what, command in tries.items():
        ended = arena.run(Order(command, root))
        yield finding("odd place", what, ended).unless(ended.status == 2, "silently different")
    whole = (
        device.is_char_device()
        and (root / "fifo.parquet").is_fifo()
        and (mine / "notes.txt").is_file()
    )
    yield finding("odd place", "what was there is there", ended).unless(whole, "silently different")


def _device(root: Path) -> Path:
    """A device that may be spoilt: one of our own where the user may make one, else a terminal's end."""
    own = root / "null.parquet"
    try:
        os.mknod(own, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return Path(os.ttyname(pty.openpty()[1]))
    return own

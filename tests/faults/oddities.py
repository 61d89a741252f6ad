"""Unusual environments: full disks, no home folder, hostile names, devices instead of files."""

from __future__ import annotations

import os
import pty
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd

from tests.faults.arena import CommandServer, Request, words
from tests.faults.hostile import hostile_files
from tests.faults.images import hostile_images
from tests.faults.material import BUILT, SIMULATED, TRAINED, Material, plate_flags
from tests.faults.outcomes import Finding, make_finding
from tests.faults.servers import hostile_servers

#: Names that matplotlib, rich, HTML, spreadsheets, paths or terminals could misread or execute.
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
#: Full disks: maximum size of a file, and size of a small file system, in KB.
LIMITS_KB, DISKS_KB = (4, 64), (64, 512)
WRITERS = ("simulate", "build", "train", "predict", "split", "import-torch", "export-torch")
MISSING = "/proc/nowhere"
#: Name → (variables to set, variables to remove).
ENVIRONMENTS: dict[str, tuple[Mapping[str, str], Sequence[str]]] = {
    "no HOME": ({}, ("HOME", "XDG_CACHE_HOME")),
    "HOME not writable": ({"HOME": MISSING, "XDG_CACHE_HOME": MISSING}, ()),
    "40 columns": ({"COLUMNS": "40"}, ()),
    "locale C": ({"LC_ALL": "C", "LANG": "C"}, ()),
    "locale tr_TR": ({"LC_ALL": "tr_TR.UTF-8"}, ()),
    "time zone UTC+14": ({"TZ": "Pacific/Kiritimati"}, ()),
    "SOURCE_DATE_EPOCH=x": ({"SOURCE_DATE_EPOCH": "x"}, ()),
    "no TERM": ({}, ("TERM",)),
}
Suite = Callable[[CommandServer, Material, Path], Iterator[Finding]]


def environment_suites() -> dict[str, Suite]:
    """Return all suites of this module by name, and the hostile files and servers."""
    return {
        **{f"disk full, {name}": partial(full_disks, name=name) for name in WRITERS},
        **{f"environment, {name}": partial(environments, name=name) for name in ENVIRONMENTS},
        "hostile file": hostile_files,
        "hostile image": hostile_images,
        "hostile server": hostile_servers,
        "hostile name": hostile_names,
        "special file": special_files,
    }


def _writer(name: str, material: Material, root: Path) -> list[str]:
    """Return the command line of one of `WRITERS`; creates only the material that it needs."""
    out, table = root / "OUT", root / "OUT.parquet"
    perturbjax = f"perturbjax {name}"
    if name == "simulate":
        return words(f"data_prep simulate --out {{}} {SIMULATED}", out)
    if name == "build":
        return [*words(f"data_prep build --out {{}} {BUILT}", out), *plate_flags(material)]
    if name == "train":
        return words(f"{perturbjax} --data {{}} --out {{}} {TRAINED}", material.dataset, out)
    if name == "predict":
        flags = "--run {} --data {} --out {}"
        return words(f"{perturbjax} {flags}", material.run, material.dataset, table)
    if name == "split":
        return words(f"{perturbjax} --data {{}} --out {{}} --folds 2", material.dataset, table)
    if name == "import-torch":
        return words(f"{perturbjax} --checkpoint {{}} --out {{}}", material.safetensors, out)
    return words(f"{perturbjax} --run {{}} --out {{}}", material.run, root / "OUT.pth")


def _clean(root: Path) -> None:
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def full_disks(
    server: CommandServer, material: Material, root: Path, *, name: str
) -> Iterator[Finding]:
    """Run a command on a full disk, then with space: the second run must finish."""
    for kilobytes in LIMITS_KB:
        _clean(root)
        command = _writer(name, material, root)
        result = server.run(Request(command, root, file_bytes=kilobytes * 1024))
        case = f"{name}, files of {kilobytes} KB"
        yield make_finding("disk full", case, result)
        yield _run_with_space(server, command, root, case)
    for kilobytes in DISKS_KB:
        _clean(root)
        with _small_disk(root / "disk", kilobytes) as disk:
            if disk is None:
                return
            command = _writer(name, material, disk)
            case = f"{name}, disk of {kilobytes} KB"
            yield make_finding("disk full", case, server.run(Request(command, root)))
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            yield _run_with_space(server, command, root, case)


def _run_with_space(
    server: CommandServer, command: Sequence[str], root: Path, case: str
) -> Finding:
    result = server.run(Request(command, root))
    finding = make_finding("disk full, then space", case, result)
    return finding.require(result.status == 0, "traceback")


@contextmanager
def _small_disk(folder: Path, kilobytes: int) -> Iterator[Path | None]:
    """Mount a small file system; yields None if the user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def environments(
    server: CommandServer, material: Material, root: Path, *, name: str
) -> Iterator[Finding]:
    """Run all writers in an unusual environment; they must finish."""
    variables, unset = ENVIRONMENTS[name]
    for writer in WRITERS:
        _clean(root)
        result = server.run(Request(_writer(writer, material, root), root, variables, unset))
        is_refused = name == "SOURCE_DATE_EPOCH=x" and result.status == 2
        finding = make_finding("environment", f"{writer}, {name}", result)
        yield finding.require(result.status == 0 or is_refused, "traceback")


def hostile_names(server: CommandServer, material: Material, root: Path) -> Iterator[Finding]:
    """Use hostile class names from CSV to report, then hostile folder names."""
    plates, csv, data, run = root / "plates", root / "load_data.csv", root / "data", root / "run"
    simulate = (
        "data_prep simulate --plates 2 --wells 20 --sites 1 --size 48 --compounds {} --out {}"
    )
    server.run(Request(words(simulate, len(HOSTILE_NAMES), plates), root))
    table = pd.read_csv(plates / "load_data.csv", dtype=str, keep_default_na=False)
    label = table["Metadata_pert_iname"]
    names = dict(zip(sorted(set(label) - {"DMSO"}), HOSTILE_NAMES, strict=True))
    table.assign(Metadata_pert_iname=label.replace(names)).to_csv(csv, index=False)
    features = run / "evaluation" / "features.parquet"
    train = f"perturbjax train --data {{}} --out {{}} {TRAINED}".replace(
        "--split well", "--split plate"
    )
    classify = "perturbjax classify --features {} --models lda --split plate --folds 2 --out {}"
    for command in (
        words("data_prep inspect --load-data {} --images {}", csv, plates),
        words(
            f"data_prep build --load-data {{}} --images {{}} --out {{}} {BUILT}", csv, plates, data
        ),
        words(train, data, run),
        words("perturbjax evaluate --run {} --replicates 50", run),
        words(classify, features, root / "classified"),
        words("perturbjax predict --run {} --data {} --out {}", run, data, root / "p.csv"),
    ):
        result = server.run(Request(command, root))
        finding = make_finding("hostile name", f"{command[1]}, classes", result)
        yield finding.require(result.status == 0, "traceback")
        if result.status:
            return
    report, rows = (run / "report.html").read_text(), pd.read_csv(root / "p.csv", dtype=str)
    is_escaped = "<script>alert" not in report and not rows["label"].str.startswith("=").any()
    yield make_finding("hostile name", "report and table", result).require(is_escaped, "executed")
    for name in HOSTILE_NAMES:
        folder = root / "named" / name.replace("/", "_").replace("\t", " ")
        split = "perturbjax split --data {} --out {} --folds 2"
        train = "perturbjax train --data {} --out {} --split-file {}"
        for command, status in (
            (words(split, material.dataset, folder / "s.parquet"), 0),
            (words(train, material.dataset, folder / "run", folder / "none"), 2),
        ):
            result = server.run(Request(command, root))
            is_named = str(folder) in "".join(result.stderr.splitlines())
            finding = make_finding("hostile name", f"{command[1]}, folder {name}", result)
            yield finding.require(result.status == status and is_named, "traceback")


def special_files(server: CommandServer, material: Material, root: Path) -> Iterator[Finding]:
    """Pass devices, pipes, folders and the user's own files; each must be refused and unchanged."""
    for name in ("fifo", "fifo.parquet"):
        os.mkfifo(root / name)
    (root / "folder.parquet").mkdir()
    device = _make_device(root)
    (root / "device.csv").symlink_to(device)
    own = Path(shutil.copytree(material.dataset, root / "own"))
    (own / "notes.txt").write_text("notes")
    build = [*words(f"data_prep build {BUILT}"), *plate_flags(material), "--out"]
    predict = words("perturbjax predict --run {} --data {} --out", material.run, material.dataset)
    inspect = "data_prep inspect --load-data {} --images {}"
    import_torch = "perturbjax import-torch --checkpoint {} --out {}"
    split = "perturbjax split --data {} --out {}"
    commands: dict[str, list[str]] = {
        "build --out .": [*build, "."],
        "build --out /": [*build, "/"],
        "build --out ''": [*build, ""],
        "build --overwrite over a user's file": [*build, str(own), "--overwrite", "--resize", "24"],
        "CSV is a FIFO": words(inspect, root / "fifo", material.plates),
        "CSV is a folder": words(inspect, root, material.plates),
        "predict to a device": [*predict, str(device)],
        "predict to a link to a device": [*predict, str(root / "device.csv")],
        "predict to a pipe": [*predict, str(root / "fifo.parquet")],
        "predict to a folder": [*predict, str(root / "folder.parquet")],
        "predict to standard output": [*predict, "/dev/stdout"],
        "dataset is a file": words(split, material.split, root / "s.parquet"),
        "run is a dataset": words("perturbjax evaluate --run {}", material.dataset),
        "weights are a FIFO": words(import_torch, root / "fifo", root / "o"),
    }
    for case, command in commands.items():
        result = server.run(Request(command, root))
        yield make_finding("special file", case, result).require(result.status == 2, "wrong result")
    is_unchanged = (
        device.is_char_device()
        and (root / "fifo.parquet").is_fifo()
        and (own / "notes.txt").is_file()
    )
    finding = make_finding("special file", "existing files unchanged", result)
    yield finding.require(is_unchanged, "wrong result")


def _make_device(root: Path) -> Path:
    """Return a device that may be overwritten: a new one if permitted, else a pseudo terminal."""
    device = root / "null.parquet"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return Path(os.ttyname(pty.openpty()[1]))
    return device

"""The storm of damaged files: every file a command reads, damaged in every way, one at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pandas as pd

from tests.faults.arena import Arena, Ended, Order
from tests.faults.material import BUILT, TRAINED, Material, read_plates
from tests.faults.mutations import BYTES, CSV, CSV_SAME, JSON, Mutation, well_formed
from tests.faults.outcomes import Finding, finding

Command = Callable[[Path], Sequence[object]]
#: Files a hostile one would leave behind if it ran.
MARKER = "executed"


@dataclass(frozen=True)
class Subject:
    """A command, the files it reads, and what it makes of them.

    Attributes:
        name: what the table calls it.
        source: makes the folder that is copied for each case.
        files: pattern of the files that are damaged, within it.
        command: from the copy to the command line.
        result: from the copy to what the command made, comparable; the undamaged copy's is the truth.
        mutations: by the file's suffix.
        may_differ: whether damaged bytes say something else and say it well.
        cost: about how many seconds a case takes.
    """

    name: str
    source: Callable[[], Path]
    files: str
    command: Command
    result: Callable[[Path, str], str]
    mutations: dict[str, Mutation]
    may_differ: Callable[[bytes], bool] = lambda _: False
    cost: float = 1.0


def subjects(made: Material) -> list[Subject]:
    """Every kind of file a user can hand to a command."""
    built = ("--out", "OUT", *BUILT)

    def inspect(folder: Path) -> Sequence[object]:
        return ("data_prep", "inspect", *read_plates(made, folder / "load_data.csv"))

    def build(folder: Path) -> Sequence[object]:
        return (
            "data_prep",
            "build",
            "--load-data",
            folder / "load_data.csv",
            "--images",
            folder,
            *built,
        )

    def build_csv(folder: Path) -> Sequence[object]:
        return ("data_prep", "build", *read_plates(made, folder / "load_data.csv"), *built)

    def split(folder: Path) -> Sequence[object]:
        return (
            "perturbjax",
            "split",
            "--data",
            folder,
            "--out",
            folder.parent / "OUT.parquet",
            "--folds",
            2,
        )

    def predict(run: Callable[[], Path] | None, data: Callable[[], Path] | None) -> Command:
        def command(folder: Path) -> Sequence[object]:
            read = ("--run", run() if run else folder, "--data", data() if data else folder)
            return ("perturbjax", "predict", *read, "--out", folder.parent / "OUT.parquet")

        return command

    def evaluate(folder: Path) -> Sequence[object]:
        return (
            "perturbjax",
            "evaluate",
            "--run",
            folder,
            "--data",
            made.dataset,
            "--replicates",
            50,
        )

    def train(folder: Path) -> Sequence[object]:
        flags = (
            "--data",
            made.dataset,
            "--out",
            folder.parent / "OUT",
            "--split-file",
            folder / "split.parquet",
        )
        return ("perturbjax", "train", *flags, *TRAINED)

    def described() -> Path:
        return _folder_of(
            made.root / "pth", made.weights, made.weights.with_name("weights.pth.json")
        )

    def classify_table(folder: Path) -> Sequence[object]:
        table = (
            "--features",
            folder / "features.parquet",
            "--models",
            "lda",
            "--folds",
            2,
            "--split",
            "well",
        )
        return (
            "perturbjax",
            "classify",
            *table,
            "--out",
            folder.parent / "OUT",
        )

    def import_torch(name: str) -> Command:
        return lambda folder: (
            *(
                "perturbjax",
                "import-torch",
                "--checkpoint",
                folder / name,
                "--out",
                folder.parent / "OUT",
            ),
        )

    def alone(name: str, file: Callable[[], Path]) -> Callable[[], Path]:
        return lambda: _folder_of(made.root / name, file())

    def dataset() -> Path:
        return made.dataset

    def run() -> Path:
        return made.run

    csv = alone("csv", lambda: made.plates / "load_data.csv")
    return [
        Subject("inspect, CSV", csv, "*.csv", inspect, stdout, CSV, well_formed, 0.3),
        Subject(
            "inspect, CSV otherwise written", csv, "*.csv", inspect, stdout, CSV_SAME, cost=0.3
        ),
        Subject("build, CSV", csv, "*.csv", build_csv, dataset_made, CSV, well_formed, 1),
        Subject(
            "build, TIFF",
            lambda: made.plates,
            "**/*.tif*",
            build,
            dataset_made,
            BYTES,
            lambda _: True,
            1,
        ),
        Subject("split, dataset", dataset, "*", split, table_made, JSON, cost=0.5),
        Subject("predict, dataset", dataset, "*", predict(run, None), table_made, JSON),
        Subject("predict, run", run, "**/*", predict(None, dataset), table_made, JSON, cost=2),
        Subject("evaluate, run", run, "**/*", evaluate, scores_made, JSON, cost=4),
        Subject(
            "train, split manifest",
            alone("manifests", lambda: made.split),
            "*",
            train,
            losses_made,
            BYTES,
        ),
        Subject(
            "classify, features",
            alone("tables", lambda: made.features),
            "*",
            classify_table,
            stdout,
            BYTES,
        ),
        Subject("import-torch, .pth", described, "*", import_torch("weights.pth"), run_made, JSON),
        Subject(
            "import-torch, .safetensors",
            alone("safetensors", lambda: made.safetensors),
            "*",
            import_torch("weights.safetensors"),
            run_made,
            JSON,
        ),
    ]


def _folder_of(folder: Path, *files: Path) -> Path:
    """Those files in a folder of their own; once, since others may be reading there."""
    if not folder.exists():
        folder.mkdir()
        for file in files:
            shutil.copy(file, folder)
    return folder


def stdout(folder: Path, said: str) -> str:
    """What the command printed, without its paths and times."""
    return "\n".join(
        line for line in said.splitlines() if "written" not in line and " in " not in line
    )


def run_made(folder: Path, said: str) -> str:
    """What the checkpoint of a run says of its arrays, recipe and labels; where they came from is another fact."""
    facts = json.loads(
        (folder.parent / "OUT" / "checkpoints" / "latest" / "0" / "facts" / "metadata").read_text()
    )
    return json.dumps([facts["arrays_sha256"], facts["recipe"], facts["classes"]])


def dataset_made(folder: Path, said: str) -> str:
    out = folder.parent / "work" / "OUT"
    index = pd.read_parquet(out / "index.parquet")
    shards = b"".join(path.read_bytes() for path in sorted(out.glob("*array_record*")))
    return _digest(index.to_csv().encode() + shards)


def table_made(folder: Path, said: str) -> str:
    return _digest(pd.read_parquet(folder.parent / "OUT.parquet").to_csv().encode())


def scores_made(folder: Path, said: str) -> str:
    return _digest((folder / "evaluation" / "scores.json").read_bytes())


def losses_made(folder: Path, said: str) -> str:
    rows = [
        json.loads(line)
        for line in (folder.parent / "OUT" / "metrics.jsonl").read_text().splitlines()
    ]
    return json.dumps([(row["epoch"], row["split"], row["loss"]) for row in rows])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def storm(arena: Arena, subject: Subject, root: Path, count: int, seed: int) -> Iterator[Finding]:
    """`count` cases of a subject, the mutations and files in turn; the same for the same seed."""
    random = Random(f"{subject.name} {seed}")
    ended, truth = _case(arena, subject, root, None)
    assert truth is not None, f"{subject.name}: fails on what is whole: {ended.stderr}"
    source = subject.source()
    files = sorted(
        path.relative_to(source) for path in source.glob(subject.files) if path.is_file()
    )
    names = list(subject.mutations)
    for number in range(count):
        file, name = random.choice(files), names[number % len(names)]
        damaged = subject.mutations[name]((source / file).read_bytes(), random)
        if damaged is None:
            continue
        yield _judged(arena, subject, root, file, name, damaged, truth)


def _judged(
    arena: Arena, subject: Subject, root: Path, file: Path, name: str, damaged: bytes, truth: str
) -> Finding:
    ended, result = _case(arena, subject, root, (file, damaged))
    same = result == truth or subject.may_differ(damaged)
    executed = (root / "work" / MARKER).exists()
    return finding(subject.name, name, ended, file=str(file), same=same, executed=executed)


def _case(
    arena: Arena, subject: Subject, root: Path, change: tuple[Path, bytes] | None
) -> tuple[Ended, str | None]:
    """Copy, damage, run; what the command said, and its result where it ended well."""
    folder, work = root / "copy", root / "work"
    for path in (folder, work, root / "OUT"):
        shutil.rmtree(path, ignore_errors=True)
    (root / "OUT.parquet").unlink(missing_ok=True)
    shutil.copytree(subject.source(), folder)
    work.mkdir()
    if change is not None:
        (folder / change[0]).write_bytes(change[1])
    ended = arena.run(Order(subject.command(folder), work))
    return ended, subject.result(folder, ended.stdout + ended.stderr) if ended.status == 0 else None

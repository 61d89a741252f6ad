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

from tests.storms.arena import Arena, Order, Outcome, classify
from tests.storms.material import BUILT, TRAINED, Material
from tests.storms.mutations import BYTES, CSV, CSV_SAME, JSON, Mutation, well_formed

Command = Callable[[Path], Sequence[object]]
#: Files a hostile one would leave behind if it ran.
MARKER = "executed"


@dataclass(frozen=True)
class Subject:
    """A command, the files it reads, and what it makes of them.

    Attributes:
        name: what the table calls it.
        source: folder that is copied for each case.
        files: pattern of the files that are damaged, within it.
        command: from the copy to the command line.
        result: from the copy to what the command made, comparable; the undamaged copy's is the truth.
        mutations: by the file's suffix.
        may_differ: whether damaged bytes say something else and say it well.
        cost: about how many seconds a case takes.
    """

    name: str
    source: Path
    files: str
    command: Command
    result: Callable[[Path, str], str]
    mutations: dict[str, Mutation]
    may_differ: Callable[[bytes], bool] = lambda _: False
    cost: float = 1.0


@dataclass(frozen=True)
class Finding:
    """One case, and how it ended."""

    subject: str
    mutation: str
    file: str
    outcome: Outcome
    said: str


def subjects(made: Material) -> list[Subject]:
    """Every kind of file a user can hand to a command."""
    plates, built = ("--images", made.plates), ("--out", "OUT", *BUILT)

    def inspect(folder: Path) -> Sequence[object]:
        return ("data_prep", "inspect", "--load-data", folder / "load_data.csv", *plates)

    def build(folder: Path) -> Sequence[object]:
        return ("data_prep", "build", "--load-data", folder / "load_data.csv", "--images", folder, *built)

    def build_csv(folder: Path) -> Sequence[object]:
        return ("data_prep", "build", "--load-data", folder / "load_data.csv", *plates, *built)

    def split(folder: Path) -> Sequence[object]:
        return ("perturbjax", "split", "--data", folder, "--out", folder.parent / "OUT.parquet", "--folds", 2)

    def predict(run: Path | None, data: Path | None) -> Command:
        def command(folder: Path) -> Sequence[object]:
            out = folder.parent / "OUT.parquet"
            return ("perturbjax", "predict", "--run", run or folder, "--data", data or folder, "--out", out)

        return command

    def evaluate(folder: Path) -> Sequence[object]:
        return ("perturbjax", "evaluate", "--run", folder, "--data", made.dataset, "--replicates", 50)

    def train(folder: Path) -> Sequence[object]:
        out = folder.parent / "OUT"
        return (
            "perturbjax",
            "train",
            "--data",
            made.dataset,
            "--out",
            out,
            *TRAINED,
            "--split-file",
            folder / "s.parquet",
        )

    def classify_table(folder: Path) -> Sequence[object]:
        table = ("--features", folder / "features.parquet", "--models", "lda", "--folds", 2, "--split", "well")
        return ("perturbjax", "classify", *table, "--out", folder.parent / "OUT", "--replicates", 50)

    def import_torch(name: str) -> Command:
        return lambda folder: (
            *("perturbjax", "import-torch", "--checkpoint", folder / name, "--out", folder.parent / "OUT"),
            *("--model", "attention", "--preset", "original"),
        )

    csvs, images = made.plates.parent / "csv", made.plates
    _folder_of(csvs, made.plates / "load_data.csv")
    manifests = _folder_of(made.plates.parent / "manifests", made.split, "s.parquet")
    tables = _folder_of(made.plates.parent / "tables", made.features)
    pth = _folder_of(made.plates.parent / "pth", made.weights)
    safe = _folder_of(made.plates.parent / "safetensors", made.safetensors)
    return [
        Subject("inspect, CSV", csvs, "*.csv", inspect, stdout, CSV, well_formed, 0.3),
        Subject("inspect, CSV otherwise written", csvs, "*.csv", inspect, stdout, CSV_SAME, cost=0.3),
        Subject("build, CSV", csvs, "*.csv", build_csv, dataset_made, CSV, well_formed, 4),
        Subject("build, TIFF", images, "**/*.tif*", build, dataset_made, BYTES, lambda _: True, 4),
        Subject("split, dataset", made.dataset, "*", split, table_made, JSON, cost=0.5),
        Subject("predict, dataset", made.dataset, "*", predict(made.run, None), table_made, JSON, cost=2),
        Subject("predict, run", made.run, "**/*", predict(None, made.dataset), table_made, JSON, cost=2),
        Subject("evaluate, run", made.run, "**/*", evaluate, scores_made, JSON, cost=4),
        Subject("train, split manifest", manifests, "*.parquet", train, losses_made, BYTES, cost=5),
        Subject("classify, features", tables, "*.parquet", classify_table, stdout, BYTES, cost=1.5),
        Subject("import-torch, .pth", pth, "*.pth", import_torch(made.weights.name), ending, BYTES, cost=1),
        Subject("import-torch, .safetensors", safe, "*", import_torch(made.safetensors.name), ending, BYTES, cost=1),
    ]


def _folder_of(folder: Path, file: Path, name: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(file, folder / (name or file.name))
    return folder


def stdout(folder: Path, said: str) -> str:
    """What the command printed, without its paths and times."""
    return "\n".join(line for line in said.splitlines() if "written" not in line and " in " not in line)


def ending(folder: Path, said: str) -> str:
    """That it succeeded: what it made is held to its checksums by the command itself."""
    return "done"


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
    rows = [json.loads(line) for line in (folder.parent / "OUT" / "metrics.jsonl").read_text().splitlines()]
    return json.dumps([(row["epoch"], row["split"], row["loss"]) for row in rows])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def storm(arena: Arena, subject: Subject, root: Path, count: int, seed: int) -> Iterator[Finding]:
    """`count` cases of a subject, the mutations and files in turn; the same for the same seed."""
    random = Random(f"{subject.name} {seed}")
    truth = _case(arena, subject, root, None)[1]
    assert truth is not None, f"{subject.name}: fails on what is whole"
    files = sorted(path.relative_to(subject.source) for path in subject.source.glob(subject.files) if path.is_file())
    names = list(subject.mutations)
    for number in range(count):
        file, name = random.choice(files), names[number % len(names)]
        damaged = subject.mutations[name]((subject.source / file).read_bytes(), random)
        if damaged is None:
            continue
        yield _judged(arena, subject, root, file, name, damaged, truth)


def _judged(arena: Arena, subject: Subject, root: Path, file: Path, name: str, damaged: bytes, truth: str) -> Finding:
    ended, result = _case(arena, subject, root, (file, damaged))
    outcome = classify(
        ended, same=result == truth, may_differ=subject.may_differ(damaged), marker=root / "work" / MARKER
    )
    said = (ended.errors or ended.stderr.strip().splitlines() or [""])[-1]
    return Finding(subject.name, name, str(file), outcome, said)


def _case(arena: Arena, subject: Subject, root: Path, change: tuple[Path, bytes] | None):
    """Copy, damage, run; what the command said, and its result where it ended well."""
    folder, work = root / "copy", root / "work"
    for path in (folder, work, root / "OUT"):
        shutil.rmtree(path, ignore_errors=True)
    (root / "OUT.parquet").unlink(missing_ok=True)
    shutil.copytree(subject.source, folder)
    work.mkdir()
    if change is not None:
        (folder / change[0]).write_bytes(change[1])
    ended = arena.run(Order(subject.command(folder), work))
    return ended, subject.result(folder, ended.stdout + ended.stderr) if ended.status == 0 else None

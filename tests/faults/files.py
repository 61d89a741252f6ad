"""Damage input files: commands must compute the result of the intact file, or refuse."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pandas as pd

from tests.faults.arena import MARKER, CommandServer, Request, Result, words
from tests.faults.images import FORMATS, HALF_WRITTEN, build_flags, write_plate
from tests.faults.material import BUILT, TRAINED, VALIDATED, Material, plate_flags
from tests.faults.mutations import BYTES, CSV, CSV_SAME, JSON, TABLE, Mutation, is_valid_csv
from tests.faults.outcomes import Finding, make_finding

Command = Callable[[Path], Sequence[str]]


@dataclass(frozen=True)
class DamageSuite:
    """A command, the files it reads, and its result.

    Attributes:
        name: Name in the summary.
        source: Returns the folder that is copied for each case.
        files: Glob pattern of the files to damage.
        command: Copied folder → command line.
        result: Copied folder and printed text → result; compared with that of the intact files.
        mutations: Kinds of damage.
        may_differ: Returns True if damaged bytes are another valid input.
        cost: Approximate seconds per case.
    """

    name: str
    source: Callable[[], Path]
    files: str
    command: Command
    result: Callable[[Path, str], str]
    mutations: dict[str, Mutation]
    may_differ: Callable[[bytes], bool] = lambda _: False
    cost: float = 1.0


def damage_suites(material: Material) -> list[DamageSuite]:
    """Return one suite for every kind of file that a user can pass to a command."""

    def inspect(folder: Path) -> list[str]:
        return ["data_prep", "inspect", *plate_flags(material, folder / "load_data.csv")]

    def build_table(folder: Path) -> list[str]:
        flags = plate_flags(material, folder / "load_data.csv")
        return [*words(f"data_prep build --out OUT {BUILT}"), *flags]

    def build_images(folder: Path) -> list[str]:
        command = f"data_prep build --load-data {{}} --images {{}} --out OUT {BUILT}"
        return words(command, folder / "load_data.csv", folder)

    def split(folder: Path) -> list[str]:
        out = folder.parent / "OUT.parquet"
        return words("perturbjax split --data {} --out {} --folds 2", folder, out)

    def predict(folder: Path, run: Path, data: Path) -> list[str]:
        command = "perturbjax predict --run {} --data {} --out {}"
        return words(command, run, data, folder.parent / "OUT.parquet")

    def evaluate(folder: Path) -> list[str]:
        command = "perturbjax evaluate --run {} --data {} --replicates 50"
        return words(command, folder, material.dataset)

    def train(folder: Path) -> list[str]:
        command = f"perturbjax train --data {{}} --out {{}} --split-file {{}} {TRAINED}"
        return words(command, material.dataset, folder.parent / "OUT", folder / "split.parquet")

    def predict_best(folder: Path) -> list[str]:
        return [*predict(folder, folder, material.dataset), "--checkpoint", "best"]

    def export_best(folder: Path) -> list[str]:
        flags = "perturbjax export --run {} --checkpoint best --out {}"
        return words(flags, folder, folder.parent / "OUT")

    def resume(folder: Path) -> list[str]:
        return words(
            f"perturbjax train --data {{}} --out {{}} {VALIDATED}", material.dataset, folder
        )

    def classify(folder: Path) -> list[str]:
        command = "perturbjax classify --features {} --models lda --folds 2 --split well --out {}"
        return words(command, folder / "features.parquet", folder.parent / "OUT")

    def import_torch(name: str) -> Command:
        command = "perturbjax import-torch --checkpoint {} --out {}"
        return lambda folder: words(command, folder / name, folder.parent / "OUT")

    def copies(name: str, *files: Callable[[], Path]) -> Callable[[], Path]:
        return lambda: _copy_files(material.root / name, *(file() for file in files))

    def dataset() -> Path:
        return material.dataset

    def run() -> Path:
        return material.run

    def validated() -> Path:
        return material.validated_run

    csv = copies("csv", lambda: material.plates / "load_data.csv")
    split_file = copies("manifests", lambda: material.split)
    features = copies("tables", lambda: material.features)
    safetensors = copies("safetensors", lambda: material.safetensors)
    pth = copies(
        "pth", lambda: material.weights, lambda: material.weights.with_name("weights.pth.json")
    )
    make = DamageSuite
    return [
        make("inspect, CSV", csv, "*.csv", inspect, printed_result, CSV, is_valid_csv, 0.3),
        make(
            "inspect, CSV in other formats",
            csv,
            "*.csv",
            inspect,
            printed_result,
            CSV_SAME,
            cost=0.3,
        ),
        make("build, CSV", csv, "*.csv", build_table, dataset_result, CSV, is_valid_csv),
        make(
            "build, TIFF",
            lambda: material.plates,
            "**/*.tif*",
            build_images,
            dataset_result,
            BYTES,
            lambda _: True,
        ),
        make("split, dataset", dataset, "*", split, table_result, JSON, cost=0.5),
        make(
            "predict, dataset",
            dataset,
            "*",
            lambda f: predict(f, material.run, f),
            table_result,
            JSON,
        ),
        make(
            "predict, run",
            run,
            "**/*",
            lambda f: predict(f, f, material.dataset),
            table_result,
            JSON,
            cost=2,
        ),
        make("evaluate, run", run, "**/*", evaluate, score_result, JSON, cost=4),
        make(
            "report, evaluation",
            run,
            "evaluation/*[!g]",
            lambda f: words("perturbjax report {}", f),
            nothing,
            {**JSON, **TABLE},
            lambda _: True,
            cost=2,
        ),
        *(
            make(f"{name}, checkpoint", validated, "checkpoints/**/*", command, result, JSON)
            for name, command, result in (
                ("verify", lambda f: words("perturbjax verify {}", f), nothing),
                ("predict", predict_best, table_result),
                ("export", export_best, nothing),
                ("train", resume, resumed_result),
            )
        ),
        *(
            make(
                f"{group}, {name}",
                functools.partial(write_plate, material, name),
                f"{FORMATS[name].folder}/**/*",
                lambda f: build_flags(f, f.parent / "work" / "OUT"),
                dataset_result,
                mutations,
                may_differ,
            )
            for name in FORMATS
            # Changed bytes of pixels are not always detectable; missing parts are.
            for group, mutations, may_differ in (
                ("build", BYTES, lambda _: True),
                ("half-written", HALF_WRITTEN, lambda _: False),
            )
        ),
        make("train, split manifest", split_file, "*", train, loss_result, BYTES),
        make("classify, features", features, "*", classify, printed_result, BYTES),
        make("import-torch, .pth", pth, "*", import_torch("weights.pth"), run_result, JSON),
        make(
            "import-torch, .safetensors",
            safetensors,
            "*",
            import_torch("weights.safetensors"),
            run_result,
            JSON,
        ),
    ]


def _copy_files(folder: Path, *files: Path) -> Path:
    """Copy files into a folder, once: other threads may already read there."""
    if not folder.exists():
        folder.mkdir()
        for file in files:
            shutil.copy(file, folder)
    return folder


def printed_result(folder: Path, printed: str) -> str:
    """Printed text without paths of outputs and durations."""
    return "\n".join(
        line for line in printed.splitlines() if "written" not in line and " in " not in line
    )


def run_result(folder: Path, printed: str) -> str:
    """Arrays, recipe and classes of an imported run, without the origin of the weights."""
    facts = folder.parent / "OUT" / "checkpoints" / "latest" / "0" / "facts" / "metadata"
    metadata = json.loads(facts.read_text())
    return json.dumps([metadata["arrays_sha256"], metadata["recipe"], metadata["classes"]])


def dataset_result(folder: Path, printed: str) -> str:
    out = folder.parent / "work" / "OUT"
    index = pd.read_parquet(out / "index.parquet")
    shards = b"".join(path.read_bytes() for path in sorted(out.glob("*array_record*")))
    return _sha256(index.to_csv().encode() + shards)


def table_result(folder: Path, printed: str) -> str:
    return _sha256(pd.read_parquet(folder.parent / "OUT.parquet").to_csv().encode())


def nothing(folder: Path, printed: str) -> str:
    """No result to compare: damaged files can be another valid input, or are not used."""
    return ""


def resumed_result(folder: Path, printed: str) -> str:
    return (folder / "metrics.jsonl").read_text()


def score_result(folder: Path, printed: str) -> str:
    return _sha256((folder / "evaluation" / "scores.json").read_bytes())


def loss_result(folder: Path, printed: str) -> str:
    lines = (folder.parent / "OUT" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return json.dumps([(row["epoch"], row["split"], row["loss"]) for row in rows])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def run_damage_cases(
    server: CommandServer, suite: DamageSuite, root: Path, count: int, seed: int
) -> Iterator[Finding]:
    """Run `count` cases: each mutation in turn, on random files; reproducible for a given seed."""
    random = Random(f"{suite.name} {seed}")
    result, expected = _run_case(server, suite, root, None)
    assert expected is not None, f"{suite.name}: fails on intact files: {result.stderr}"
    source = suite.source()
    files = sorted(path.relative_to(source) for path in source.glob(suite.files) if path.is_file())
    names = list(suite.mutations)
    for number in range(count):
        file, name = random.choice(files), names[number % len(names)]
        damaged = suite.mutations[name]((source / file).read_bytes(), random)
        if damaged is None:
            continue
        result, actual = _run_case(server, suite, root, (file, damaged))
        yield make_finding(
            suite.name,
            name,
            result,
            file=str(file),
            correct=actual == expected or suite.may_differ(damaged),
            executed=(root / "work" / MARKER).exists(),
        )


def _run_case(
    server: CommandServer, suite: DamageSuite, root: Path, change: tuple[Path, bytes] | None
) -> tuple[Result, str | None]:
    """Copy the source, damage a file, run the command; the result is None if the command fails."""
    folder, work = root / "copy", root / "work"
    for path in (folder, work, root / "OUT"):
        shutil.rmtree(path, ignore_errors=True)
    (root / "OUT.parquet").unlink(missing_ok=True)
    shutil.copytree(suite.source(), folder)
    work.mkdir()
    if change is not None:
        (folder / change[0]).write_bytes(change[1])
    result = server.run(Request(suite.command(folder), work))
    if result.status:
        return result, None
    return result, suite.result(folder, result.stdout + result.stderr)

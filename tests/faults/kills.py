"""Kill commands at random times; after a restart, the result must equal an undisturbed run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from perturbjax.core.files import file_digest
from tests.faults.arena import CommandServer, Request, words
from tests.faults.files import (
    Command,
    dataset_result,
    loss_result,
    printed_result,
    run_result,
    score_result,
    table_result,
)
from tests.faults.material import BUILT, SIMULATED, TRAINED, Material, plate_flags
from tests.faults.outcomes import Finding, make_finding

#: Number of kills of one output before it may finish, and latest kill as a fraction of the duration
#: of an undisturbed run (a resumed run is shorter).
KILLS_PER_OUTPUT, LATEST = 4, 0.9
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


@dataclass(frozen=True)
class KillSuite:
    """A command that writes an output.

    Attributes:
        name: Name in the summary.
        prepare: Writes the input into the folder of the case.
        command: Folder of the case → command line.
        result: As in `files.DamageSuite`.
    """

    name: str
    prepare: Callable[[Path], None]
    command: Command
    result: Callable[[Path, str], str]


def kill_suites(material: Material) -> list[KillSuite]:
    """Return one suite for every command that writes an output."""

    def copy_run(folder: Path) -> None:
        shutil.copytree(material.run, folder)

    def out(folder: Path) -> Path:
        return folder.parent / "OUT"

    def table(folder: Path) -> Path:
        return folder.parent / "OUT.parquet"

    classify = "classify --features {} --models lda --folds 2 --split well --out {}"
    commands: dict[str, tuple[Callable[[Path, str], str], Command]] = {
        "simulate": (
            simulation_result,
            lambda f: words(f"data_prep simulate --out {{}} {SIMULATED}", out(f)),
        ),
        "build": (
            dataset_result,
            lambda f: [*words(f"data_prep build --out OUT {BUILT}"), *plate_flags(material)],
        ),
        "train": (
            loss_result,
            lambda f: words(
                f"perturbjax train --data {{}} --out {{}} {TRAINED} --checkpoint-every 1",
                material.dataset,
                out(f),
            ),
        ),
        "evaluate": (
            score_result,
            lambda f: words(
                "perturbjax evaluate --run {} --data {} --replicates 50", f, material.dataset
            ),
        ),
        "predict": (
            table_result,
            lambda f: words(
                "perturbjax predict --run {} --data {} --out {}",
                material.run,
                material.dataset,
                table(f),
            ),
        ),
        "features": (
            table_result,
            lambda f: words(
                "perturbjax features --run {} --data {} --out {} --batch-size 1",
                material.run,
                material.dataset,
                table(f),
            ),
        ),
        "classify": (
            printed_result,
            lambda f: words(f"perturbjax {classify}", material.features, out(f)),
        ),
        "split": (
            table_result,
            lambda f: words(
                "perturbjax split --data {} --out {} --folds 2", material.dataset, table(f)
            ),
        ),
        "export-torch": (
            weights_result,
            lambda f: words(
                "perturbjax export-torch --run {} --out {}", material.run, f"{out(f)}.pth"
            ),
        ),
        "import-torch": (
            run_result,
            lambda f: words(
                "perturbjax import-torch --checkpoint {} --out {}", material.safetensors, out(f)
            ),
        ),
    }
    return [
        KillSuite(
            f"{name}, killed", copy_run if name == "evaluate" else Path.mkdir, command, result
        )
        for name, (result, command) in commands.items()
    ]


def simulation_result(folder: Path, printed: str) -> str:
    """Checksums of all simulated files."""
    files = sorted(path for path in (folder.parent / "OUT").rglob("*") if path.is_file())
    return json.dumps({path.name: file_digest(path) for path in files})


def weights_result(folder: Path, printed: str) -> str:
    return file_digest(folder.parent / "OUT.pth") + file_digest(folder.parent / "OUT.pth.json")


def run_kill_cases(
    server: CommandServer, suite: KillSuite, root: Path, count: int, seed: int
) -> Iterator[Finding]:
    """Kill a command `count` times, `KILLS_PER_OUTPUT` times per output, then let it finish.

    The last start of each output must yield the result of an undisturbed run.
    """
    random = Random(f"{suite.name} {seed}")
    folder, work = _prepare(suite, root)
    undisturbed = server.run(Request(suite.command(folder), work))
    assert undisturbed.status == 0, f"{suite.name}: {undisturbed.stderr}"
    expected = suite.result(folder, undisturbed.stdout + undisturbed.stderr)
    remaining = count
    while remaining > 0:
        folder, work = _prepare(suite, root)
        for _ in range(min(KILLS_PER_OUTPUT, remaining)):
            name = random.choice(list(SIGNALS))
            after = random.uniform(0, LATEST * undisturbed.seconds)
            result = server.run(
                Request(suite.command(folder), work, signal=SIGNALS[name], signal_after_s=after)
            )
            if result.status == 0:  # finished before the signal
                break
            remaining -= 1
            yield make_finding(suite.name, name, result)
        result = server.run(Request(suite.command(folder), work))
        is_done = result.status == 0
        correct = is_done and suite.result(folder, result.stdout + result.stderr) == expected
        # Resuming must not require manual work, so a one-line error is a failure here.
        finding = make_finding(suite.name, "restarted", result, correct=correct)
        yield finding.require(is_done, "traceback")


def _prepare(suite: KillSuite, root: Path) -> tuple[Path, Path]:
    folder, work = root / "copy", root / "work"
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    suite.prepare(folder)
    work.mkdir()
    return folder, work

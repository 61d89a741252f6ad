"""The storm of kills: a command ended at random instants and started again makes what it would have made at once."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.storms.arena import Arena, Order, classify
from tests.storms.files import Finding, dataset_made, losses_made, scores_made, stdout, table_made
from tests.storms.material import BUILT, SIMULATED, TRAINED, Material

#: Kills of one output before it is let finish.
IN_A_ROW = 4
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


@dataclass(frozen=True)
class Target:
    """A command that writes, and what it makes.

    Attributes:
        prepare: puts what it needs into the case's folder.
        command: from that folder to the command line.
        result: as in `files.Subject`.
    """

    name: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], Sequence[object]]
    result: Callable[[Path, str], str]


def targets(made: Material) -> list[Target]:
    """Every command that writes."""
    plates = ("--load-data", made.plates / "load_data.csv", "--images", made.plates)

    def nothing(folder: Path) -> None:
        folder.mkdir()

    def run_copied(folder: Path) -> None:
        shutil.copytree(made.run, folder)

    return [
        Target(
            "build, killed", nothing, lambda f: ("data_prep", "build", *plates, "--out", "OUT", *BUILT), dataset_made
        ),
        Target(
            "train, killed",
            nothing,
            lambda f: (
                *("perturbjax", "train", "--data", made.dataset, "--out", f.parent / "OUT", *TRAINED),
                *("--checkpoint-every", 1),
            ),
            losses_made,
        ),
        Target(
            "evaluate, killed",
            run_copied,
            lambda f: ("perturbjax", "evaluate", "--run", f, "--data", made.dataset, "--replicates", 50),
            scores_made,
        ),
        Target(
            "predict, killed",
            nothing,
            lambda f: (
                *("perturbjax", "predict", "--run", made.run, "--data", made.dataset),
                *("--out", f.parent / "OUT.parquet"),
            ),
            table_made,
        ),
        Target(
            "classify, killed",
            nothing,
            lambda f: (
                *("perturbjax", "classify", "--features", made.features, "--models", "lda", "--folds", 2),
                *("--split", "well", "--out", f.parent / "OUT", "--replicates", 50),
            ),
            stdout,
        ),
        Target(
            "simulate, killed",
            nothing,
            lambda f: ("data_prep", "simulate", "--out", f.parent / "OUT", *SIMULATED),
            lambda f, _: (f.parent / "OUT" / "load_data.csv").read_text(),
        ),
        Target(
            "import-torch, killed",
            nothing,
            lambda f: ("perturbjax", "import-torch", "--checkpoint", made.safetensors, "--out", f.parent / "OUT"),
            lambda f, _: (f.parent / "OUT" / "labels.json").read_text(),
        ),
    ]


def storm(arena: Arena, target: Target, root: Path, count: int, seed: int) -> Iterator[Finding]:
    """`count` kills, `IN_A_ROW` to one output; each row ends with a start that must finish as if undisturbed."""
    random = Random(f"{target.name} {seed}")
    folder, work = _fresh(target, root)
    whole = arena.run(Order(target.command(folder), work))
    assert whole.status == 0, f"{target.name}: {whole.stderr}"
    truth = target.result(folder, whole.stdout + whole.stderr)
    for _ in range(-(-count // IN_A_ROW)):
        folder, work = _fresh(target, root)
        for _ in range(IN_A_ROW):
            name = random.choice(list(SIGNALS))
            after = random.uniform(0, whole.seconds)
            ended = arena.run(Order(target.command(folder), work, signal=SIGNALS[name], signal_after_s=after))
            if ended.status == 0:  # it was quicker than the signal
                break
            yield _finding(target, name, ended, same=False, root=root)
        ended = arena.run(Order(target.command(folder), work))
        same = ended.status == 0 and target.result(folder, ended.stdout + ended.stderr) == truth
        yield _finding(target, "started again", ended, same=same, root=root)


def _fresh(target: Target, root: Path) -> tuple[Path, Path]:
    folder, work = root / "copy", root / "work"
    for path in (folder, work, root / "OUT", *root.glob(".OUT*")):
        shutil.rmtree(path, ignore_errors=True)
    (root / "OUT.parquet").unlink(missing_ok=True)
    target.prepare(folder)
    work.mkdir()
    return folder, work


def _finding(target: Target, name: str, ended, *, same: bool, root: Path) -> Finding:
    outcome = classify(ended, same=same, may_differ=False, marker=root / "executed")
    if name == "started again" and outcome != "right":
        outcome = "traceback" if outcome == "one line" else outcome  # going on must not need a person
    return Finding(target.name, name, "", outcome, (ended.stderr.strip().splitlines() or [""])[-1])

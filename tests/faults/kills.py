"""The storm of kills: a command ended at random instants and started again makes what it would have made at once."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from perturbjax.core.files import file_digest
from tests.faults.arena import Arena, Order
from tests.faults.files import (
    Command,
    dataset_made,
    losses_made,
    run_made,
    scores_made,
    stdout,
    table_made,
)
from tests.faults.material import BUILT, SIMULATED, TRAINED, Material, read_plates
from tests.faults.outcomes import Finding, finding

#: Kills of one output before it is let finish, and the last share of an undisturbed run in which they come: what is
#: gone on with takes less than that.
IN_A_ROW, LATEST = 4, 0.9
Prepare = Callable[[Path], None]
Result = Callable[[Path, str], str]
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
    prepare: Prepare
    command: Command
    result: Result


def targets(made: Material) -> list[Target]:
    """Every command that writes."""

    def nothing(folder: Path) -> None:
        folder.mkdir()

    def run_copied(folder: Path) -> None:
        shutil.copytree(made.run, folder)

    def perturbjax(
        name: str, result: Result, command: Command, prepare: Prepare = nothing
    ) -> Target:
        return Target(
            f"{name}, killed",
            prepare,
            lambda folder: ("perturbjax", name, *command(folder)),
            result,
        )

    def data_prep(name: str, result: Result, command: Command) -> Target:
        return Target(
            f"{name}, killed", nothing, lambda folder: ("data_prep", name, *command(folder)), result
        )

    def out(folder: Path) -> Path:
        return folder.parent / "OUT"

    def table(folder: Path) -> Path:
        return folder.parent / "OUT.parquet"

    def data() -> Sequence[object]:
        return ("--data", made.dataset)

    def build(
        folder: Path,
    ) -> Sequence[object]:  # the cache of masks would finish what a killed build began
        return (*read_plates(made), "--out", "OUT", *BUILT)

    def profiles(folder: Path) -> Sequence[object]:
        dealt = ("--folds", 2, "--split", "well")
        return ("--features", made.features, "--models", "lda", *dealt, "--out", out(folder))

    return [
        data_prep("simulate", drawn, lambda f: ("--out", out(f), *SIMULATED)),
        data_prep(
            "build",
            dataset_made,
            lambda f: (*read_plates(made), "--out", "OUT", *BUILT),
        ),
        perturbjax(
            "train",
            losses_made,
            lambda f: (*data(), "--out", out(f), *TRAINED, "--checkpoint-every", 1),
        ),
        perturbjax(
            "evaluate", scores_made, lambda f: ("--run", f, *data(), "--replicates", 50), run_copied
        ),
        perturbjax(
            "predict", table_made, lambda f: ("--run", made.run, *data(), "--out", table(f))
        ),
        perturbjax(
            "features",
            table_made,
            lambda f: ("--run", made.run, *data(), "--out", table(f), "--batch-size", 1),
        ),
        perturbjax("classify", stdout, profiles),
        perturbjax("split", table_made, lambda f: (*data(), "--out", table(f), "--folds", 2)),
        perturbjax(
            "export-torch",
            weights_made,
            lambda f: ("--run", made.run, "--out", out(f).with_suffix(".pth")),
        ),
        perturbjax(
            "import-torch", run_made, lambda f: ("--checkpoint", made.safetensors, "--out", out(f))
        ),
    ]


def drawn(folder: Path, said: str) -> str:
    """The bytes of all simulated files."""
    files = sorted(path for path in (folder.parent / "OUT").rglob("*") if path.is_file())
    return json.dumps({path.name: file_digest(path) for path in files})


def weights_made(folder: Path, said: str) -> str:
    return file_digest(folder.parent / "OUT.pth") + file_digest(folder.parent / "OUT.pth.json")


def storm(arena: Arena, target: Target, root: Path, count: int, seed: int) -> Iterator[Finding]:
    """`count` kills, `IN_A_ROW` to one output; each row ends with a start that must finish as if undisturbed."""
    random = Random(f"{target.name} {seed}")
    folder, work = _fresh(target, root)
    whole = arena.run(Order(target.command(folder), work))
    assert whole.status == 0, f"{target.name}: {whole.stderr}"
    truth = target.result(folder, whole.stdout + whole.stderr)
    left = count
    while left > 0:
        folder, work = _fresh(target, root)
        for _ in range(min(IN_A_ROW, left)):
            name = random.choice(list(SIGNALS))
            after = random.uniform(0, LATEST * whole.seconds)
            ended = arena.run(
                Order(target.command(folder), work, signal=SIGNALS[name], signal_after_s=after)
            )
            if ended.status == 0:  # it was quicker than the signal
                break
            left -= 1
            yield finding(target.name, name, ended)
        ended = arena.run(Order(target.command(folder), work))
        same = ended.status == 0 and target.result(folder, ended.stdout + ended.stderr) == truth
        # Going on must not need a person: a refusal, however well said, is a finding here.
        yield finding(target.name, "started again", ended, same=same).unless(
            ended.status == 0, "traceback"
        )


def _fresh(target: Target, root: Path) -> tuple[Path, Path]:
    folder, work = root / "copy", root / "work"
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    target.prepare(folder)
    work.mkdir()
    return folder, work

"""Checking everything that a directory of ours holds against what its digests say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.core.options import positional, require_sound


@dataclass(frozen=True)
class VerifyConfig:
    """Verify checksums."""

    path: Path = positional()
    """Dataset or run directory."""

    def __post_init__(self) -> None:
        require_sound(self)


def verify_dataset(path: Path) -> str:
    """Every file of a dataset against its digest, every record against its row of the index; what was checked.

    Raises:
        InputError: something differs; the message names the file or the record.
    """
    from perturbjax.dataset.checksums import verify_dataset

    return verify_dataset(path)


def verify_run(path: Path) -> str:
    """Every checkpoint of a run against its digest, and the run's files against each of them; what was checked.

    Raises:
        InputError: something differs; the message names the file.
    """
    from perturbjax.training.checkpoint import Checkpoints
    from perturbjax.training.run_directory import open_run

    run, checkpoints = open_run(path), Checkpoints(path)
    checked = 0
    for which in ("latest", "best"):
        for epoch in checkpoints.epochs(which):
            _, facts = checkpoints.load(which, epoch)
            run.require_matching_files(facts, checkpoints.path / which / str(epoch))
            checked += 1
    checkpoints.close()
    if not checked:
        raise InputError(f"{path}: holds no checkpoint yet; train first")
    return f"{checked} checkpoints, recipe, labels and split are as they were written"


#: The file that tells a kind of directory → what checks it, and says in a sentence what it found.
KINDS: dict[str, Callable[[Path], str]] = {
    "provenance.json": verify_dataset,
    "config.json": verify_run,
}


def verify(path: Path) -> str:
    """Check a directory of any kind.

    Raises:
        InputError: it is none of ours, or something in it is not what was written.
    """
    path = Path(path)
    for marker, check in KINDS.items():
        if (path / marker).is_file():
            return check(path)
    raise InputError(f"{path}: holds none of {', '.join(KINDS)}; nothing there can be verified")

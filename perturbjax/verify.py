"""Verification of dataset and run directories against their stored checksums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.core.files import describe_path
from perturbjax.core.options import positional, require_sound


@dataclass(frozen=True)
class VerifyConfig:
    """Verify checksums"""

    path: Path = positional()
    """Dataset or run directory."""

    def __post_init__(self) -> None:
        require_sound(self)


def verify_dataset(path: Path) -> str:
    """Verify the checksum of every file of a dataset, and every record against its row of the
    index.

    Returns:
        One sentence about the checked files.

    Raises:
        InputError: a file or record differs; the message names it.
    """
    from perturbjax.dataset.checksums import verify_dataset

    return verify_dataset(path)


def verify_run(path: Path) -> str:
    """Verify the checksum of every checkpoint of a run, and recipe, labels and split against each
    of them.

    Returns:
        One sentence about the checked files.

    Raises:
        InputError: a file differs, or there is no checkpoint; the message names the file.
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
        raise InputError(f"{path}: contains no checkpoint yet. Train the run first.")
    return f"{checked} checkpoints, recipe, labels and split match their checksums"


#: File that identifies a kind of directory -> function that verifies it and returns a sentence.
KINDS: dict[str, Callable[[Path], str]] = {
    "provenance.json": verify_dataset,
    "config.json": verify_run,
}


def verify(path: Path) -> str:
    """Verify a dataset or run directory.

    Args:
        path: directory that `perturbjax build` or `perturbjax train` wrote.

    Returns:
        One sentence about the checked files.

    Raises:
        InputError: the directory is of no known kind, or a file does not match its checksum.
    """
    for marker, verify_kind in KINDS.items():
        if (Path(path) / marker).is_file():
            return verify_kind(Path(path))
    raise InputError(
        f"{path}: is not a dataset or run (contains none of {', '.join(KINDS)}). It "
        f"{describe_path(Path(path))}."
    )


def verify_options(options: VerifyConfig) -> str:
    """Run `perturbjax verify`; return its output."""
    return f"{options.path}: {verify(options.path)}"

"""What stands under an output's name already, and how a finished dataset takes its place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from data_prep import site_tasks as workers
from data_prep.process_pool import TaskPool, by_chunks
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json
from perturbjax.dataset import INDEX, PROVENANCE, SOURCE_DIGEST, Dataset, open_dataset
from perturbjax.report.pages.preview import PREVIEW

#: Files of a dataset of any version; whatever else lies in its folder is somebody's own.
DATASET_FILES = (
    "*.array_record*",
    "*.labels.txt",
    "dataset_info.json",
    "features.json",
    INDEX,
    PROVENANCE,
    PREVIEW,
)


def already_built(
    out: Path, overwrite: bool, facts: dict[str, Any], sites: list[workers.Site], pool: TaskPool
) -> bool:
    """Whether the output is there, whole, and of these settings and images; refuses to touch anything else there.

    Raises:
        InputError: it is another dataset and `overwrite` was not given, or is no dataset at all.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    require_dataset(out)
    try:
        other = _difference(out, facts, sites, pool)
    except InputError as error:
        if not overwrite:
            raise InputError(f"{error}, with --overwrite") from error
        return False
    if other and not overwrite:
        raise InputError(
            f"--out {out}: holds a dataset of {other}; choose another name or give --overwrite"
        )
    return not other


def require_dataset(out: Path) -> None:
    """Refuse a folder that is no dataset, or in which somebody keeps something else.

    Raises:
        InputError: it is.
    """
    if not (out / "dataset_info.json").is_file():
        raise InputError(
            f"--out {out}: exists and is not a dataset; choose another name or remove it"
        )
    _refuse_foreign(out)


def _difference(out: Path, facts: dict[str, Any], sites: list[workers.Site], pool: TaskPool) -> str:
    """How the dataset at `out` is another one than is asked for; empty where it is the same."""
    found = read_json(out / PROVENANCE) if (out / PROVENANCE).is_file() else None
    if not isinstance(found, dict) or found.get("settings_sha256") != facts["settings_sha256"]:
        return "other settings"
    return other_images(open_dataset(out), sites, pool)


def other_images(dataset: Dataset, sites: list[workers.Site], pool: TaskPool) -> str:
    """How the images of sites differ from those that were built, by their digests; empty where they are the same.

    The dataset may hold more: plates that were appended.
    """
    positions = dataset.positions([site.name for site in sites])
    built = dataset.column(SOURCE_DIGEST).iloc[positions]
    digests = by_chunks(pool, workers.digest_sites, sites, "comparing images")
    changed = [site for site, new, old in zip(sites, digests, built, strict=True) if new != old]
    return (
        f"other images ({len(changed)} of {len(sites)} sites, first {changed[0].where})"
        if changed
        else ""
    )


def _refuse_foreign(out: Path) -> None:
    for path in sorted(out.iterdir()):
        if path.is_dir() or not any(path.match(pattern) for pattern in DATASET_FILES):
            raise InputError(
                f"--out {out}: {path.name} in it is no part of a dataset; move it away or choose another"
            )


def restore(out: Path) -> None:
    """Give a dataset its name back that stepped aside for one that was never put in its place."""
    old = _aside(out)
    if old.is_dir() and not out.exists():
        os.rename(old, out)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def publish(complete: Path, out: Path) -> None:
    """Give the finished directory its name; an old dataset steps aside only now.

    Raises:
        InputError: the output cannot be written, or somebody put something else there meanwhile.
    """
    old = _aside(out)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if out.exists() and any(out.iterdir()):
            _refuse_foreign(out)
            os.rename(out, old)
        os.rename(complete, out)
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written ({error.strerror}); choose another output"
        ) from error
    shutil.rmtree(old, ignore_errors=True)

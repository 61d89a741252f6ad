"""An existing dataset at the output path: compare it with a new build, and replace it safely."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from data_prep.process_pool import TaskPool, map_in_chunks
from data_prep.site import Site
from data_prep.site_tasks import digest_sites
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json
from perturbjax.dataset import INDEX, PROVENANCE, SOURCE_DIGEST, Dataset, open_dataset
from perturbjax.report.pages.preview import PREVIEW

#: Files of a dataset of any version. A folder with other files is never replaced.
DATASET_FILES = (
    "*.array_record*",
    "*.labels.txt",
    "dataset_info.json",
    "features.json",
    INDEX,
    PROVENANCE,
    PREVIEW,
)


def is_built(
    out: Path, overwrite: bool, facts: dict[str, Any], sites: list[Site], pool: TaskPool
) -> bool:
    """Return whether `out` is a complete dataset of the same settings and images.

    Args:
        out: Output folder.
        overwrite: Allow replacing another dataset.
        facts: Provenance of the new build, including `settings_sha256`.
        sites: Sites of the new build.
        pool: Workers that read the images to compare checksums.

    Raises:
        InputError: `out` is another dataset and `overwrite` is False, or `out` is not a dataset.
    """
    # An empty folder counts as no output.
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    require_dataset(out)
    try:
        provenance = read_json(out / PROVENANCE) if (out / PROVENANCE).is_file() else None
        is_same = isinstance(provenance, dict) and (
            provenance.get("settings_sha256") == facts["settings_sha256"]
        )
        difference = changed_images(open_dataset(out), sites, pool) if is_same else "other settings"
    except InputError as error:
        # A damaged dataset can only be replaced with --overwrite.
        if not overwrite:
            raise InputError(f"{error.message}, with --overwrite") from error
        return False
    if difference and not overwrite:
        raise InputError(
            f"--out {out}: contains a dataset of {difference}; choose another folder or pass "
            "--overwrite"
        )
    return not difference


def require_dataset(out: Path) -> None:
    """Check that a folder contains a dataset and no other files.

    Raises:
        InputError: It does not.
    """
    if not (out / "dataset_info.json").is_file():
        raise InputError(
            f"--out {out}: exists and is not a dataset; choose another folder or remove it"
        )
    _refuse_other_files(out)


def changed_images(dataset: Dataset, sites: list[Site], pool: TaskPool) -> str:
    """Compare the checksums of images with those in a dataset.

    The dataset may contain additional sites (appended plates).

    Returns:
        Description of the difference; empty if all images are identical.
    """
    # Sites are matched by name, because the order in the dataset can differ.
    rows = dataset.positions([site.name for site in sites])
    stored = dataset.column(SOURCE_DIGEST).iloc[rows]
    current = map_in_chunks(pool, digest_sites, sites, "Comparing images")
    changed = [site for site, new, old in zip(sites, current, stored, strict=True) if new != old]
    if not changed:
        return ""
    return f"other images ({len(changed)} of {len(sites)} sites, first {changed[0].where})"


def _refuse_other_files(out: Path) -> None:
    for path in sorted(out.iterdir()):
        if path.is_dir() or not any(path.match(pattern) for pattern in DATASET_FILES):
            raise InputError(
                f"--out {out}: contains {path.name}, which is not part of a dataset; move that "
                "file or choose another folder"
            )


def restore(out: Path) -> None:
    """Restore the previous dataset if an earlier `publish` was killed between its two renames."""
    backup = _backup_path(out)
    if backup.is_dir() and not out.exists():
        os.rename(backup, out)


def _backup_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def publish(complete: Path, out: Path) -> None:
    """Move a complete dataset to the output path; an existing dataset there is removed last.

    Raises:
        InputError: The output cannot be written, or contains other files by now.
    """
    backup = _backup_path(out)
    shutil.rmtree(backup, ignore_errors=True)
    try:
        if out.exists() and any(out.iterdir()):
            _refuse_other_files(out)
            # Two renames instead of a copy: a kill between them is repaired by `restore`.
            os.rename(out, backup)
        os.rename(complete, out)
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written ({error.strerror}); choose another output"
        ) from error
    shutil.rmtree(backup, ignore_errors=True)

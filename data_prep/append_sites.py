"""`build --append`: check that new plates are compatible with an existing dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.existing_dataset import changed_images, require_dataset
from data_prep.process_pool import TaskPool
from data_prep.site import Site
from data_prep.site_table import SiteTable
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.dataset.append import APPENDED

#: Settings that must agree with the dataset, and the flags that determine them.
FLAGS = {
    "channels": "--channels",
    "aggregate": "--aggregate",
    "channels_stored": "--aggregate",
    "project": "--project",
    "resize": "--resize",
    "quality": "--overwrite (build all plates from scratch)",
    "label_column": "--label-column",
    "segmenter": "--segmenter, --weights, --diameter, --segment-channels and --cells-channel",
    "illumination": "--illumination",
}


def open_target(out: Path) -> Dataset:
    """Open the dataset to which plates are added.

    Raises:
        InputError: There is no dataset, or it is incomplete.
    """
    if not out.exists():
        raise InputError(
            f"--append: there is no dataset at {out}; build the first plates without --append"
        )
    require_dataset(out)
    return open_dataset(out)


def is_appended(target: Dataset, facts: dict[str, Any], sites: list[Site], pool: TaskPool) -> bool:
    """Return whether the dataset contains the same plates, built with the same settings.

    Raises:
        InputError: It contains the plates, but from other images.
    """
    # A dataset consists of the first build and of the parts that were appended later.
    parts = [target.provenance, *target.provenance.get(APPENDED, [])]
    if facts["settings_sha256"] not in [part.get("settings_sha256") for part in parts]:
        return False
    if difference := changed_images(target, sites, pool):
        raise InputError(
            f"--append: {target.path} contains these plates already, from {difference}; build a "
            "new dataset elsewhere"
        )
    return True


def match_columns(target: Dataset, facts: dict[str, Any], table: SiteTable) -> SiteTable:
    """Restrict a site table to the metadata columns of the dataset.

    Raises:
        InputError: Settings differ, a plate is in the dataset already, or a column is missing.
    """
    # Illumination functions differ between plates, so only the method is compared.
    before, now = ({**f, "illumination": _illumination(f)} for f in (target.provenance, facts))
    for name, flags in FLAGS.items():
        if before.get(name) != now.get(name):
            raise InputError(
                f"--append: {target.path} was built with {name} {before.get(name)}, not "
                f"{now.get(name)}; use the same {flags}"
            )
    plates = set(target.column(PLATE))
    if duplicates := [plate for plate in table.sites[PLATE].unique() if plate in plates]:
        raise InputError(
            f"--append: {target.path} already contains plate {duplicates[0]}; a plate can only be "
            "added once, with all its sites"
        )
    # The joined index has the columns of the first build.
    columns = [column for column in target.index.columns if column.startswith("Metadata_")]
    if missing := [column for column in columns if column not in table.sites.columns]:
        raise InputError(
            f"--append: {table.source} has no column {missing[0]}, but {target.path} has; add it"
        )
    extra = [column for column in table.metadata_columns if column not in columns]
    if extra:
        console.print(f"info: {', '.join(extra)}: not in {target.path}, therefore omitted")
    return replace(table, sites=table.sites.drop(columns=extra))


def _illumination(facts: dict[str, Any]) -> str:
    """Describe the illumination method; the functions themselves differ between plates."""
    entry = facts.get("illumination") or {}
    return " ".join(str(entry[key]) for key in ("how", "version") if key in entry) or "none"


def require_storable(target: Dataset, dtype: np.dtype) -> np.dtype:
    """Return the data type of the dataset after checking that it can store the new images.

    Raises:
        InputError: It cannot (16-bit images, 8-bit dataset).
    """
    # uint8 fits into uint16, but not the reverse.
    if not np.can_cast(dtype, target.image_dtype):
        raise InputError(
            f"--append: {target.path} stores {target.image_dtype}, but the new images are {dtype}; "
            "build a separate dataset"
        )
    return target.image_dtype

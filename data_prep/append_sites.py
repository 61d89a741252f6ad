"""`build --append`: whether plates fit a dataset that is there, and what of them goes into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import site_tasks as workers
from data_prep.existing_dataset import other_images, require_dataset
from data_prep.process_pool import TaskPool
from data_prep.site_table import SiteTable
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.dataset.append import APPENDED

#: Facts in which plates must agree with the dataset, and the flags that decide them.
DECIDED_BY = {
    "channels": "--channels",
    "aggregate": "--aggregate",
    "channels_stored": "--aggregate",
    "project": "--project",
    "resize": "--resize",
    "quality": "--overwrite, which builds all of it again",
    "label_column": "--label-column",
    "segmenter": "--segmenter, --weights, --diameter and --segment-channels",
}


def open_target(out: Path) -> Dataset:
    """The dataset that plates are added to.

    Raises:
        InputError: there is none, or it is not whole.
    """
    if not out.exists():
        raise InputError(
            f"--append: there is no dataset at {out} to add to; build it without --append first"
        )
    require_dataset(out)
    return open_dataset(out)


def already_appended(
    target: Dataset, facts: dict[str, Any], sites: list[workers.Site], pool: TaskPool
) -> bool:
    """Whether these very plates were added before, with these settings.

    Raises:
        InputError: they were, and of other images.
    """
    parts = [target.provenance, *target.provenance.get(APPENDED, [])]
    if facts["settings_sha256"] not in [part.get("settings_sha256") for part in parts]:
        return False
    if other := other_images(target, sites, pool):
        raise InputError(
            f"--append: {target.path} holds these plates already, of {other}; build them anew elsewhere"
        )
    return True


def fitting(target: Dataset, facts: dict[str, Any], table: SiteTable) -> SiteTable:
    """The table with the columns that the dataset has.

    Raises:
        InputError: it was built with other settings, has one of the plates, or has a column that the table lacks.
    """
    for name, flags in DECIDED_BY.items():
        was, now = target.provenance.get(name), facts.get(name)
        if was != now:
            raise InputError(
                f"--append: {target.path} was built with {name} {was}, not {now}; make {flags} agree"
            )
    was, now = (_how_lit(known) for known in (target.provenance, facts))
    if was != now:
        raise InputError(
            f"--append: {target.path} was built with illumination {was}, not {now}; make it agree"
        )
    here = set(target.column(PLATE))
    if twice := [plate for plate in table.sites[PLATE].unique() if plate in here]:
        raise InputError(
            f"--append: {target.path} has plate {twice[0]} already; whole plates are added, once"
        )
    columns = [column for column in target.index.columns if column.startswith("Metadata_")]
    if missing := [column for column in columns if column not in table.sites.columns]:
        raise InputError(
            f"--append: {table.source} has no {missing[0]}, and {target.path} has; add the column"
        )
    if more := [column for column in table.metadata_columns if column not in columns]:
        console.print(f"note: {', '.join(more)} is not in {target.path}, and is left out")
    return replace(table, sites=table.sites[[c for c in table.sites.columns if c not in more]])


def _how_lit(facts: dict[str, Any]) -> str:
    light = facts.get("illumination") or {}
    return " ".join(str(light[key]) for key in ("how", "version") if key in light) or "none"


def stored_type(target: Dataset, dtype: np.dtype) -> np.dtype:
    """The type of the dataset's pixels, where it holds those of the plates.

    Raises:
        InputError: it does not.
    """
    if not np.can_cast(dtype, target.image_dtype):
        raise InputError(
            f"--append: {target.path} holds {target.image_dtype}, and these images are {dtype}"
        )
    return target.image_dtype

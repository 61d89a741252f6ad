"""Adding sites to a dataset: what is there keeps its bytes, and a new directory holds both."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, read_json, write_json, write_parquet
from perturbjax.dataset.array_record import FEATURES, INFO
from perturbjax.dataset.reader import SiteDataset
from perturbjax.dataset.schema import INDEX
from perturbjax.dataset.writer import described_files, seal

#: Names of classes, in the order of the numbers that records hold.
LABELS = "label.labels.txt"
#: What a dataset says of the parts that were added to it.
APPENDED = "appended"
#: Facts of the added part that its entry there repeats.
_TOLD = ("source", "settings_sha256", "illumination", "created", "created_by", "n_sites")


def class_names(path: Path) -> list[str]:
    """The classes of a dataset, in the order of the numbers in its records.

    Raises:
        InputError: the file of their names cannot be read.
    """
    try:
        return (path / LABELS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path / LABELS}: cannot be read ({error}); build the dataset again"
        ) from error


def append_dataset(old: Path, added: Path, folder: Path) -> Path:
    """Make a dataset of the records of one, then of another that was written to fit it.

    The shards of the first are linked, or copied where links are not to be had: their bytes stay as they are, and so do
    the numbers of its classes.

    Args:
        old: the dataset.
        added: sites with the same channels, type and columns, whose classes begin with those of `old`.
        folder: made anew; it opens only once this has returned.

    Raises:
        InputError: the two do not fit each other.
    """
    first, second = SiteDataset(old), SiteDataset(added)
    _require_fitting(first, second)
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    ours, theirs = _shards(old), _shards(added)
    names = [
        _numbered(shard.name, number, len(ours) + len(theirs))
        for number, shard in enumerate([*ours, *theirs])
    ]
    for shard, name in zip([*ours, *theirs], names, strict=True):
        _link(shard, folder / name)
    for name in (FEATURES, LABELS):
        shutil.copyfile(added / name, folder / name)
    _write_info(old, added, folder)
    index = pd.concat([first.index, second.index[first.index.columns]], ignore_index=True)
    write_parquet(folder / INDEX, index)

    known = {
        name: first.provenance["files"][shard.name]
        for shard, name in zip(ours, names, strict=False)
    }
    part = {key: second.provenance[key] for key in _TOLD if key in second.provenance}
    facts = {
        **{
            key: value
            for key, value in first.provenance.items()
            if key not in ("files", "content_sha256")
        },
        "n_sites": len(index),
        "n_classes": len(class_names(folder)) if first.label_column else 0,
        "n_cells": int(index["n_cells"].sum()),
        APPENDED: [*first.provenance.get(APPENDED, []), part],
    }
    return seal(folder, facts, described_files(folder, known))


def _require_fitting(first: SiteDataset, second: SiteDataset) -> None:
    mine, theirs = class_names(first.path), class_names(second.path)
    same = first.channel_names == second.channel_names and first.image_dtype == second.image_dtype
    same &= theirs[: len(mine)] == mine and set(first.index.columns) == set(second.index.columns)
    if not same or first.provenance["format"] != second.provenance["format"]:
        raise InputError(
            f"{second.path}: has other channels, columns or classes than {first.path}; build both again"
        )
    if twice := sorted(set(first.index["site_id"]) & set(second.index["site_id"])):
        raise InputError(f"{first.path}: has site {twice[0]!r} already; a site may stand only once")


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.array_record-*-of-*"))


def _numbered(name: str, number: int, count: int) -> str:
    """The name of a shard as tfds numbers it."""
    return f"{name.rsplit('.array_record-', 1)[0]}.array_record-{number:05d}-of-{count:05d}"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def _write_info(old: Path, added: Path, folder: Path) -> None:
    """`dataset_info.json` of both: how many records each shard holds."""
    ours, theirs = read_json(old / INFO), read_json(added / INFO)
    (split,), (more,) = ours["splits"], theirs["splits"]
    both: dict[str, Any] = {
        **split,
        "shardLengths": [*split["shardLengths"], *more["shardLengths"]],
        "numBytes": str(int(split["numBytes"]) + int(more["numBytes"])),
    }
    write_json(folder / INFO, {**ours, "splits": [both]})

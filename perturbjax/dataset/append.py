"""Append sites to a dataset: existing shards keep their bytes, and a new directory contains both
parts.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, read_json, write_json, write_parquet
from perturbjax.dataset.array_record import FEATURES, INFO
from perturbjax.dataset.reader import Dataset
from perturbjax.dataset.schema import INDEX, PIXEL_SIZES
from perturbjax.dataset.writer import describe_files, write_provenance

#: Class names, in the order of the class numbers in records.
LABELS = "label.labels.txt"
#: Provenance entry that lists the appended parts.
APPENDED = "appended"
#: Provenance entries of an appended part that are copied to this list.
_COPIED = (
    *("source", "settings_sha256", "illumination", "float_images"),
    *("created", "created_by", "n_sites"),
)


def read_class_names(path: Path) -> list[str]:
    """Read the class names of a dataset, in the order of the class numbers in its records.

    Raises:
        InputError: the file of class names cannot be read.
    """
    try:
        return (path / LABELS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path / LABELS}: cannot be read ({error}); build the dataset again"
        ) from error


def append_dataset(old: Path, added: Path, folder: Path) -> Path:
    """Combine a dataset and an added part into a new directory.

    Shards are hard-linked, or copied where the file system has no links. Bytes of shards and class
    numbers of `old` stay the same.

    Args:
        old: the dataset.
        added: dataset with the same channels, pixel type and columns; its class names begin with
            those of `old`.
        folder: directory to write; replaced if it exists. It is complete when this function
            returns.

    Returns:
        The folder.

    Raises:
        InputError: the parts differ in channels, columns or classes, or share a site.
    """
    first, second = Dataset(old), Dataset(added)
    _require_compatible(first, second)
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    old_shards, shards = _shards(old), [*_shards(old), *_shards(added)]
    # Each file name contains the total number of shards, so all shards get new names.
    names = [_shard_name(shard.name, number, len(shards)) for number, shard in enumerate(shards)]
    for shard, name in zip(shards, names, strict=True):
        _link(shard, folder / name)
    # The added part has all classes, since its list begins with those of the old part.
    for name in (FEATURES, LABELS):
        shutil.copyfile(added / name, folder / name)
    _write_info(old, added, folder)
    # Columns in the order of the old index.
    index = pd.concat([first.index, second.index[first.index.columns]], ignore_index=True)
    write_parquet(folder / INDEX, index)

    # Shards of the old part are not read again: their checksums do not change.
    files = first.provenance["files"]
    described = {name: files[shard.name] for shard, name in zip(old_shards, names, strict=False)}
    part = {key: second.provenance[key] for key in _COPIED if key in second.provenance}
    old_facts = {
        key: value
        for key, value in first.provenance.items()
        if key not in ("files", "content_sha256")
    }
    parts = (first, second)
    pixel_sizes = {
        plate: size for part in parts for plate, size in part.pixel_sizes.items() if size
    }
    facts = {
        **old_facts,
        **({PIXEL_SIZES: pixel_sizes} if pixel_sizes else {}),
        "n_sites": len(index),
        "n_classes": len(read_class_names(folder)) if first.label_column else 0,
        "n_cells": int(index["n_cells"].sum()),
        APPENDED: [*first.provenance.get(APPENDED, []), part],
    }
    return write_provenance(folder, facts, describe_files(folder, described))


def _require_compatible(first: Dataset, second: Dataset) -> None:
    old_classes, new_classes = read_class_names(first.path), read_class_names(second.path)
    compatible = (
        first.channel_names == second.channel_names
        and first.image_dtype == second.image_dtype
        and new_classes[: len(old_classes)] == old_classes
        and set(first.index.columns) == set(second.index.columns)
    )
    if not compatible:
        raise InputError(
            f"{second.path}: differs from {first.path} in channels, columns or classes. Build both "
            "again."
        )
    if shared := sorted(set(first.index["site_id"]) & set(second.index["site_id"])):
        raise InputError(f"{first.path}: already contains site {shared[0]!r}. Append other sites.")


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.array_record-*-of-*"))


def _shard_name(name: str, number: int, count: int) -> str:
    """Return the name that TFDS expects for a shard."""
    return f"{name.rsplit('.array_record-', 1)[0]}.array_record-{number:05d}-of-{count:05d}"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _write_info(old: Path, added: Path, folder: Path) -> None:
    """Write `dataset_info.json` with the number of records of all shards."""
    info, added_info = read_json(old / INFO), read_json(added / INFO)
    (split,), (added_split,) = info["splits"], added_info["splits"]
    combined: dict[str, Any] = {
        **split,
        "shardLengths": [*split["shardLengths"], *added_split["shardLengths"]],
        # TFDS stores this number as text (64-bit integers in protobuf JSON).
        "numBytes": str(int(split["numBytes"]) + int(added_split["numBytes"])),
    }
    write_json(folder / INFO, {**info, "splits": [combined]})

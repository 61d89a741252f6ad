"""Write a dataset directory: shards, index and provenance.

The provenance is written last. A directory without it is not a dataset, so that an interrupted
build never looks complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, file_digest, write_json, write_parquet
from perturbjax.dataset.reader import FORMAT, content_digest
from perturbjax.dataset.schema import (
    INDEX,
    NUCLEI,
    PROVENANCE,
    SCHEMA_VERSION,
    DatasetPlan,
    SitePixels,
    index_row,
)

#: Index rows of a shard, and the bytes of its records.
WrittenShard = tuple[list[dict[str, Any]], int]


@dataclass(frozen=True)
class Shard:
    """A shard to write: path, position of its first record, and plan of its records."""

    path: Path
    start: int
    plan: DatasetPlan

    @property
    def stop(self) -> int:
        """Position after its last record."""
        return self.start + len(self.plan.table)


def write_dataset(
    folder: Path,
    table: pd.DataFrame,
    sites: Iterable[SitePixels],
    *,
    channel_names: Iterable[str],
    image_dtype: np.dtype | type,
    label_column: str,
    pixel_bytes: int = 0,
    facts: dict[str, Any] | None = None,
    has_nuclei: bool = False,
) -> Path:
    """Write a dataset directory.

    Args:
        folder: folder without a dataset; created if missing.
        table: one row for each site, in record order: `site_id` (unique) and `Metadata_*` as text.
        sites: their pixels in the same order; consumed one by one.
        channel_names: names of the image channels in stored order.
        image_dtype: uint8 or uint16.
        label_column: column of `table` whose sorted values are the classes; empty if sites have no
            labels.
        pixel_bytes: uncompressed size of all images and masks. Large datasets are divided into
            several shards.
        facts: additional entries of `provenance.json`.
        has_nuclei: whether each site has the labels of its nuclei.

    Returns:
        The folder.

    Raises:
        InputError: a file cannot be written, or nuclei do not match the cells.
    """
    plan = DatasetPlan(
        table,
        tuple(channel_names),
        np.dtype(image_dtype),
        label_column,
        pixel_bytes,
        facts or {},
        has_nuclei=has_nuclei,
    )
    return write_plan(folder, plan, sites)


def write_plan(
    folder: Path,
    plan: DatasetPlan,
    sites: Iterable[SitePixels],
    *,
    write_remotely: Callable[[list[Shard]], Iterator[WrittenShard]] | None = None,
) -> Path:
    """Write a dataset directory by a plan. See `write_dataset`.

    Args:
        folder: folder without a dataset; created if missing.
        plan: the dataset.
        sites: pixels of all sites; not read if `write_remotely` is given.
        write_remotely: writes the shards in other processes, with `write_shard`.
    """
    from perturbjax.dataset.shards import write_in_order, write_shards

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index: list[dict[str, Any]] = []

    def write(paths: list[Path], lengths: list[int]) -> int:
        assert write_remotely is not None
        # Position after the last record of each shard.
        stops = np.cumsum(lengths).tolist()
        shards = [
            Shard(path, stop - length, plan.select(stop - length, stop))
            for path, length, stop in zip(paths, lengths, stops, strict=True)
        ]
        total = 0
        # Results come in the order of the shards, so index rows are in record order.
        for rows, size in write_remotely(shards):
            index.extend(rows)
            total += size
        return total

    # A generator: sites are read one by one while shards are written.
    local = write_in_order(plan, _records(plan, sites, index))
    write_shards(folder, plan, write if write_remotely else local)
    write_parquet(folder / INDEX, pd.DataFrame(index))
    facts = {
        **plan.facts,
        "schema_version": SCHEMA_VERSION,
        "format": FORMAT,
        "channels_stored": list(plan.channel_names),
        "label_column": plan.label_column,
        "image_dtype": plan.image_dtype.name,
        "n_sites": len(index),
        "n_classes": len(plan.class_names) if plan.label_column else 0,
        "n_cells": sum(row["n_cells"] for row in index),
    }
    return write_provenance(folder, facts, describe_files(folder))


def _records(
    plan: DatasetPlan, sites: Iterable[SitePixels], index: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the records of a plan, and append their rows to `index`."""
    # The index stores class numbers, the record class names; TFDS converts them to the same
    # numbers.
    numbers = {name: number for number, name in enumerate(plan.class_names)}
    for label, texts, site in zip(plan.labels, plan.texts, sites, strict=True):
        if (site.nuclei is not None) != plan.has_nuclei:
            needed = "are missing" if plan.has_nuclei else "are not expected"
            raise InputError(
                f"site {texts['site_id']}: its nuclei {needed}. Pass nuclei for all sites or none."
            )
        index.append(index_row(texts, numbers[label], site, plan.channel_names))
        nuclei = {} if site.nuclei is None else {NUCLEI: site.nuclei}
        yield {"image": site.image, "mask": site.mask, **nuclei, "label": label, **texts}


def write_shard(shard: Shard, sites: Iterable[SitePixels]) -> WrittenShard:
    """Write one shard, in any process.

    The file gets its final name when it is complete, so that two processes can write the same
    shard.

    Returns:
        Its index rows, and the bytes of its records.

    Raises:
        InputError: the file cannot be written.
    """
    from perturbjax.dataset import shards

    index: list[dict[str, Any]] = []
    with shards.convert_disk_errors(shard.path.parent), atomic(shard.path) as temporary:
        size = shards.write_shard(temporary, shard.plan, _records(shard.plan, sites, index))
    return index, size


def describe_files(
    folder: Path, described: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file of a folder by name; `described` files are not read
    again.
    """
    described = described or {}
    return {
        # Checksums of large files that are already available are reused.
        path.name: described.get(path.name)
        or {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def write_provenance(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
    """Write `provenance.json`, which makes a folder a complete dataset."""
    write_json(
        folder / PROVENANCE, {**facts, "content_sha256": content_digest(files), "files": files}
    )
    return folder

"""The one writer of a dataset directory: pixels in order, the index beside them, and what both are, in provenance."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.files import file_digest, write_json, write_parquet
from perturbjax.dataset.reader import FORMATS, content_digest
from perturbjax.dataset.schema import (
    INDEX,
    PROVENANCE,
    SCHEMA_VERSION,
    UNLABELLED,
    Contents,
    SitePixels,
    index_row,
    metadata_of,
)

#: Rows of the index, and the bytes of the records they are of.
Written = tuple[list[dict[str, Any]], int]


@dataclass(frozen=True)
class Shard:
    """What must be known to write some of a dataset's records."""

    path: Path
    start: int
    """Position of its first record in the dataset."""
    labels: list[str]
    texts: list[dict[str, str]]
    """`site_id` and `Metadata_*` of each record."""
    channel_names: tuple[str, ...]
    contents: Contents
    format: str

    def part(self, path: Path, start: int, stop: int) -> Shard:
        """A shard of some of these records."""
        return replace(
            self,
            path=path,
            start=start,
            labels=self.labels[start:stop],
            texts=self.texts[start:stop],
        )


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
    format: str = "array_record",
    classes: Sequence[str] = (),
    elsewhere: Callable[[list[Shard]], Iterator[Written]] | None = None,
) -> Path:
    """Write a dataset into a folder that holds none yet; it opens only once this has returned.

    Args:
        folder: made where it is missing.
        table: one row a site, in record order: `site_id` (unique) and every `Metadata_*` as text.
        sites: their pixels, in the same order; read once, never gathered.
        channel_names: of the image's channels, in stored order.
        image_dtype: uint8 or uint16, of every image.
        label_column: column of `table` whose sorted values are the classes; empty where the sites have no labels.
        pixel_bytes: image and mask of all sites together, uncompressed; more than one shard holds makes several.
        facts: more to say in the provenance of how it was made.
        format: how pixels are stored, one of `FORMATS`.
        classes: those that come first, in their order; of the others follow the sorted values.
        elsewhere: makes the shards, by `write_shard`, in other processes; `sites` are not asked for then.

    Raises:
        InputError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    channel_names, dtype = list(channel_names), np.dtype(image_dtype)
    labels = table[label_column] if label_column else pd.Series(UNLABELLED, table.index)
    classes = [*classes, *sorted(set(labels) - set(classes))]
    columns = metadata_of(table.columns)
    contents = Contents(len(table), len(channel_names), dtype, classes, columns, pixel_bytes)
    index: list[dict[str, Any]] = []

    texts = table[["site_id", *columns]].to_dict("records")
    whole = Shard(folder, 0, list(labels), texts, tuple(channel_names), contents, format)

    def shards(paths: list[Path], lengths: list[int]) -> int:
        assert elsewhere is not None
        starts = np.cumsum([0, *lengths]).tolist()
        written = 0
        for rows, size in elsewhere(
            [whole.part(*one) for one in zip(paths, starts, starts[1:], strict=False)]
        ):
            index.extend(rows)
            written += size
        return written

    more = {"elsewhere": shards} if elsewhere else {}
    module = importlib.import_module(FORMATS[format])
    module.write_pixels(folder, lambda: _records(whole, sites, index), contents, **more)
    write_parquet(folder / INDEX, pd.DataFrame(index))
    facts = {
        **(facts or {}),
        "schema_version": SCHEMA_VERSION,
        "format": format,
        "channels_stored": channel_names,
        "label_column": label_column,
        "image_dtype": dtype.name,
        "n_sites": len(index),
        "n_classes": len(classes) if label_column else 0,
        "n_cells": sum(row["n_cells"] for row in index),
    }
    return seal(folder, facts, described_files(folder))


def _records(
    shard: Shard, sites: Iterable[SitePixels], index: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The records of a shard; a row of the index for each is put into `index`."""
    for label, texts, site in zip(shard.labels, shard.texts, sites, strict=True):
        index.append(
            index_row(texts, shard.contents.label_names.index(label), site, shard.channel_names)
        )
        yield {"image": site.image, "mask": site.mask, "label": label, **texts}


def write_shard(shard: Shard, sites: Iterable[SitePixels]) -> Written:
    """Make one shard, in whatever process; its rows of the index, and the bytes of its records.

    Raises:
        InputError: it cannot be written.
    """
    index: list[dict[str, Any]] = []
    module = importlib.import_module(FORMATS[shard.format])
    size = module.write_one_shard(shard.path, _records(shard, sites, index), shard.contents)
    return index, size


def described_files(
    folder: Path, known: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a folder by name; `known` ones are not read again."""
    known = known or {}
    return {
        path.name: known.get(path.name)
        or {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def seal(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
    """Write the provenance, with which a folder becomes a dataset that opens."""
    write_json(
        folder / PROVENANCE, {**facts, "content_sha256": content_digest(files), "files": files}
    )
    return folder

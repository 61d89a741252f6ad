"""Read a prepared dataset directory."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int, UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.core.files import describe_path, file_digest, read_json, read_parquet
from perturbjax.core.plates import PLATE
from perturbjax.dataset.array_record import ArrayRecordReader
from perturbjax.dataset.schema import (
    INDEX,
    INDEX_COLUMNS,
    LARGEST_SITE,
    NUCLEI,
    NUCLEI_AREA,
    PIXEL_SIZES,
    PROVENANCE,
    SCHEMA_VERSION,
)
from perturbjax.dataset.summary_card import dataset_card

#: Storage format of records, in the provenance.
FORMAT = "array_record"
#: Files whose checksums are verified when a dataset is opened; of other files only the size is.
VERIFIED_ON_OPENING = (".parquet", ".json", ".txt")
#: Required entries of the provenance, with their types.
_FACTS = {
    "channels_stored": list,
    "image_dtype": str,
    "label_column": str,
    "files": dict,
    "format": str,
}


class Dataset:
    """Sites by position, and their metadata by column. Create it with `open_dataset`.

    Attributes:
        path: its directory.
        index: one row for each record, in record order (see `INDEX_COLUMNS`); `Metadata_*` columns
            are text.
        provenance: channels, segmenter, settings and the checksum of each file.
    """

    def __init__(self, path: Path | str):
        """Open a directory; see `open_dataset`."""
        self.path = Path(path)
        self.provenance = _read_provenance(self.path)
        _check_files(self.path, self.provenance["files"])
        self.index = _read_index(self.path, self.provenance)
        self._reader = ArrayRecordReader(self.path)
        if len(self._reader) != len(self.index):
            raise InputError(
                f"{self.path}: {INDEX} has {len(self.index)} rows for {len(self._reader)} records; "
                "build the dataset again"
            )
        self._site_ids = self.index["site_id"].to_numpy()
        # Expected shape of each image, which is checked before a record is decompressed.
        self._shapes = [
            (*size, len(self.channel_names))
            for size in self.index[["height", "width"]].to_numpy().tolist()
        ]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return one site: `image` (H, W, C), `mask` (H, W), and the columns of its index row.

        Datasets with nuclei also have `nuclei` (H, W).

        Raises:
            IndexError: the position is out of range; negative positions count from the end.
            InputError: the record is damaged.
        """
        # A range supports negative positions and raises IndexError.
        position = range(len(self))[position]
        image, mask = self.pixels(position)
        nuclei = {NUCLEI: self.nuclei(position)} if self.has_nuclei else {}
        return {"image": image, "mask": mask, **nuclei, **self.index.iloc[position].to_dict()}

    def __repr__(self) -> str:
        height, width = self.index[["height", "width"]].to_numpy()[0]
        classes = self.index[self.label_column].nunique()
        return (
            f"<dataset {self.path}: {len(self)} sites of {height}×{width} pixels, "
            f"{len(self.channel_names)} channels "
            f"({', '.join(self.channel_names)}), {classes} classes of {self.label_column}>"
        )

    def _repr_html_(self) -> str:
        """Display counts, classes and example sites in a notebook."""
        return dataset_card(self, self.index, self.pixel_sizes)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its directory, or its directories if it was joined from several."""
        return (self.path,)

    @property
    def index_sha256(self) -> str:
        """SHA-256 of the index file."""
        return file_digest(self.path / INDEX)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents: datasets with equal fingerprints have equal records."""
        return content_digest(self.provenance["files"])

    @property
    def channel_names(self) -> list[str]:
        """Names of the image channels, in stored order."""
        return list(self.provenance["channels_stored"])

    @property
    def has_nuclei(self) -> bool:
        """Whether records contain the nuclei of the cells in their masks."""
        return NUCLEI_AREA in self.index.columns

    @functools.cached_property
    def image_dtype(self) -> np.dtype:
        """uint8 or uint16."""
        return np.dtype(self.provenance["image_dtype"])

    @property
    def pixel_sizes(self) -> dict[str, float]:
        """Plate → height and width of a stored pixel in micrometers; 0 if it is unknown."""
        stored = self.provenance.get(PIXEL_SIZES, {})
        plates = self.index[PLATE].astype(str).unique() if PLATE in self.index else ()
        return {plate: stored.get(plate, 0.0) for plate in plates}

    def pixel_size(self, position: int) -> float:
        """Return height and width of a stored pixel of a site in micrometers; 0 if unknown."""
        stored = self.provenance.get(PIXEL_SIZES, {})
        return stored.get(str(self.index[PLATE].iat[position]), 0.0) if stored else 0.0

    @property
    def label_column(self) -> str:
        """Label column chosen at build time; empty if the dataset has no labels."""
        return self.provenance["label_column"]

    @property
    def class_names(self) -> list[str]:
        """Classes of the label column, sorted; empty if the dataset has no labels."""
        if not self.label_column:
            return []
        return sorted(self.index[self.label_column].astype(str).unique())

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of all sites.

        Raises:
            InputError: sites differ in size.
        """
        sizes = self.index[["height", "width"]].drop_duplicates()
        if len(sizes) > 1:
            raise InputError(
                f"{self.path}: sites have {len(sizes)} different sizes; build it with --resize N "
                "to train on it"
            )
        height, width = sizes.iloc[0]
        return int(height), int(width)

    def column(self, name: str) -> pd.Series:
        """Return a column of the index; `Metadata_*` columns are text.

        Raises:
            InputError: the column is absent; the message lists the available ones.
        """
        available = ", ".join(
            column for column in self.index.columns if column.startswith("Metadata_")
        )
        if not name:
            raise InputError(
                f"{self.path}: was built without labels. Pass --label-column (available: "
                f"{available})."
            )
        if name not in self.index.columns:
            similar = difflib.get_close_matches(name, self.index.columns, 1)
            prefixed = f"Metadata_{name}"
            similar = [prefixed] if prefixed in self.index.columns else similar
            hint = f" Did you mean {similar[0]}?" if similar else ""
            raise InputError(
                f"{self.path / INDEX}: no column {name!r} (available: {available}).{hint}"
            )
        return self.index[name]

    def positions(self, site_ids: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Return the positions of sites, in the order of `site_ids`.

        Raises:
            InputError: a site is not in the dataset.
        """
        # -1 for unknown sites.
        positions = pd.Index(self._site_ids).get_indexer(list(site_ids))
        if (positions < 0).any():
            # The minimum is -1, so this is the first unknown site.
            absent = list(site_ids)[int(np.argmin(positions))]
            raise InputError(f"{self.path}: has no site {absent!r}")
        return positions

    def record(self, position: int) -> dict[str, Any]:
        """Decode one record with all its fields; texts are bytes.

        Raises:
            InputError: the record is damaged.
        """
        with self._convert_errors(position):
            return self._reader.record(position)

    def read(
        self, positions: Sequence[int] | np.ndarray
    ) -> tuple[UInt[np.ndarray, "n h w c"], UInt16[np.ndarray, "n h w"]]:
        """Read images (n, H, W, C) in their stored type and masks (n, H, W) uint16."""
        height, width = self.image_size
        images = np.empty(
            (len(positions), height, width, len(self.channel_names)), self.image_dtype
        )
        masks = np.empty((len(positions), height, width), np.uint16)
        for row, position in enumerate(positions):
            images[row], masks[row] = self.pixels(position)
        return images, masks

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        """Read image (H, W, C) and mask (H, W) uint16 of one record.

        Raises:
            InputError: the record is damaged, or belongs to another site than its index row.
        """
        with self._convert_errors(position):
            site_id, image, mask = self._reader.read(
                position, self._shapes[position], self.image_dtype
            )
        self._require_site(position, site_id)
        return image, mask

    def nuclei(self, position: int) -> UInt16[np.ndarray, "h w"]:
        """Read the nuclei (H, W) uint16 of one record; each has the label of its cell in the mask.

        Raises:
            InputError: the dataset has no nuclei, or the record is damaged.
        """
        if not self.has_nuclei:
            raise InputError(f"{self.path}: has no nuclei; build it with --cells-channel CHANNEL")
        with self._convert_errors(position):
            site_id, nuclei = self._reader.read_nuclei(position, self._shapes[position][:2])
        self._require_site(position, site_id)
        return nuclei

    def _require_site(self, position: int, site_id: str) -> None:
        """Check that a record belongs to the site of its index row."""
        if site_id != self._site_ids[position]:
            raise InputError(
                f"{self.path}: record {position} is site {site_id!r}, {INDEX} says "
                f"{self._site_ids[position]!r}; "
                "build the dataset again"
            )

    @contextmanager
    def _convert_errors(self, position: int) -> Iterator[None]:
        try:
            yield
        # array_record, protobuf and imagecodecs raise many types for damaged files.
        except Exception as error:
            raise InputError(
                f"{self.path}: record {position} cannot be read ({error}); build the dataset again"
            ) from error


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """Return one SHA-256 over the names and checksums of the files of a dataset."""
    # Sizes are left out: they follow from the contents. Sorted keys make the digest independent of
    # the order.
    digests = {name: file["sha256"] for name, file in files.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _read_provenance(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(
            f"{path}: no such dataset directory. Build one with `perturbjax build --out {path}`."
        )
    if not (path / PROVENANCE).is_file():
        raise InputError(
            f"{path}: is not a complete dataset ({PROVENANCE} is missing). It "
            f"{describe_path(path)}. "
            "Build one with `perturbjax build`"
        )
    provenance = read_json(path / PROVENANCE)
    version = provenance.get("schema_version") if isinstance(provenance, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: was built with schema version {version}, this program reads "
            f"{SCHEMA_VERSION}; build it again"
        )
    # The file can be edited by hand, so types are checked before values are used.
    wrong = [name for name, kind in _FACTS.items() if not isinstance(provenance.get(name), kind)]
    if not wrong:
        wrong += ["files"] * (not _are_files(provenance["files"]))
        wrong += ["channels_stored"] * (
            not all(isinstance(name, str) for name in provenance["channels_stored"])
        )
        wrong += ["image_dtype"] * (provenance["image_dtype"] not in ("uint8", "uint16"))
        wrong += ["format"] * (provenance["format"] != FORMAT)
        wrong += [PIXEL_SIZES] * (not _are_sizes(provenance.get(PIXEL_SIZES, {})))
    if wrong:
        raise InputError(
            f"{path / PROVENANCE}: {wrong[0]} is missing or invalid; build the dataset again"
        )
    if content_digest(provenance["files"]) != provenance.get("content_sha256"):
        raise InputError(
            f"{path / PROVENANCE}: the checksums of its files were changed; build the dataset again"
        )
    return provenance


def _are_sizes(sizes: object) -> bool:
    return isinstance(sizes, dict) and all(
        isinstance(size, float) and 0 < size < math.inf for size in sizes.values()
    )


def _are_files(files: dict[str, Any]) -> bool:
    return INDEX in files and all(
        # A name with a folder could refer to a file outside of the dataset.
        Path(name).name == name
        and isinstance(file, dict)
        and isinstance(file.get("bytes"), int)
        and isinstance(file.get("sha256"), str)
        for name, file in files.items()
    )


def _check_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, file in files.items():
        path_of_file = path / name
        if not path_of_file.is_file():
            raise InputError(
                f"{path}: is not a complete dataset ({name} is missing); build the dataset again"
            )
        # The size is a fast check of shards; reading them for a checksum can take minutes.
        if (size := path_of_file.stat().st_size) != file["bytes"]:
            raise InputError(
                f"{path_of_file}: has {size} bytes instead of {file['bytes']}: it is truncated or "
                "was changed; "
                "build the dataset again"
            )
        if (
            path_of_file.suffix in VERIFIED_ON_OPENING
            and file_digest(path_of_file) != file["sha256"]
        ):
            raise InputError(
                f"{path_of_file}: was changed (its SHA-256 differs); build the dataset again"
            )


def _read_index(path: Path, provenance: dict[str, Any]) -> pd.DataFrame:
    index = read_parquet(path / INDEX, "build the dataset again")
    if missing := [name for name in INDEX_COLUMNS if name not in index.columns]:
        raise InputError(f"{path / INDEX}: no column {missing[0]!r}; build the dataset again")
    if index.empty or index["site_id"].duplicated().any():
        raise InputError(
            f"{path / INDEX}: has no rows or a duplicate site; build the dataset again"
        )
    sizes = index[["height", "width"]].to_numpy()
    if (
        sizes.dtype.kind not in "iu"
        or sizes.min() < 1
        # float64, because the product of two integers could overflow.
        or sizes.astype(float).prod(1).max() > LARGEST_SITE
    ):
        raise InputError(
            f"{path / INDEX}: height and width are not valid image sizes; build the dataset again"
        )
    return index

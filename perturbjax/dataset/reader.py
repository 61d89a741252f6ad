"""Reading a prepared dataset directory: what everything downstream sees of it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Int, UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest, read_json, read_parquet
from perturbjax.dataset.schema import INDEX, INDEX_COLUMNS, LARGEST_SITE, PROVENANCE, SCHEMA_VERSION

#: How pixels can be stored → the module with that format's `open_pixels` and `write_pixels`.
FORMATS = {"array_record": "perturbjax.dataset.array_record"}
#: Files whose digests are checked whenever a dataset is opened; of the others only the size is.
CHECKED_AT_ONCE = (".parquet", ".json", ".txt")
#: What the provenance must say, and as what.
_FACTS = {
    "channels_stored": list,
    "image_dtype": str,
    "label_column": str,
    "files": dict,
    "format": str,
}


@runtime_checkable
class SiteSource(Protocol):
    """What a feed asks for: sites by position, and columns of what is known of them by name."""

    path: Path

    def __len__(self) -> int: ...

    @property
    def channel_names(self) -> list[str]:
        """Names of the image's channels, in stored order; one aggregated channel is called `aggregate`."""
        ...

    @property
    def image_dtype(self) -> np.dtype: ...

    @property
    def label_column(self) -> str:
        """The column it was built with as its label, empty where it has none; training may choose any other."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of every site; an `InputError` where sites differ in size."""
        ...

    def column(self, name: str) -> pd.Series:
        """A column of the index, as text for `Metadata_*`; an `InputError` where there is none of that name."""
        ...

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        """Image and mask of one record; an `InputError` where they are damaged or another site's."""
        ...


@runtime_checkable
class Dataset(SiteSource, Protocol):
    """Sites by position, their metadata by column."""

    index: pd.DataFrame
    """One row a record, in record order (see `INDEX_COLUMNS`); `Metadata_*` columns are text."""
    provenance: dict[str, Any]
    """How it was made (segmenter, weights' SHA-256, channels, aggregation …), and the digest of every file."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its directory, or those of several that are opened as one."""
        ...

    @property
    def index_sha256(self) -> str:
        """SHA-256 of what its index was read from."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it holds: two datasets with one fingerprint give the same records."""
        ...

    def positions(self, site_ids: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Where sites stand; an `InputError` names one that is not there."""
        ...

    def read(
        self, positions: Sequence[int] | np.ndarray
    ) -> tuple[UInt[np.ndarray, "n h w c"], UInt16[np.ndarray, "n h w"]]:
        """Images (n, H, W, C) in their stored dtype and masks (n, H, W) uint16."""
        ...

    def record(self, position: int) -> dict[str, Any]:
        """One decoded record with all its fields, as stored (texts are bytes)."""
        ...

    def __getitem__(self, position: int) -> dict[str, Any]:
        """One site: `image` (H, W, C), `mask` (H, W), and its row of the index (`site_id`, `Metadata_*` …)."""
        ...


@runtime_checkable
class PixelStore(Protocol):
    """What a storage format gives: records by position. It is pickled with the dataset, and raises what it likes."""

    def __len__(self) -> int: ...

    def read(
        self, position: int, shape: tuple[int, int, int], dtype: np.dtype
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """site_id, image of that shape and dtype, and mask; refuses another shape before it allocates memory."""
        ...

    def record(self, position: int) -> dict[str, Any]: ...


def open_dataset(path: Path | str | Sequence[Path | str]) -> Dataset:
    """Open a dataset directory, or several as one; images are decoded only when asked for.

    The index and all small files are held to the digests in the provenance, the others to their sizes, and each
    record to its row of the index when it is read. `perturbjax verify` checks everything at once.

    Raises:
        InputError: the directory is missing, incomplete, changed since it was written, or of another schema version; or
            several do not agree in channels and type of pixels.

    Examples:
        >>> dataset = perturbjax.open_dataset("dataset")
        >>> dataset
        <dataset dataset: 30 sites of 24×24 pixels, 2 channels (DNA, Actin), 2 classes of Metadata_pert_iname>
        >>> dataset[0]["image"].shape, dataset[0]["Metadata_Well"]
        ((24, 24, 2), 'A01')
        >>> dataset.index.groupby("Metadata_pert_iname")["n_cells"].mean().to_dict()
        {'DMSO': 1.0, 'taxol': 1.0}
        >>> images, masks = dataset.read([0, 1, 2])
        >>> masks.shape, masks.dtype
        ((3, 24, 24), dtype('uint16'))
    """
    if isinstance(path, str | Path):
        return SiteDataset(path)
    if len(path) == 1:
        return SiteDataset(path[0])
    from perturbjax.dataset.joined import JoinedDataset

    return JoinedDataset(path)


class SiteDataset:
    """A `Dataset` in a directory, whatever its storage format."""

    def __init__(self, path: Path | str):
        """See `open_dataset`."""
        self.path = Path(path)
        self.provenance = _read_provenance(self.path)
        _check_files(self.path, self.provenance["files"])
        self.index = _read_index(self.path, self.provenance)
        self._store: PixelStore = _open_pixels(self.path, self.provenance["format"])
        if len(self._store) != len(self.index):
            raise InputError(
                f"{self.path}: {INDEX} has {len(self.index)} rows for {len(self._store)} records; "
                "build the dataset again"
            )
        self._site_ids = self.index["site_id"].to_numpy()
        self._shapes = [
            (*size, len(self.channel_names))
            for size in self.index[["height", "width"]].to_numpy().tolist()
        ]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """One site: `image` (H, W, C), `mask` (H, W), and its row of the index (`site_id`, `Metadata_*` …).

        Raises:
            IndexError: there is no such position; negative ones count from the end.
            InputError: the record is damaged.
        """
        position = range(len(self))[position]
        image, mask = self.pixels(position)
        return {"image": image, "mask": mask, **self.index.iloc[position].to_dict()}

    def __repr__(self) -> str:
        height, width = self.index[["height", "width"]].to_numpy()[0]
        classes = self.index[self.label_column].nunique()
        return (
            f"<dataset {self.path}: {len(self)} sites of {height}×{width} pixels, {len(self.channel_names)} channels "
            f"({', '.join(self.channel_names)}), {classes} classes of {self.label_column}>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: counts, classes, and a site of each of the first classes."""
        from perturbjax.dataset.summary_card import dataset_card

        return dataset_card(self)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its directory, or directories."""
        return (self.path,)

    @property
    def index_sha256(self) -> str:
        """SHA-256 of its index's file."""
        return file_digest(self.path / INDEX)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it holds."""
        return content_digest(self.provenance["files"])

    @property
    def channel_names(self) -> list[str]:
        """Names of the image's channels, in stored order."""
        return list(self.provenance["channels_stored"])

    @functools.cached_property
    def image_dtype(self) -> np.dtype:
        """uint8 or uint16."""
        return np.dtype(self.provenance["image_dtype"])

    @property
    def label_column(self) -> str:
        """The column the dataset was built with as its label; empty where it was built without labels."""
        return self.provenance["label_column"]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of every site.

        Raises:
            InputError: sites differ in size.
        """
        sizes = self.index[["height", "width"]].drop_duplicates()
        if len(sizes) > 1:
            raise InputError(
                f"{self.path}: sites have {len(sizes)} different sizes; build it with --resize N to train on it"
            )
        height, width = sizes.iloc[0]
        return int(height), int(width)

    def column(self, name: str) -> pd.Series:
        """A column of the index by name, as text for `Metadata_*`.

        Raises:
            InputError: there is no such column; the message lists those there are.
        """
        known = ", ".join(column for column in self.index.columns if column.startswith("Metadata_"))
        if not name:
            raise InputError(
                f"{self.path}: was built without labels; predict it, or give --label-column, one of {known}"
            )
        if name not in self.index.columns:
            raise InputError(f"{self.path / INDEX}: no column {name!r}; it has {known}")
        return self.index[name]

    def positions(self, site_ids: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Where sites stand, in the order asked for.

        Raises:
            InputError: one is not in the dataset.
        """
        found = pd.Index(self._site_ids).get_indexer(list(site_ids))
        if (found < 0).any():
            raise InputError(f"{self.path}: has no site {list(site_ids)[int(np.argmin(found))]!r}")
        return found

    def record(self, position: int) -> dict[str, Any]:
        """One decoded record as stored (texts are bytes, as TFDS gives them).

        Raises:
            InputError: the shards are damaged.
        """
        with self._damage_told(position):
            return self._store.record(position)

    def read(
        self, positions: Sequence[int] | np.ndarray
    ) -> tuple[UInt[np.ndarray, "n h w c"], UInt16[np.ndarray, "n h w"]]:
        """Decode sites by position: images (n, H, W, C) in their stored dtype and masks (n, H, W) uint16."""
        height, width = self.image_size
        images = np.empty(
            (len(positions), height, width, len(self.channel_names)), self.image_dtype
        )
        masks = np.empty((len(positions), height, width), np.uint16)
        for row, position in enumerate(positions):
            images[row], masks[row] = self.pixels(position)
        return images, masks

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        """Image and mask of one record, without its texts.

        Raises:
            InputError: the record is damaged, or is not the site that stands there in the index.
        """
        with self._damage_told(position):
            site_id, image, mask = self._store.read(
                position, self._shapes[position], self.image_dtype
            )
        if site_id != self._site_ids[position]:
            raise InputError(
                f"{self.path}: record {position} is site {site_id!r}, {INDEX} says {self._site_ids[position]!r}; "
                "build the dataset again"
            )
        return image, mask

    @contextmanager
    def _damage_told(self, position: int) -> Iterator[None]:
        try:
            yield
        except (
            Exception
        ) as error:  # array_record, protobuf and imagecodecs raise many kinds for damaged files
            raise InputError(
                f"{self.path}: record {position} cannot be read ({error}); build the dataset again"
            ) from error


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """One SHA-256 over the names and digests of a dataset's files."""
    digests = {name: file["sha256"] for name, file in files.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _read_provenance(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(
            f"{path}: no such dataset directory; make one with `perturbjax build --out {path}`"
        )
    if not (path / PROVENANCE).is_file():
        raise InputError(
            f"{path}: is not a complete dataset ({PROVENANCE} is missing); run `perturbjax build`"
        )
    provenance = read_json(path / PROVENANCE)
    version = provenance.get("schema_version") if isinstance(provenance, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: was built with schema version {version}, this program reads {SCHEMA_VERSION}; build it again"
        )
    wrong = [name for name, kind in _FACTS.items() if not isinstance(provenance.get(name), kind)]
    if not wrong:
        wrong += ["files"] * (not _are_files(provenance["files"]))
        wrong += ["channels_stored"] * (
            not all(isinstance(name, str) for name in provenance["channels_stored"])
        )
        wrong += ["image_dtype"] * (provenance["image_dtype"] not in ("uint8", "uint16"))
        wrong += ["format"] * (provenance["format"] not in FORMATS)
    if wrong:
        raise InputError(
            f"{path / PROVENANCE}: {wrong[0]} is missing or is not what a dataset has; build it again"
        )
    if content_digest(provenance["files"]) != provenance.get("content_sha256"):
        raise InputError(
            f"{path / PROVENANCE}: the digests of its files were changed; build the dataset again"
        )
    return provenance


def _are_files(files: dict[str, Any]) -> bool:
    return INDEX in files and all(
        Path(name).name == name
        and isinstance(file, dict)
        and isinstance(file.get("bytes"), int)
        and isinstance(file.get("sha256"), str)
        for name, file in files.items()
    )


def _check_files(path: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, file in files.items():
        found = path / name
        if not found.is_file():
            raise InputError(
                f"{path}: is not a complete dataset ({name} is missing); build the dataset again"
            )
        if (size := found.stat().st_size) != file["bytes"]:
            raise InputError(
                f"{found}: has {size} bytes, and {file['bytes']} were written: it is cut short or was changed; "
                "build the dataset again"
            )
        if found.suffix in CHECKED_AT_ONCE and file_digest(found) != file["sha256"]:
            raise InputError(
                f"{found}: is not what was written there (its SHA-256 differs); build the dataset again"
            )


def _read_index(path: Path, provenance: dict[str, Any]) -> pd.DataFrame:
    index = read_parquet(path / INDEX, "build the dataset again")
    if missing := [name for name in INDEX_COLUMNS if name not in index.columns]:
        raise InputError(f"{path / INDEX}: no column {missing[0]!r}; build the dataset again")
    if index.empty or index["site_id"].duplicated().any():
        raise InputError(f"{path / INDEX}: has no row, or a site twice; build the dataset again")
    sides = index[["height", "width"]].to_numpy()
    if (
        sides.dtype.kind not in "iu"
        or sides.min() < 1
        or sides.astype(float).prod(1).max() > LARGEST_SITE
    ):
        raise InputError(
            f"{path / INDEX}: height and width are no size of an image; build the dataset again"
        )
    return index


def _open_pixels(path: Path, format: str) -> PixelStore:
    return importlib.import_module(FORMATS[format]).open_pixels(path)

"""Open one dataset directory, or several as one dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.dataset.reader import Dataset
from perturbjax.dataset.schema import PIXEL_SIZES, UNLABELLED


def open_dataset(path: Path | str | Sequence[Path | str]) -> Dataset:
    """Open a dataset directory, or several as one. Images are decoded when they are read.

    Index and small files are compared with the checksums in the provenance, other files with their
    sizes. Each record is compared with its index row when it is read. `perturbjax verify` checks
    everything at once.

    Args:
        path: a dataset directory, or several with the same channels and pixel type.

    Raises:
        InputError: the directory is missing, incomplete, changed or of another schema version; or
            the datasets differ in channels or pixel type, or share a site.

    Examples:
        >>> dataset = perturbjax.open_dataset("dataset")
        >>> dataset
        <dataset dataset: 30 sites of 24×24 pixels, 2 channels (DNA, Actin), 2 classes of ...>
        >>> dataset[0]["image"].shape, dataset[0]["Metadata_Well"]
        ((24, 24, 2), 'A01')
        >>> dataset.index.groupby("Metadata_pert_iname")["n_cells"].mean().to_dict()
        {'DMSO': 1.0, 'taxol': 1.0}
        >>> images, masks = dataset.read([0, 1, 2])
        >>> masks.shape, masks.dtype
        ((3, 24, 24), dtype('uint16'))
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    return Dataset(paths[0]) if len(paths) == 1 else JoinedDataset(paths)


class JoinedDataset(Dataset):
    """The records of several datasets, one after the other.

    Columns absent from one are left out.
    """

    def __init__(self, paths: Sequence[Path | str]):
        """Open the datasets; see `open_dataset`."""
        self.parts = [Dataset(path) for path in paths]
        first = self.parts[0]
        for part in self.parts[1:]:
            _require_alike(first, part)
        self.path = Path(" and ".join(str(part.path) for part in self.parts))
        labels = {part.label_column for part in self.parts}
        # Datasets with different label columns can be joined; training then requires
        # --label-column.
        label_column = labels.pop() if len(labels) == 1 else ""
        self.provenance = {
            **first.provenance,
            "label_column": label_column,
            PIXEL_SIZES: _join_pixel_sizes(self.parts),
        }
        self.index = self._join_indices()
        self._site_ids = self.index["site_id"].to_numpy()
        # First position of each part, then the total number of records.
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def _join_indices(self) -> pd.DataFrame:
        # The inner join drops columns that a part does not have.
        index = pd.concat([part.index for part in self.parts], join="inner", ignore_index=True)
        if (duplicate := index["site_id"].duplicated()).any():
            raise InputError(
                f"--data: site {index['site_id'][duplicate].iloc[0]!r} occurs in two of "
                f"{self.path}. Pass datasets "
                "with different sites."
            )
        label = index[self.label_column] if self.label_column else [UNLABELLED] * len(index)
        # Each dataset has a different numbering of classes.
        numbers = pd.Series(label, index.index).astype(str).astype("category").cat.codes
        return index.assign(label=numbers.astype(np.int64))

    @property
    def paths(self) -> tuple[Path, ...]:
        """Directories of the datasets."""
        return tuple(part.path for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents, in this order."""
        return _combine(part.fingerprint for part in self.parts)

    @property
    def index_sha256(self) -> str:
        """SHA-256 of the index files."""
        return _combine(part.index_sha256 for part in self.parts)

    def _locate(self, position: int) -> tuple[Dataset, int]:
        # Last part that starts at or before the position.
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.parts[part], int(position - self._starts[part])

    def record(self, position: int) -> dict[str, Any]:
        """Decode one record; its `label` is a class number of the dataset that contains it."""
        part, within = self._locate(position)
        return part.record(within)

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        """Read image and mask of one record."""
        part, within = self._locate(position)
        return part.pixels(within)

    def nuclei(self, position: int) -> UInt16[np.ndarray, "h w"]:
        """Read the nuclei of one record."""
        if not self.has_nuclei:
            part = next(part for part in self.parts if not part.has_nuclei)
            raise InputError(f"{part.path}: has no nuclei; build it with --cells-channel CHANNEL")
        part, within = self._locate(position)
        return part.nuclei(within)


def _join_pixel_sizes(parts: Sequence[Dataset]) -> dict[str, float]:
    """Return the pixel size of each plate; plates on which parts differ are left out."""
    sizes: dict[str, set[float]] = {}
    for part in parts:
        for plate, size in part.pixel_sizes.items():
            sizes.setdefault(plate, set()).add(size)
    return {
        plate: max(values) for plate, values in sizes.items() if len(values) == 1 and all(values)
    }


def _combine(checksums: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(checksums).encode()).hexdigest()


def _require_alike(first: Dataset, other: Dataset) -> None:
    for name, expected, actual in (
        ("channels", ", ".join(first.channel_names), ", ".join(other.channel_names)),
        ("pixel type", first.image_dtype, other.image_dtype),
    ):
        if expected != actual:
            raise InputError(
                f"--data: {first.path} has {name} {expected}, {other.path} has {actual}. Pass "
                "datasets with the same "
                f"{name}."
            )

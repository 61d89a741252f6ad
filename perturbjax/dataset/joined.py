"""Several datasets as one: plates that were built apart train, and are judged, together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.dataset.reader import SiteDataset
from perturbjax.dataset.schema import UNLABELLED


class JoinedDataset(SiteDataset):
    """A `Dataset` of the records of several, one after the other. Columns that one of them lacks are left out."""

    def __init__(self, paths: Sequence[Path | str]):
        """See `open_dataset`.

        Raises:
            InputError: their channels or types of pixels differ, or a site stands in two of them.
        """
        self.parts = [SiteDataset(path) for path in paths]
        first = self.parts[0]
        for part in self.parts[1:]:
            _require_alike(first, part)
        self.path = Path(" and ".join(str(part.path) for part in self.parts))
        labels = {part.label_column for part in self.parts}
        self.provenance = {
            **first.provenance,
            "label_column": labels.pop() if len(labels) == 1 else "",
        }
        self.index = self._joined_index()
        self._site_ids = self.index["site_id"].to_numpy()
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def _joined_index(self) -> pd.DataFrame:
        index = pd.concat([part.index for part in self.parts], join="inner", ignore_index=True)
        twice = index["site_id"][index["site_id"].duplicated()]
        if len(twice):
            raise InputError(
                f"--data: site {twice.iloc[0]!r} stands in two of {self.path}; a site may stand only once"
            )
        label = (
            index[self.label_column].astype(str)
            if self.label_column
            else pd.Series(UNLABELLED, index.index)
        )
        return index.assign(
            label=label.astype("category").cat.codes.astype(np.int64)
        )  # each numbers its own classes

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its directories."""
        return tuple(part.path for part in self.parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it holds, in this order."""
        return _together(part.fingerprint for part in self.parts)

    @property
    def index_sha256(self) -> str:
        """SHA-256 of the files that its index was read from."""
        return _together(part.index_sha256 for part in self.parts)

    def _find(self, position: int) -> tuple[SiteDataset, int]:
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self.parts[part], int(position - self._starts[part])

    def record(self, position: int) -> dict[str, Any]:
        """One decoded record as stored; its `label` is a number of its own dataset's classes.

        Raises:
            InputError: the shards are damaged.
        """
        part, within = self._find(position)
        return part.record(within)

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        """Image and mask of one record, without its texts.

        Raises:
            InputError: the record is damaged, or is not the site that stands there in the index.
        """
        part, within = self._find(position)
        return part.pixels(within)


def _together(digests: Any) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _require_alike(first: SiteDataset, other: SiteDataset) -> None:
    for name, was, now in (
        ("channels", ", ".join(first.channel_names), ", ".join(other.channel_names)),
        ("pixels", first.image_dtype, other.image_dtype),
    ):
        if was != now:
            raise InputError(
                f"--data: {first.path} has {name} {was}, {other.path} has {now}; datasets that go together must agree"
            )

"""The record schema, in one place, and reading a prepared dataset directory.

A dataset directory is one TFDS dataset (`dataset_info.json`, `features.json`, ArrayRecord shards), plus
`index.parquet` (all metadata in record order, so that nothing decodes images to read labels) and
`provenance.json` (how it was made). Neither writing nor reading needs TensorFlow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pandas as pd
from jaxtyping import UInt, UInt16

from perturbjax.console import InputError
from perturbjax.files import read_json

#: Raised when a record's meaning changes; a directory of another version is refused.
SCHEMA_VERSION = "1.0.0"
#: The one TFDS split of a dataset directory; who trains and who judges is decided later, in `splits.py`.
SPLIT = "sites"
INDEX = "index.parquet"
PROVENANCE = "provenance.json"

#: Columns every `index.parquet` has beside `Metadata_*`. Per channel NAME it also has `mean_NAME`, `std_NAME`,
#: `p01_NAME`, `p50_NAME` and `p99_NAME`: statistics of the site's stored pixels, in stored units.
INDEX_COLUMNS = ("site_id", "label", "height", "width", "n_cells", "mask_area")
STATISTICS = ("mean", "std", "p01", "p50", "p99")
#: `Metadata_*` columns without which a plate cannot be laid out.
PLATE, WELL, SITE = "Metadata_Plate", "Metadata_Well", "Metadata_Site"


def record_features(
    *,
    channels: int,
    image_dtype: np.dtype | type[np.integer],
    label_names: Sequence[str],
    metadata_columns: Sequence[str],
) -> Any:
    """The TFDS features of one record.

    `image` (H, W, channels) uint8 or uint16; `mask` (H, W) uint16 instance labels, 0 is background; `site_id` unique
    text; `label` ClassLabel over `label_names`; every `Metadata_*` column as text.
    """
    import tensorflow_datasets as tfds

    def pixels(*shape: int | None, dtype: np.dtype) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="zlib")

    return tfds.features.FeaturesDict(
        {
            "image": pixels(None, None, channels, dtype=np.dtype(image_dtype)),
            "mask": pixels(None, None, dtype=np.dtype(np.uint16)),
            "site_id": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(label_names)),
            **{column: tfds.features.Text() for column in metadata_columns},
        }
    )


class SiteDataset:
    """A prepared dataset, opened for reading: records by position, metadata by column.

    Attributes:
        path: the directory.
        index: one row a record, in record order (see `INDEX_COLUMNS`); `Metadata_*` columns are text.
        provenance: how the directory was made (segmenter, weights' SHA-256, channels, aggregation …).
    """

    def __init__(self, path: Path | str):
        """Open a dataset directory; images are decoded only when asked for.

        Raises:
            InputError: the directory is missing, incomplete, or of another schema version.
        """
        self.path = Path(path)
        self.provenance = _read_provenance(self.path)
        self.index = pd.read_parquet(self.path / INDEX)
        records = len(self._source)
        if records != len(self.index):
            raise InputError(
                f"{self.path}: {INDEX} has {len(self.index)} rows for {records} records; build the dataset again"
            )

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(str(self.path))
            for shard in builder.info.splits[SPLIT].filepaths:
                Path(shard).stat()  # they are opened only when first read
            return builder.as_data_source(split=SPLIT)
        except Exception as error:  # tfds raises many kinds; to the user they all mean the same
            raise InputError(f"{self.path}: its shards cannot be read ({error}); build the dataset again") from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave open file handles behind, so that grain's workers each open their own."""
        return {key: value for key, value in self.__dict__.items() if key != "_source"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the shards at once: tfds, first imported by several reading threads together, can lock up."""
        self.__dict__.update(state)
        _ = self._source

    def __len__(self) -> int:
        return len(self.index)

    @property
    def channel_names(self) -> list[str]:
        """Names of the image's channels, in stored order; one aggregated channel is called `aggregate`."""
        return list(self.provenance["channels_stored"])

    @property
    def image_dtype(self) -> np.dtype:
        return np.dtype(self.provenance["image_dtype"])

    @property
    def label_column(self) -> str:
        """The column the dataset was built with as its label; training may choose any other."""
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
        if name not in self.index.columns:
            known = ", ".join(column for column in self.index.columns if column.startswith("Metadata_"))
            raise InputError(f"{self.path / INDEX}: no column {name!r}; it has {known}")
        return self.index[name]

    def record(self, position: int) -> dict[str, Any]:
        """One decoded record as stored (texts are bytes, as TFDS gives them).

        Raises:
            InputError: the shards are damaged.
        """
        with self._damage_told(position):
            return self._source[int(position)]

    @contextmanager
    def _damage_told(self, position: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what array_record and imagecodecs raise for damaged files
            raise InputError(
                f"{self.path}: record {position} cannot be read ({error}); build the dataset again"
            ) from error

    def read(
        self, positions: Sequence[int] | np.ndarray
    ) -> tuple[UInt[np.ndarray, "n h w c"], UInt16[np.ndarray, "n h w"]]:
        """Decode sites by position: images (n, H, W, C) in their stored dtype and masks (n, H, W) uint16."""
        height, width = self.image_size
        images = np.empty((len(positions), height, width, len(self.channel_names)), self.image_dtype)
        masks = np.empty((len(positions), height, width), np.uint16)
        for row, position in enumerate(positions):
            images[row], masks[row] = self.pixels(position)
        return images, masks

    def pixels(self, position: int) -> tuple[UInt[np.ndarray, "h w c"], UInt16[np.ndarray, "h w"]]:
        """Image and mask of one record, without its texts: what `record` gives, in less than half the time.

        The tensors are inflated by libdeflate, straight into their arrays; tfds uses Python's zlib.

        Raises:
            InputError: the shards are damaged.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        with self._damage_told(position):
            example = tf_example_pb2.Example.FromString(self._source.data_source[int(position)])
            fields = example.features.feature
            return _inflate(fields, "image", self.image_dtype), _inflate(fields, "mask", np.dtype(np.uint16))


def _inflate(fields: Mapping[str, Any], name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor as tfds serializes it under `encoding="zlib"`."""
    array = np.empty(tuple(fields[f"{name}/shape"].int64_list.value), dtype)
    (deflated,) = fields[f"{name}/value"].bytes_list.value
    imagecodecs.deflate_decode(deflated, out=array.reshape(-1).view(np.uint8))
    return array


def _read_provenance(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"{path}: no such dataset directory; make one with `python -m data_prep build --out {path}`")
    for name in (PROVENANCE, INDEX, "dataset_info.json"):
        if not (path / name).is_file():
            raise InputError(f"{path}: is not a complete dataset ({name} is missing); run `python -m data_prep build`")
    provenance = read_json(path / PROVENANCE)
    version = provenance.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path}: was built with schema version {version}, this program reads {SCHEMA_VERSION}; build it again"
        )
    return provenance

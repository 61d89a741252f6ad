"""The dataset as a TFDS builder: records streamed in order into ArrayRecord shards, without TensorFlow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, file_adapters, writer
from tensorflow_datasets.core.splits import SplitInfo

from perturbjax.dataset.schema import SCHEMA_VERSION, SPLIT, Contents

#: Pixels as stored, before compression, that one shard may hold.
SHARD_BYTES = 256 << 20

Record = dict[str, Any]


def record_features(contents: Contents) -> tfds.features.FeaturesDict:
    """The TFDS features of one record.

    `image` (H, W, channels) uint8 or uint16; `mask` (H, W) uint16 instance labels, 0 is background; `site_id` unique
    text; `label` ClassLabel over the label's classes; every `Metadata_*` column as text.
    """

    def pixels(*shape: int | None, dtype: np.dtype) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="zlib")

    return tfds.features.FeaturesDict(
        {
            "image": pixels(None, None, contents.channels, dtype=contents.image_dtype),
            "mask": pixels(None, None, dtype=np.dtype(np.uint16)),
            "site_id": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=list(contents.label_names)),
            **{column: tfds.features.Text() for column in contents.metadata_columns},
        }
    )


# Not registered: under its name tfds is to find the datasets on disk, not how they are made.
class CellSites(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # tfds untyped
    """One record a site, as `record_features` says, in the order of the site table."""

    VERSION = tfds.core.Version(SCHEMA_VERSION)

    def __init__(
        self,
        *,
        features: tfds.features.FeaturesDict,
        write: Callable[[list[Path], list[int]], int],
        count: int,
        pixel_bytes: int,
        **options: Any,
    ):
        """
        Args:
            features: of one record.
            write: makes the shards of these paths with so many records each; the bytes of all records.
            count: how many there will be.
            pixel_bytes: image and mask of all of them together, uncompressed.
            options: as tfds takes them (`data_dir`, `file_format`).
        """
        self._record_features = features
        self._write = write
        self._count = count
        self._shards = min(max(-(-pixel_bytes // SHARD_BYTES), 1), count)
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=self._record_features,
            disable_shuffling=True,
            description="Sites of cell images with instance masks and everything known of their wells.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Record]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Record]]:
        raise NotImplementedError("shards are written whole")

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[SplitInfo]:
        """Write each record as it comes.

        The inherited way gathers a whole split in memory, to shuffle it, and turns to TensorFlow's files beyond
        1 GB; a plate is tens of gigabytes, and its order is already the wanted one.
        """
        template = self._get_filename_template(split_name=SPLIT)
        lengths = [len(part) for part in np.array_split(np.arange(self._count), self._shards)]
        numbers = range(len(lengths))
        paths = [
            template.sharded_filepath(shard_index=shard, num_shards=len(lengths))
            for shard in numbers
        ]
        written = self._write([Path(path) for path in paths], lengths)
        return [
            SplitInfo(
                name=SPLIT, shard_lengths=lengths, num_bytes=written, filename_template=template
            )
        ]


def write_shard(path: Path, features: tfds.features.FeaturesDict, records: Iterable[Record]) -> int:
    """One shard; the bytes of its records."""
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    written = 0

    def serialized() -> Iterator[tuple[int, bytes]]:
        nonlocal written
        for key, record in enumerate(records):
            example = serializer.get_tf_example(features.encode_example(record))
            data = example.SerializeToString(
                deterministic=True
            )  # else the order of fields is each process's own
            written += len(data)
            yield key, data

    writer.ExampleWriter(file_format=file_adapters.FileFormat.ARRAY_RECORD).write(
        path, serialized()
    )
    return written


def in_order(
    features: tfds.features.FeaturesDict, records: Callable[[], Iterator[Record]]
) -> Callable[[list[Path], list[int]], int]:
    """What writes one shard after the other from one stream of records."""

    def write(paths: list[Path], lengths: list[int]) -> int:
        stream, written = records(), 0
        for path, length in zip(paths, lengths, strict=True):
            written += write_shard(path, features, itertools.islice(stream, length))
        next(stream, None)  # runs the generator to its end, so that its progress closes
        return written

    return write


def write_shards(folder: Path, **builder: Any) -> Path:
    """Run the builder below `folder`; the folder of the one version it wrote."""
    tfds.disable_progress_bar()
    cell_sites = CellSites(data_dir=str(folder), file_format="array_record", **builder)
    cell_sites.download_and_prepare()
    return Path(cell_sites.data_dir)

"""Write records into ArrayRecord shards that TFDS reads, without TensorFlow.

Format. A shard is an ArrayRecord file: a Riegeli container of chunks with an index of chunk
positions, which gives random access by record number. Each chunk holds one record (`group_size:1`).
A record is a serialized `tf.train.Example`, a protocol buffer that TFDS defines in Python, so that
TensorFlow is not needed. A tensor is stored in two fields, `image/shape` and `image/value`: its
bytes as a zlib stream. `features.json` and `dataset_info.json` describe the fields and the number
of records of each shard.

Compression. TFDS compresses tensors with zlib at level 6, which takes most of the writing time.
Images with camera noise do not become smaller at higher levels. Here tensors are compressed with
ISA-L at level 1 (package `isal`; else libdeflate), several records at a time in threads. The result
is a zlib stream too, so every reader is served. Pixels and checksums of pixels do not depend on the
compressor, but the bytes of shards do: they are identical for the same versions of `isal` and this
package on any number of threads or workers, and can differ between versions. Chunks are not
compressed again.

Memory. The TFDS builder collects a whole split in memory to shuffle it. `CellSites` overrides this:
records are written one by one in the order of the site table.
"""

from __future__ import annotations

import collections
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.splits import SplitInfo

from perturbjax.core.errors import InputError
from perturbjax.dataset.schema import (
    NUCLEI,
    SCHEMA_VERSION,
    SPLIT,
    DatasetPlan,
    metadata_columns,
)

try:
    from isal import isal_zlib
except ImportError:  # no wheel for this platform
    isal_zlib = None  # type: ignore[assignment]

#: Maximum uncompressed size of the pixels in one shard, in bytes.
SHARD_BYTES = 256 << 20
#: Maximum number of threads that compress records.
MAX_THREADS = 4

Record = dict[str, Any]
#: Writes the shards at these paths with these numbers of records; returns the bytes of all records.
ShardsWriter = Callable[[list[Path], list[int]], int]


def compress_tensor(array: np.ndarray) -> bytes:
    """Compress the bytes of an array as a zlib stream."""
    # The compressors read the buffer in memory order, which must be the order of the axes.
    array = np.ascontiguousarray(array)
    if isal_zlib is not None:
        return isal_zlib.compress(array, 1)
    return imagecodecs.deflate_encode(array.tobytes(), level=1, raw=False)


class _FastTensor(tfds.features.Tensor):
    """The TFDS feature of a zlib tensor, with a faster compressor of the same format."""

    def encode_example(self, example_data: np.ndarray) -> dict[str, Any]:
        if example_data.dtype != self.np_dtype or example_data.ndim != len(self.shape):
            raise ValueError(f"expected {self.np_dtype} pixels of shape {self.shape}")
        return {"value": compress_tensor(example_data), "shape": example_data.shape}


def record_features(
    plan: DatasetPlan, tensor: type[tfds.features.Tensor] = tfds.features.Tensor
) -> tfds.features.FeaturesDict:
    """Return the TFDS features of a record.

    `image` (H, W, C) uint8 or uint16; `mask` (H, W) uint16 instance labels; optional `nuclei` (H,
    W) uint16 labels of the nuclei; `site_id` unique text; `label` ClassLabel; each `Metadata_*`
    column as text.

    Args:
        plan: the dataset.
        tensor: class of the features of image and mask.
    """

    def pixels(*shape: int | None, dtype: np.dtype) -> tfds.features.Tensor:
        return tensor(shape=shape, dtype=dtype, encoding="zlib")

    labels = pixels(None, None, dtype=np.dtype(np.uint16))
    return tfds.features.FeaturesDict(
        {
            # Height and width are not fixed, because sites of one dataset can differ in size.
            "image": pixels(None, None, len(plan.channel_names), dtype=plan.image_dtype),
            "mask": labels,
            **({NUCLEI: labels} if plan.has_nuclei else {}),
            "site_id": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=plan.class_names),
            **{name: tfds.features.Text() for name in metadata_columns(plan.table.columns)},
        }
    )


# Not registered: this name must lead TFDS to the datasets on disk, not to this class.
class CellSites(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # tfds untyped
    """TFDS builder with one record for each site, in the order of the site table."""

    VERSION = tfds.core.Version(SCHEMA_VERSION)

    def __init__(self, *, plan: DatasetPlan, write: ShardsWriter, **options: Any):
        """
        Args:
            plan: the dataset.
            write: writes all shards.
            options: of TFDS (`data_dir`, `file_format`).
        """
        self._plan, self._write = plan, write
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=record_features(self._plan),
            disable_shuffling=True,
            description="Sites of cell images with instance masks and metadata of their wells.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Record]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Record]]:
        raise NotImplementedError("shards are written by `_generate_splits`")

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[SplitInfo]:
        """Write all shards directly (see the module header)."""
        count = len(self._plan.table)
        # Rounded up, with at least one record for each shard.
        shards = min(max(-(-self._plan.pixel_bytes // SHARD_BYTES), 1), count)
        lengths = [len(part) for part in np.array_split(np.arange(count), shards)]
        template = self._get_filename_template(split_name=SPLIT)
        paths = [
            Path(template.sharded_filepath(shard_index=number, num_shards=shards))
            for number in range(shards)
        ]
        written = self._write(paths, lengths)
        # TFDS stores this description in `dataset_info.json`.
        return [
            SplitInfo(
                name=SPLIT, shard_lengths=lengths, num_bytes=written, filename_template=template
            )
        ]


def write_shard(path: Path, plan: DatasetPlan, records: Iterable[Record]) -> int:
    """Write one shard.

    Args:
        path: file to write.
        plan: the dataset that the records belong to.
        records: `image`, `mask`, optional `nuclei`, `label`, `site_id` and `Metadata_*` of each
            site.

    Returns:
        Bytes of its records.
    """
    features = record_features(plan, _FastTensor)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(record: Record) -> bytes:
        example = serializer.get_tf_example(features.encode_example(record))
        # Otherwise the order of fields differs between processes.
        return example.SerializeToString(deterministic=True)

    written = 0
    writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
    for data in _map_ahead(serialize, records):
        writer.write(data)
        written += len(data)
    writer.close()
    return written


def _map_ahead(function: Callable[[Record], bytes], records: Iterable[Record]) -> Iterator[bytes]:
    """Apply a function in threads, in order; at most one record per thread waits in memory."""
    count = min(os.cpu_count() or 1, MAX_THREADS)
    pending: collections.deque[Any] = collections.deque()
    with ThreadPoolExecutor(count) as threads:
        for record in records:
            pending.append(threads.submit(function, record))
            # Wait for the oldest record before the next one is decoded, which limits the memory.
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_in_order(plan: DatasetPlan, records: Iterator[Record]) -> ShardsWriter:
    """Return a function that writes one shard after the other from one stream of records."""

    def write(paths: list[Path], lengths: list[int]) -> int:
        written = 0
        for path, length in zip(paths, lengths, strict=True):
            written += write_shard(path, plan, itertools.islice(records, length))
        next(records, None)  # ends the generator, so that its progress bar closes
        return written

    return write


def write_shards(folder: Path, plan: DatasetPlan, write: ShardsWriter) -> None:
    """Write all shards and the TFDS description of a dataset into a folder.

    Raises:
        InputError: the disk is full, or a file cannot be written.
    """
    tfds.disable_progress_bar()
    with redirect_stdout(StringIO()), convert_disk_errors(folder):  # TFDS prints to stdout
        builder = CellSites(
            plan=plan, write=write, data_dir=str(folder / "tfds"), file_format="array_record"
        )
        builder.download_and_prepare()
    for file in sorted(Path(builder.data_dir).iterdir()):
        # TFDS writes into NAME/VERSION below its data folder; a dataset directory has no such
        # levels.
        file.rename(folder / file.name)
    shutil.rmtree(folder / "tfds")


@contextmanager
def convert_disk_errors(folder: Path) -> Iterator[None]:
    """Raise an InputError where array_record fails to write."""
    try:
        yield
    except RuntimeError as error:  # contains the error message of the system
        reason = re.search(r"\w+\(\) failed: ([^;]*)", str(error))
        if reason is None:
            raise
        raise InputError(
            f"{folder}: cannot be written ({reason[1]}). Free disk space and run the command again."
        ) from error

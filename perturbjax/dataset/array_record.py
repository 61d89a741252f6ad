"""Read records of a dataset directory from ArrayRecord shards (see `shards.py` for the format)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.files import read_json
from perturbjax.dataset.schema import NUCLEI, SPLIT

INFO, FEATURES = "dataset_info.json", "features.json"
#: TFDS feature classes of a record, and the JSON key of their description. TFDS imports the module
#: of each class that `features.json` names. A file with any other class is therefore refused before
#: TFDS reads it.
FEATURE_CLASSES = {
    "tensorflow_datasets.core.features.tensor_feature.Tensor": "tensor",
    "tensorflow_datasets.core.features.text_feature.Text": "text",
    "tensorflow_datasets.core.features.class_label_feature.ClassLabel": "classLabel",
}
ALL_FEATURES = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
#: Maximum ratio of output to input bytes of the deflate format.
DEFLATE_RATIO = 1032


class ArrayRecordReader:
    """Records of a dataset directory by position. It can be pickled.

    Raises:
        InputError: the files are not those of a dataset, or cannot be read.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._source = _open(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out file handles: each grain worker opens its own."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the shards at once, since importing tfds from several threads can deadlock."""
        self.path = state["path"]
        self._source = _open(self.path)

    def __len__(self) -> int:
        return len(self._source)

    def record(self, position: int) -> dict[str, Any]:
        """Decode one record with TFDS; texts are bytes."""
        return self._source[int(position)]

    def read(
        self, position: int, shape: tuple[int, int, int], dtype: np.dtype
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """Read `site_id`, `image` and `mask`, in less than half the time of `record`.

        libdeflate decompresses tensors directly into their arrays; TFDS uses the zlib of Python.

        Args:
            position: record number.
            shape: expected shape of the image; checked before memory is allocated.
            dtype: type of its pixels.
        """
        site_id, fields = self._fields(position)
        image = _decompress(fields, "image", shape, dtype)
        return site_id, image, _decompress(fields, "mask", shape[:2], np.dtype(np.uint16))

    def read_nuclei(self, position: int, shape: tuple[int, int]) -> tuple[str, np.ndarray]:
        """Read `site_id` and `nuclei` (H, W) uint16 of a record.

        Args:
            position: record number.
            shape: expected height and width; checked before memory is allocated.
        """
        site_id, fields = self._fields(position)
        return site_id, _decompress(fields, NUCLEI, shape, np.dtype(np.uint16))

    def _fields(self, position: int) -> tuple[str, Mapping[str, Any]]:
        """Return `site_id` and the compressed fields of a record."""
        from tensorflow_datasets.proto import tf_example_pb2

        # `data_source` gives the serialized record, which the TFDS source would decode.
        example = tf_example_pb2.Example.FromString(self._source.data_source[int(position)])
        fields = example.features.feature
        return fields["site_id"].bytes_list.value[0].decode(), fields


def _open(path: Path) -> Any:
    # This check comes first, because TFDS imports modules that the file names.
    check_features(path / FEATURES)
    if not isinstance(read_json(path / INFO), dict):
        raise InputError(f"{path / INFO}: not a TFDS description; build the dataset again")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(path))
        for shard in map(Path, builder.info.splits[SPLIT].filepaths):
            # A manipulated description must not make TFDS read files elsewhere.
            if shard.parent.resolve() != path.resolve():
                raise InputError(f"{path / INFO}: names the shard {shard}, outside the dataset")
            shard.stat()  # TFDS opens shards only when they are read
        return builder.as_data_source(split=SPLIT)
    except InputError:
        raise
    except Exception as error:  # tfds raises many types
        raise InputError(
            f"{path}: its shards cannot be read ({error}); build the dataset again"
        ) from error


def check_features(file: Path) -> None:
    """Refuse a `features.json` with other features than `shards.record_features`.

    Raises:
        InputError: the file has other features, or is not such a file.
    """
    described = read_json(file, object_pairs_hook=_unique_keys)
    try:
        members = described["featuresDict"]["features"]
        valid = set(described) <= {"featuresDict", "pythonClassName", "protoCls"}
        valid &= described["pythonClassName"] == ALL_FEATURES
        valid &= set(described["featuresDict"]) == {"features"}
        for feature in members.values():
            # An unknown class gives None, which is never a JSON key, so the comparison fails.
            key = FEATURE_CLASSES.get(feature["pythonClassName"])
            valid &= set(feature) == {"pythonClassName", key}
    except (KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise InputError(
            f"{file}: contains features that perturbjax does not write. The dataset was not opened."
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers differ in which of two equal keys they use. TFDS could read another value than the one
    # checked here.
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _decompress(
    fields: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Decompress a tensor that TFDS stores with `encoding="zlib"`."""
    stored_shape = tuple(fields[f"{name}/shape"].int64_list.value)
    if stored_shape != shape:
        raise ValueError(f"{name} has shape {stored_shape}, the index says {shape}")
    (compressed,) = fields[f"{name}/value"].bytes_list.value
    # The allocation reserves address space only; damaged records are refused before it is filled.
    array = np.empty(shape, dtype)
    if array.nbytes > DEFLATE_RATIO * len(compressed):
        raise ValueError(f"{name} is too short for its shape")
    # The decoder writes its output directly into the array.
    flat = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    if len(imagecodecs.deflate_decode(compressed, out=flat)) != len(flat):
        raise ValueError(f"{name} has fewer pixels than its shape")
    return array

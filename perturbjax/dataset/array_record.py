"""Pixels in ArrayRecord shards, as TFDS keeps them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, read_json
from perturbjax.dataset.schema import SPLIT, Contents

INFO, FEATURES = "dataset_info.json", "features.json"
#: Every TFDS feature of a record, and the one key beside `pythonClassName` that describes it. TFDS imports the module
#: of whatever class `features.json` names, so a file that names another one is never shown to it.
FEATURE_CLASSES = {
    "tensorflow_datasets.core.features.tensor_feature.Tensor": "tensor",
    "tensorflow_datasets.core.features.text_feature.Text": "text",
    "tensorflow_datasets.core.features.class_label_feature.ClassLabel": "classLabel",
}
ALL_FEATURES = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
#: No stream of deflate gives more bytes for each of its own.
DEFLATE_RATIO = 1032


class ArrayRecordPixels:
    """The records of a dataset directory, by position."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._source = _open(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """Leave open file handles behind, so that grain's workers each open their own."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the shards at once: tfds, first imported by several reading threads together, can lock up."""
        self.path = state["path"]
        self._source = _open(self.path)

    def __len__(self) -> int:
        return len(self._source)

    def record(self, position: int) -> dict[str, Any]:
        """One decoded record as stored (texts are bytes, as TFDS gives them)."""
        return self._source[int(position)]

    def read(
        self, position: int, shape: tuple[int, int, int], dtype: np.dtype
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """What `record` gives of `site_id`, `image` and `mask`, in less than half the time.

        The tensors are inflated by libdeflate, straight into their arrays; tfds uses Python's zlib.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(self._source.data_source[int(position)])
        fields = example.features.feature
        site_id = fields["site_id"].bytes_list.value[0].decode()
        image = _inflate(fields, "image", shape, dtype)
        return site_id, image, _inflate(fields, "mask", shape[:2], np.dtype(np.uint16))


def open_pixels(path: Path) -> ArrayRecordPixels:
    """The pixels of a dataset directory.

    Raises:
        InputError: its files are not those of a dataset, or cannot be read.
    """
    return ArrayRecordPixels(path)


def write_pixels(
    folder: Path,
    records: Callable[[], Iterator[dict[str, Any]]],
    contents: Contents,
    elsewhere: Callable[[list[Path], list[int]], int] | None = None,
) -> None:
    """Write all records into shards directly below `folder`; where shards are made `elsewhere`, by that."""
    from perturbjax.dataset.shards import in_order, record_features, write_shards

    features = record_features(contents)

    with redirect_stdout(StringIO()), _full_disk_told(folder):  # tfds announces itself on stdout
        written = write_shards(
            folder / "tfds",
            features=features,
            write=elsewhere or in_order(features, records),
            count=contents.count,
            pixel_bytes=contents.pixel_bytes,
        )
    for file in sorted(written.iterdir()):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "tfds")


def write_one_shard(path: Path, records: Iterator[dict[str, Any]], contents: Contents) -> int:
    """A shard under its final name, whole or not at all: two that make the same one do not meet. Its records' bytes."""
    from perturbjax.dataset.shards import record_features, write_shard

    with _full_disk_told(path.parent), atomic(path) as temporary:
        return write_shard(temporary, record_features(contents), records)


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what array_record raises, with the system's words in it
        reason = re.search(r"\w+\(\) failed: ([^;]*)", str(error))
        if reason is None:
            raise
        raise InputError(
            f"{folder}: cannot be written ({reason[1]}); make room and run it again"
        ) from error


def _open(path: Path) -> Any:
    check_features(path / FEATURES)
    if not isinstance(read_json(path / INFO), dict):
        raise InputError(f"{path / INFO}: is not the file of a dataset; build the dataset again")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(path))
        for shard in map(Path, builder.info.splits[SPLIT].filepaths):
            if shard.parent.resolve() != path.resolve():
                raise InputError(f"{path / INFO}: names the shard {shard}, outside the dataset")
            shard.stat()  # they are opened only when first read
        return builder.as_data_source(split=SPLIT)
    except InputError:
        raise
    except Exception as error:  # tfds raises many kinds; to the user they all mean the same
        raise InputError(
            f"{path}: its shards cannot be read ({error}); build the dataset again"
        ) from error


def check_features(file: Path) -> None:
    """Refuse a `features.json` that names anything but the features of our records.

    Raises:
        InputError: it does, or is no such file.
    """
    described = read_json(file, object_pairs_hook=_no_key_twice)
    try:
        members = described["featuresDict"]["features"]
        ours = set(described) <= {"featuresDict", "pythonClassName", "protoCls"}
        ours &= described["pythonClassName"] == ALL_FEATURES and set(described["featuresDict"]) == {
            "features"
        }
        for feature in members.values():
            ours &= set(feature) == {
                "pythonClassName",
                FEATURE_CLASSES.get(feature["pythonClassName"]),
            }
    except (KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise InputError(
            f"{file}: names features that no dataset of this program has; it was not opened"
        )


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _inflate(
    fields: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """A tensor as tfds serializes it under `encoding="zlib"`."""
    if (found := tuple(fields[f"{name}/shape"].int64_list.value)) != shape:
        raise ValueError(f"{name} is {found}, the index says {shape}")
    (deflated,) = fields[f"{name}/value"].bytes_list.value
    array = np.empty(shape, dtype)
    if array.nbytes > DEFLATE_RATIO * len(deflated):
        raise ValueError(f"{name} is too short for its shape")
    flat = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    if len(imagecodecs.deflate_decode(deflated, out=flat)) != len(flat):
        raise ValueError(f"{name} ends before its shape does")
    return array

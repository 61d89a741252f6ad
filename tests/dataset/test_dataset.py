"""A dataset is what was written, or it does not open; and how pixels are stored is one file's business."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset as write_tiny

from perturbjax import dataset as module
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest
from perturbjax.dataset import SCHEMA_VERSION, SPLIT, open_dataset
from perturbjax.dataset import reader as opened
from perturbjax.dataset.array_record import FEATURES, check_features
from perturbjax.verify import verify

NPZ_FORMAT = '''
"""Pixels in one .npz a site: all that another storage format takes."""
import numpy as np

class NpzPixels:
    def __init__(self, path):
        self.path, self.names = path, sorted(path.glob("*.npz"))
    def __len__(self):
        return len(self.names)
    def record(self, position):
        with np.load(self.names[position]) as file:
            return {name: value[()] for name, value in file.items()}
    def read(self, position, shape, dtype):
        record = self.record(position)
        return str(record["site_id"]), record["image"], record["mask"]

def open_pixels(path):
    return NpzPixels(path)

def write_pixels(folder, records, contents):
    for number, record in enumerate(records()):
        np.savez(folder / f"{number:06d}.npz", **record)
'''


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("tiny") / "data", sites=30, size=24, channels=["DNA", "Actin"]
    )


@pytest.fixture
def spoilt(tiny, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(tiny, tmp_path / "data"))


def forge(path: Path, **changes) -> None:
    """Make a changed dataset look untouched: every digest of its provenance is that of the file there."""
    provenance = json.loads((path / "provenance.json").read_text()) | changes
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": file_digest(path / name)}
        for name in provenance["files"]
    }
    provenance |= {"files": files, "content_sha256": opened.content_digest(files)}
    (path / "provenance.json").write_text(json.dumps(provenance))


def test_another_storage_format_is_one_file_and_one_name(tmp_path, monkeypatch):
    (tmp_path / "npz_pixels.py").write_text(NPZ_FORMAT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(opened.FORMATS, "npz", "npz_pixels")
    random = np.random.default_rng(0)
    images = random.integers(0, 60_000, (5, 8, 9, 1), dtype=np.uint16)
    masks = random.integers(0, 3, (5, 8, 9), dtype=np.uint16)
    table = pd.DataFrame({"site_id": list("abcde"), "Metadata_moa": ["x", "y", "x", "y", "x"]})
    module.write_dataset(
        tmp_path / "data",
        table,
        map(module.SitePixels, images, masks),
        channel_names=["DNA"],
        image_dtype=np.uint16,
        label_column="Metadata_moa",
        format="npz",
    )
    dataset = pickle.loads(pickle.dumps(open_dataset(tmp_path / "data")))
    assert len(dataset) == 5 and dataset.image_size == (8, 9) and dataset.channel_names == ["DNA"]
    assert list(dataset.positions(["d", "a"])) == [3, 0]
    for found, expected in zip(dataset.read(range(5)), (images, masks), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.savez(tmp_path / "data/000001.npz", site_id="c", image=images[2], mask=masks[2])
    forge(tmp_path / "data")
    with pytest.raises(InputError, match=r"record 1 is site 'c', index\.parquet says 'b'"):
        open_dataset(tmp_path / "data").pixels(1)


def test_the_fingerprint_is_of_what_is_held_and_not_of_when(tiny, tmp_path):
    again = write_tiny(tmp_path / "again", sites=30, size=24, channels=["DNA", "Actin"])
    other = write_tiny(tmp_path / "other", sites=30, size=24, channels=["DNA", "Tubulin"])
    assert open_dataset(again).fingerprint == open_dataset(tiny).fingerprint
    assert open_dataset(other).fingerprint != open_dataset(tiny).fingerprint


def test_a_site_that_is_not_there_is_named(tiny):
    dataset = open_dataset(tiny)
    assert list(dataset.positions(["site7", "site0"])) == [7, 0]
    with pytest.raises(InputError, match="has no site 'site99'"):
        dataset.positions(["site7", "site99"])


def reversed_index(path: Path) -> None:
    pd.read_parquet(path / "index.parquet").iloc[::-1].to_parquet(
        path / "index.parquet", index=False
    )


def rolled_labels(path: Path) -> None:
    index = pd.read_parquet(path / "index.parquet")
    index["label"] = np.roll(index["label"], 1)
    index.to_parquet(path / "index.parquet", index=False)


@pytest.mark.parametrize("change", [reversed_index, rolled_labels])
def test_a_changed_index_does_not_open(spoilt, change):
    change(spoilt)
    with pytest.raises(
        InputError, match=r"index\.parquet: (is not what was written|has \d+ bytes)"
    ):
        open_dataset(spoilt)


def test_an_index_in_another_order_is_found_out_by_the_first_record_even_where_digests_were_forged(
    spoilt,
):
    reversed_index(spoilt)
    forge(spoilt)
    with pytest.raises(InputError, match=r"record 0 is site 'site0', index\.parquet says 'site29'"):
        open_dataset(spoilt).pixels(0)


def damaged_index(path: Path, how: str) -> None:
    file = path / "index.parquet"
    data = bytearray(file.read_bytes())
    match how:
        case "cut":
            data = data[: len(data) // 2]
        case "noise":
            data = np.random.default_rng(0).bytes(5000)
        case "flipped":
            data[len(data) // 2] ^= 8
        case "table":
            pd.DataFrame({"a": [1]}).to_parquet(file)
            return
        case "twice":
            index = pd.read_parquet(file)
            pd.concat([index[:-1], index[:1]]).to_parquet(file)
            return
        case "size":
            pd.read_parquet(file).assign(height=60_000, width=60_000).to_parquet(file)
            return
    file.write_bytes(data)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("how", ["cut", "noise", "flipped", "table", "twice", "size"])
def test_a_damaged_index_is_one_line(spoilt, how, forged):
    damaged_index(spoilt, how)
    if forged:
        forge(spoilt)
    if (
        forged and how == "flipped"
    ):  # may be anything, even nothing: only the digest knows, and it was forged
        return
    with pytest.raises(InputError, match=r"index\.parquet"):
        open_dataset(spoilt)


@pytest.mark.parametrize("name", ["provenance.json", "dataset_info.json", "features.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[1]", "3", '"text"', "null", "{", "\0", "{}", '{"files": 3}']
)
def test_json_of_another_kind_is_one_line(spoilt, name, text):
    (spoilt / name).write_text(text)
    if name != "provenance.json":
        forge(spoilt)
    with pytest.raises(InputError, match=str(spoilt)):
        open_dataset(spoilt)


@pytest.mark.parametrize(
    "files", [{}, {"../x": {"bytes": 1, "sha256": ""}}, {"index.parquet": 3}, []]
)
def test_provenance_that_names_no_files_of_its_own_is_refused(spoilt, files):
    provenance = json.loads((spoilt / "provenance.json").read_text())
    (spoilt / "provenance.json").write_text(json.dumps({**provenance, "files": files}))
    with pytest.raises(InputError, match="files is missing or is not what a dataset has"):
        open_dataset(spoilt)


def test_a_shard_cut_at_a_multiple_of_64_kib_does_not_open(tmp_path):
    path = write_tiny(tmp_path / "data", sites=30, size=64, channels=["DNA", "Actin"])
    shard = next(path.glob("*array_record*"))
    assert shard.stat().st_size > 3 << 16
    with open(shard, "r+b") as file:
        file.truncate(2 << 16)
    with pytest.raises(InputError, match=r"is cut short"):
        open_dataset(path)
    forge(path)
    with pytest.raises(InputError, match=str(path)):
        dataset = open_dataset(path)
        for position in range(len(dataset)):
            dataset.pixels(position)


def test_features_name_no_code_of_a_stranger(spoilt, tmp_path, monkeypatch):
    """tfds imports the module of every class that features.json names."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Text: pass\n"
    )
    text = (spoilt / FEATURES).read_text()
    (spoilt / FEATURES).write_text(
        text.replace("tensorflow_datasets.core.features.text_feature.Text", "stranger.Text")
    )
    forge(spoilt)
    with pytest.raises(InputError, match=r"features\.json: names features that no dataset"):
        open_dataset(spoilt)
    assert not (tmp_path / "ran").exists() and "stranger" not in sys.modules


def hidden(features: dict, how: str) -> str:
    evil = {"pythonClassName": "stranger.Text", "text": {}}
    members = features["featuresDict"]["features"]
    match how:
        case "other spelling":
            members["site_id"] = {"python_class_name": "stranger.Text", "text": {}}
        case "both spellings":
            members["site_id"]["python_class_name"] = "stranger.Text"
        case "nested":
            members["site_id"] = {
                "pythonClassName": features["pythonClassName"],
                "featuresDict": {"features": {"a": evil}},
            }
        case "in a tensor":
            members["image"]["sequence"] = {"feature": evil}
        case "old form":
            return json.dumps({"type": "stranger.Text", "content": {}})
        case "twice":
            text = json.dumps(features)
            return text.replace('"text": {}', '"text": {}, "pythonClassName": "stranger.Text"', 1)
        case "list":
            features["featuresDict"]["features"] = [evil]
        case "top":
            features["pythonClassName"] = "stranger.Text"
    return json.dumps(features)


@pytest.mark.parametrize(
    "how",
    [
        "other spelling",
        "both spellings",
        "nested",
        "in a tensor",
        "old form",
        "twice",
        "list",
        "top",
    ],
)
def test_no_spelling_hides_a_strangers_class(tiny, tmp_path, how):
    text = hidden(json.loads((tiny / FEATURES).read_text()), how)
    (tmp_path / FEATURES).write_text(text)
    with pytest.raises(InputError, match=r"names features that no dataset|a key stands twice"):
        check_features(tmp_path / FEATURES)


def test_a_shard_outside_the_dataset_is_not_read(spoilt):
    info = json.loads((spoilt / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (spoilt / "dataset_info.json").write_text(json.dumps(info))
    forge(spoilt)
    with pytest.raises(InputError, match=r"outside the dataset|cannot be read"):
        open_dataset(spoilt)


def test_verify_finds_what_it_wrote_whole(tiny):
    assert verify(tiny) == "30 sites and 5 files are what was written"


def test_verify_finds_a_flipped_bit_of_a_shard(spoilt):
    shard = next(spoilt.glob("*array_record*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="is not what was written there"):
        verify(spoilt)


@pytest.mark.parametrize("column", ["label", "n_cells", "Metadata_Well", "mean_Actin"])
def test_verify_finds_an_index_that_says_other_than_the_records(spoilt, column):
    index = pd.read_parquet(spoilt / "index.parquet")
    index[column] = np.roll(index[column], 4)
    index.loc[7, "n_cells"] += column == "n_cells"
    index.to_parquet(spoilt / "index.parquet", index=False)
    forge(spoilt)
    with pytest.raises(
        InputError, match=rf"record \d+ .site\d+. has ({column}|other intensities in Actin)"
    ):
        verify(spoilt)


def test_verify_says_where_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(InputError, match="nothing there can be verified"):
        verify(tmp_path)


def test_tfds_finds_a_dataset_by_name_and_folder_without_tensorflow(tiny, tmp_path):
    import tensorflow_datasets as tfds

    (tmp_path / "cell_sites").mkdir()
    (tmp_path / "cell_sites" / SCHEMA_VERSION).symlink_to(tiny)
    source = tfds.data_source("cell_sites", data_dir=str(tmp_path), split=SPLIT)
    ours = open_dataset(tiny)
    assert len(source) == len(ours)
    np.testing.assert_array_equal(source[3]["image"], ours[3]["image"])
    assert source[3]["site_id"].decode() == ours[3]["site_id"] and "tensorflow" not in sys.modules

"""A dataset opens only if its files are those that were written."""

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
from perturbjax.dataset.array_record import FEATURES, check_features
from perturbjax.dataset.reader import content_digest
from perturbjax.verify import verify


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny(
        tmp_path_factory.mktemp("tiny") / "data", sites=30, size=24, channels=["DNA", "Actin"]
    )


@pytest.fixture
def damaged(tiny, tmp_path) -> Path:
    """A copy of the dataset that a test can damage."""
    return Path(shutil.copytree(tiny, tmp_path / "data"))


def forge(path: Path, **changes) -> None:
    """Update the checksums of the provenance, so that a changed dataset looks unchanged."""
    provenance = json.loads((path / "provenance.json").read_text()) | changes
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": file_digest(path / name)}
        for name in provenance["files"]
    }
    provenance |= {"files": files, "content_sha256": content_digest(files)}
    (path / "provenance.json").write_text(json.dumps(provenance))


@pytest.mark.parametrize("compressor", ["isal", "libdeflate"])
def test_compressors_give_records_that_tfds_and_the_reader_decode(
    tmp_path, monkeypatch, compressor
):
    """ISA-L, or libdeflate where ISA-L is not installed, with noise, constants and odd sizes."""
    import tensorflow_datasets as tfds

    from perturbjax.dataset import shards

    if compressor == "libdeflate":
        monkeypatch.setattr(shards, "isal_zlib", None)
    random = np.random.default_rng(0)
    images = random.integers(0, 60_000, (13, 31, 45, 3), dtype=np.uint16)
    images[4:8] = 7
    masks = random.integers(0, 3, (13, 31, 45), dtype=np.uint16)
    names = [f"s{number}" for number in range(13)]
    table = pd.DataFrame({"site_id": names, "Metadata_moa": [*"xyxyxyxyxyxyx"]})
    module.write_dataset(
        tmp_path / "data",
        table,
        # Views with other strides are stored like contiguous arrays.
        (
            module.SitePixels(image[:, ::-1], mask[::-1])
            for image, mask in zip(images, masks, strict=True)
        ),
        channel_names=["DNA", "ER", "Mito"],
        image_dtype=np.uint16,
        label_column="Metadata_moa",
        pixel_bytes=3 * shards.SHARD_BYTES - 1,
    )
    source = tfds.builder_from_directory(str(tmp_path / "data")).as_data_source(split=SPLIT)
    dataset = pickle.loads(pickle.dumps(open_dataset(tmp_path / "data")))
    assert len(list((tmp_path / "data").glob("*array_record*"))) == 3 and len(source) == 13
    for position, record in enumerate(source):
        assert record["site_id"].decode() == names[position]
        assert record["label"] == position % 2
        np.testing.assert_array_equal(record["image"], images[position][:, ::-1])
        np.testing.assert_array_equal(record["mask"], masks[position][::-1])
        image, mask = dataset.pixels(position)
        np.testing.assert_array_equal(image, record["image"])
        np.testing.assert_array_equal(mask, record["mask"])
    assert verify(tmp_path / "data") == "13 sites and 7 files are unchanged"


def test_shard_bytes_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch):
    from perturbjax.dataset import shards

    fingerprints = []
    for threads in (1, 4):
        monkeypatch.setattr(shards, "MAX_THREADS", threads)
        path = write_tiny(tmp_path / str(threads), sites=30, size=24, channels=["DNA"])
        fingerprints.append(open_dataset(path).fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_written_pixels_must_have_the_planned_type(tmp_path):
    sites = [module.SitePixels(np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8), np.uint16))]
    table = pd.DataFrame({"site_id": ["a"], "Metadata_moa": ["x"]})
    facts = {"channel_names": ["DNA"], "image_dtype": np.uint16, "label_column": "Metadata_moa"}
    with pytest.raises(ValueError, match="expected uint16 pixels"):
        module.write_dataset(tmp_path / "data", table, sites, **facts)
    with pytest.raises(InputError, match="is not a complete dataset"):
        open_dataset(tmp_path / "data")


def test_fingerprint_depends_on_contents_only(tiny, tmp_path):
    again = write_tiny(tmp_path / "again", sites=30, size=24, channels=["DNA", "Actin"])
    other = write_tiny(tmp_path / "other", sites=30, size=24, channels=["DNA", "Tubulin"])
    assert open_dataset(again).fingerprint == open_dataset(tiny).fingerprint
    assert open_dataset(other).fingerprint != open_dataset(tiny).fingerprint


def test_positions_names_an_absent_site(tiny):
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
def test_open_dataset_rejects_changed_index(damaged, change):
    change(damaged)
    with pytest.raises(InputError, match=r"index\.parquet: (was changed|has \d+ bytes)"):
        open_dataset(damaged)


def test_reading_detects_index_in_another_order_despite_forged_checksums(
    damaged,
):
    reversed_index(damaged)
    forge(damaged)
    with pytest.raises(InputError, match=r"record 0 is site 'site0', index\.parquet says 'site29'"):
        open_dataset(damaged).pixels(0)


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
def test_damaged_index_raises_input_error(damaged, how, forged):
    damaged_index(damaged, how)
    if forged:
        forge(damaged)
    if forged and how == "flipped":  # only the checksum detects it, and that was forged
        return
    with pytest.raises(InputError, match=r"index\.parquet"):
        open_dataset(damaged)


@pytest.mark.parametrize("name", ["provenance.json", "dataset_info.json", "features.json"])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[1]", "3", '"text"', "null", "{", "\0", "{}", '{"files": 3}']
)
def test_invalid_json_raises_input_error(damaged, name, text):
    (damaged / name).write_text(text)
    if name != "provenance.json":
        forge(damaged)
    with pytest.raises(InputError, match=str(damaged)):
        open_dataset(damaged)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("files", {}),
        ("files", {"../x": {"bytes": 1, "sha256": ""}}),
        ("files", {"index.parquet": 3}),
        ("files", []),
        ("pixel_size_um", {"P0": "0.65"}),
        ("pixel_size_um", {"P0": -1.0}),
        ("pixel_size_um", []),
    ],
)
def test_invalid_entry_of_provenance_is_rejected(damaged, name, value):
    provenance = json.loads((damaged / "provenance.json").read_text())
    (damaged / "provenance.json").write_text(json.dumps({**provenance, name: value}))
    with pytest.raises(InputError, match=f"{name} is missing or invalid"):
        open_dataset(damaged)


def test_truncated_shard_is_rejected(tmp_path):
    path = write_tiny(tmp_path / "data", sites=30, size=64, channels=["DNA", "Actin"])
    shard = next(path.glob("*array_record*"))
    assert shard.stat().st_size > 3 << 16
    with open(shard, "r+b") as file:
        file.truncate(2 << 16)
    with pytest.raises(InputError, match="is truncated"):
        open_dataset(path)
    forge(path)
    with pytest.raises(InputError, match=str(path)):
        dataset = open_dataset(path)
        for position in range(len(dataset)):
            dataset.pixels(position)


def test_features_file_cannot_import_other_modules(damaged, tmp_path, monkeypatch):
    """TFDS imports the module of each class that features.json names."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Text: pass\n"
    )
    text = (damaged / FEATURES).read_text()
    (damaged / FEATURES).write_text(
        text.replace("tensorflow_datasets.core.features.text_feature.Text", "foreign.Text")
    )
    forge(damaged)
    with pytest.raises(InputError, match=r"features\.json: contains features that perturbjax"):
        open_dataset(damaged)
    assert not (tmp_path / "ran").exists() and "foreign" not in sys.modules


def hide_class(features: dict, how: str) -> str:
    evil = {"pythonClassName": "foreign.Text", "text": {}}
    members = features["featuresDict"]["features"]
    match how:
        case "other spelling":
            members["site_id"] = {"python_class_name": "foreign.Text", "text": {}}
        case "both spellings":
            members["site_id"]["python_class_name"] = "foreign.Text"
        case "nested":
            members["site_id"] = {
                "pythonClassName": features["pythonClassName"],
                "featuresDict": {"features": {"a": evil}},
            }
        case "in a tensor":
            members["image"]["sequence"] = {"feature": evil}
        case "old form":
            return json.dumps({"type": "foreign.Text", "content": {}})
        case "twice":
            text = json.dumps(features)
            return text.replace('"text": {}', '"text": {}, "pythonClassName": "foreign.Text"', 1)
        case "list":
            features["featuresDict"]["features"] = [evil]
        case "top":
            features["pythonClassName"] = "foreign.Text"
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
def test_check_features_finds_other_classes_in_any_spelling(tiny, tmp_path, how):
    text = hide_class(json.loads((tiny / FEATURES).read_text()), how)
    (tmp_path / FEATURES).write_text(text)
    with pytest.raises(InputError, match=r"contains features that perturbjax|a key occurs twice"):
        check_features(tmp_path / FEATURES)


def test_shard_outside_the_dataset_is_rejected(damaged):
    info = json.loads((damaged / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (damaged / "dataset_info.json").write_text(json.dumps(info))
    forge(damaged)
    with pytest.raises(InputError, match=r"outside the dataset|cannot be read"):
        open_dataset(damaged)


def test_verify_accepts_unchanged_dataset(tiny):
    assert verify(tiny) == "30 sites and 5 files are unchanged"


def test_verify_detects_flipped_bit(damaged):
    shard = next(damaged.glob("*array_record*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="was changed"):
        verify(damaged)


@pytest.mark.parametrize("column", ["label", "n_cells", "Metadata_Well", "mean_Actin"])
def test_verify_detects_index_that_differs_from_records(damaged, column):
    index = pd.read_parquet(damaged / "index.parquet")
    index[column] = np.roll(index[column], 4)
    index.loc[7, "n_cells"] += column == "n_cells"
    index.to_parquet(damaged / "index.parquet", index=False)
    forge(damaged)
    with pytest.raises(
        InputError, match=rf"record \d+ .site\d+. has ({column}|other intensities in Actin)"
    ):
        verify(damaged)


def test_verify_rejects_folder_without_dataset_or_run(tmp_path):
    with pytest.raises(InputError, match="is not a dataset or run"):
        verify(tmp_path)


def test_tfds_loads_dataset_by_name_without_tensorflow(tiny, tmp_path):
    import tensorflow_datasets as tfds

    (tmp_path / "cell_sites").mkdir()
    (tmp_path / "cell_sites" / SCHEMA_VERSION).symlink_to(tiny)
    source = tfds.data_source("cell_sites", data_dir=str(tmp_path), split=SPLIT)
    ours = open_dataset(tiny)
    assert len(source) == len(ours)
    np.testing.assert_array_equal(source[3]["image"], ours[3]["image"])
    assert source[3]["site_id"].decode() == ours[3]["site_id"] and "tensorflow" not in sys.modules


def write_nuclei(path, nuclei, *, has_nuclei=True):
    """Write two sites with one cell of label 3 each."""
    mask = np.zeros((8, 8), np.uint16)
    mask[1:7, 1:7] = 3
    image = np.ones((8, 8, 1), np.uint16)
    return module.write_dataset(
        path,
        pd.DataFrame({"site_id": ["a", "b"], "Metadata_moa": ["x", "y"]}),
        [module.SitePixels(image, mask, nuclei=one) for one in nuclei],
        channel_names=["DNA"],
        image_dtype=np.uint16,
        label_column="Metadata_moa",
        has_nuclei=has_nuclei,
    )


def test_nuclei_are_stored_with_the_labels_of_their_cells(tmp_path):
    nucleus = np.zeros((8, 8), np.uint16)
    nucleus[3:5, 3:5] = 3
    # The second cell has no nucleus.
    path = write_nuclei(tmp_path / "data", [nucleus, np.zeros_like(nucleus)])
    dataset = pickle.loads(pickle.dumps(open_dataset(path)))
    np.testing.assert_array_equal(dataset.nuclei(0), nucleus)
    assert dataset.index["nuclei_area"].tolist() == [4, 0] and not dataset[1]["nuclei"].any()
    assert verify(path) == "2 sites and 5 files are unchanged"


def test_nuclei_outside_their_cells_or_missing_are_refused(tmp_path):
    outside = np.zeros((8, 8), np.uint16)
    outside[0, 0] = 3
    other = np.full((8, 8), 2, np.uint16)
    for nucleus in (outside, other):
        with pytest.raises(
            InputError, match="site a: a nucleus lies outside the cell of its label"
        ):
            write_nuclei(tmp_path / "data", [nucleus, nucleus])
    with pytest.raises(InputError, match="site b: its nuclei are missing"):
        write_nuclei(tmp_path / "data", [np.zeros((8, 8), np.uint16), None])
    with pytest.raises(InputError, match="site a: its nuclei are not expected"):
        write_nuclei(tmp_path / "data", [outside, outside], has_nuclei=False)
    with pytest.raises(InputError, match="is not a complete dataset"):
        open_dataset(tmp_path / "data")

"""Contents of a built dataset: pixels, masks, index and provenance."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from data_prep_builds import contents, options

from data_prep.build import build
from data_prep.channel_images import aggregate_channels
from data_prep.sources import pixel_digest
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset


@pytest.fixture(scope="module")
def dataset(simulated: Path, tmp_path_factory) -> Path:
    """Dataset of the simulated plate with three separate channels and segmented nuclei."""
    out = tmp_path_factory.mktemp("built") / "dataset"
    build(options(simulated, out, segmenter="auto"))
    return out


def test_records_contain_the_pixels_in_the_order_of_the_table(simulated, dataset):
    opened = open_dataset(dataset)
    assert opened.channel_names == ["DNA", "Actin", "Tubulin"] and opened.image_dtype == np.uint16
    table = pd.read_csv(simulated / "load_data.csv", dtype=str)
    assert list(opened.column("Metadata_Well")) == list(table["Metadata_Well"])
    images, masks = opened.read([5, 0])
    for image, row in zip(images, (5, 0), strict=True):
        for channel, name in enumerate(opened.channel_names):
            path = (
                simulated / table[f"PathName_Orig{name}"][row] / table[f"FileName_Orig{name}"][row]
            )
            np.testing.assert_array_equal(image[..., channel], tifffile.imread(path))
    assert masks.dtype == np.uint16 and (masks.max((1, 2)) > 0).all()


def test_index_agrees_with_the_records(dataset):
    opened = open_dataset(dataset)
    assert len(opened) == 24 and opened.index["site_id"].is_unique
    classes = sorted(opened.column("Metadata_pert_iname").unique())
    for position in (0, 7, 23):
        record, row = opened.record(position), opened.index.iloc[position]
        assert record["site_id"].decode() == row["site_id"]
        assert record["label"] == row["label"] == classes.index(row["Metadata_pert_iname"])
        assert record["Metadata_Well"].decode() == row["Metadata_Well"]
        assert row["n_cells"] == len(np.unique(record["mask"])) - 1
        assert row["mask_area"] == (record["mask"] > 0).sum()
        actin = record["image"][..., 1]
        expected = [actin.mean(), actin.std(), *np.percentile(actin, (1, 50, 99))]
        actual = row[["mean_Actin", "std_Actin", "p01_Actin", "p50_Actin", "p99_Actin"]].astype(
            float
        )
        np.testing.assert_allclose(actual, expected)


def test_provenance_records_settings_and_checksums(dataset, simulated):
    provenance = json.loads((dataset / "provenance.json").read_text())
    assert provenance["channels_stored"] == ["DNA", "Actin", "Tubulin"]
    assert provenance["label_column"] == "Metadata_pert_iname"
    assert (provenance["n_sites"], provenance["n_classes"]) == (24, 3)
    assert provenance["segmenter"]["engine"] == "nuclei"  # one channel is segmented
    assert provenance["segmenter"]["channels"] == ["DNA"]
    csv = (simulated / "load_data.csv").read_bytes()
    assert provenance["source"]["sha256"] == {"load_data": hashlib.sha256(csv).hexdigest()}
    for name, file in provenance["files"].items():
        assert file["sha256"] == contents(dataset)[name]
    row = pd.read_csv(simulated / "load_data.csv", dtype=str).iloc[4]
    paths = [
        simulated / row[f"PathName_Orig{c}"] / row[f"FileName_Orig{c}"]
        for c in ("DNA", "Actin", "Tubulin")
    ]
    digest = pixel_digest(tifffile.imread(path) for path in paths)
    assert open_dataset(dataset).column("source_sha256")[4] == digest
    assert str(simulated) not in json.dumps(provenance)


def test_resize_applies_to_aggregated_image_and_mask(simulated, tmp_path):
    build(
        options(
            simulated,
            tmp_path / "dataset",
            aggregate="median",
            segment_channels="",
            resize=32,
            workers=2,
        )
    )
    opened = open_dataset(tmp_path / "dataset")
    assert opened.channel_names == ["aggregate"] and opened.image_size == (32, 32)
    images, masks = opened.read([0])
    table = pd.read_csv(simulated / "load_data.csv")
    paths = [
        simulated / "images/SIM001" / table[f"FileName_Orig{c}"][0]
        for c in ("DNA", "Actin", "Tubulin")
    ]
    whole = aggregate_channels(np.stack([tifffile.imread(path) for path in paths], -1), "median")[
        ..., 0
    ]
    blocks = whole.reshape(32, 2, 32, 2).mean((1, 3))
    np.testing.assert_allclose(images[0, ..., 0], blocks, atol=1)
    assert masks.shape == (1, 32, 32) and masks.max() > 0


def test_build_is_idempotent_and_other_settings_need_overwrite(simulated, dataset, capsys):
    before = contents(dataset)
    build(options(simulated, dataset, segmenter="auto"))
    assert "is already built" in capsys.readouterr().err
    with pytest.raises(InputError, match="contains a dataset of other settings"):
        build(options(simulated, dataset, segmenter="auto", label_column="Metadata_moa"))
    assert contents(dataset) == before
    assert list(dataset.parent.iterdir()) == [dataset]


def test_overwrite_replaces_the_dataset(simulated, tmp_path):
    out = tmp_path / "dataset"
    build(options(simulated, out))
    build(options(simulated, out, label_column="Metadata_moa", overwrite=True))
    assert open_dataset(out).label_column == "Metadata_moa"
    assert list(tmp_path.iterdir()) == [out]


def test_writer_memory_is_independent_of_the_number_of_sites(tmp_path):
    """Compare 100 with 10 incompressible sites of 1 MB."""

    def peak(count: int) -> float:
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(count)), str(count)]
        return float(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        )

    assert peak(100) - peak(10) < 45


def test_build_splits_large_plates_into_shards(simulated, tmp_path, monkeypatch):
    from perturbjax.dataset import shards

    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    build(options(simulated, tmp_path / "dataset"))
    opened = open_dataset(tmp_path / "dataset")
    assert len(list((tmp_path / "dataset").glob("*array_record*"))) > 1
    assert [opened.record(i)["site_id"].decode() for i in range(24)] == list(
        opened.index["site_id"]
    )


@pytest.mark.parametrize("name", ["provenance.json", "index.parquet", "dataset_info.json"])
def test_open_dataset_refuses_an_incomplete_dataset(dataset, tmp_path, name):
    import shutil

    broken = Path(shutil.copytree(dataset, tmp_path / "broken"))
    (broken / name).unlink()
    with pytest.raises(InputError, match=f"is not a complete dataset .{name} is missing"):
        open_dataset(broken)


def test_open_dataset_refuses_another_schema_version(dataset, tmp_path):
    import shutil

    other = Path(shutil.copytree(dataset, tmp_path / "other"))
    provenance = json.loads((other / "provenance.json").read_text())
    (other / "provenance.json").write_text(json.dumps({**provenance, "schema_version": "0.9.0"}))
    with pytest.raises(InputError, match=r"was built with schema version 0\.9\.0"):
        open_dataset(other)


def test_open_dataset_refuses_a_missing_shard(dataset, tmp_path):
    import shutil

    broken = Path(shutil.copytree(dataset, tmp_path / "broken"))
    next(broken.glob("*array_record*")).unlink()
    with pytest.raises(InputError, match="build the dataset again"):
        open_dataset(broken).record(0)


MEMORY = """
import resource, sys
import numpy as np
import pandas as pd
from pathlib import Path
from perturbjax.dataset import SitePixels, write_dataset

count = int(sys.argv[2])
rng = np.random.default_rng(0)
mask = np.zeros((512, 1024), np.uint16)
sites = (SitePixels(rng.integers(0, 65535, (512, 1024, 1), np.uint16), mask) for _ in range(count))
table = pd.DataFrame({"site_id": [str(k) for k in range(count)], "Metadata_moa": "x"})
facts = {"channel_names": ["DNA"], "image_dtype": np.uint16, "label_column": "Metadata_moa"}
write_dataset(Path(sys.argv[1]), table, sites, **facts, pixel_bytes=count << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

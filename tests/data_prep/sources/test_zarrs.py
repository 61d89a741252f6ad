from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plate_formats
import pytest
import zarr
from data_prep_builds import options

from data_prep.build import BuildConfig, build
from data_prep.site_table import read_sites
from data_prep.sources import Plane, probe_planes, read_planes
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset


@pytest.fixture(scope="module")
def written(simulated, tmp_path_factory) -> Path:
    return plate_formats.as_ome_zarr(simulated, tmp_path_factory.mktemp("zarr"))


@pytest.fixture
def stores(written, tmp_path) -> Path:
    """Copy of the stores; tests may damage it."""
    return Path(shutil.copytree(written, tmp_path / "stores"))


def site(stores: Path, *more: str) -> Path:
    return stores.joinpath("SIM001.zarr", "A", "1", "0", *more)


def read_one(file: Path, channel: str = "DNA", project: str = "none") -> np.ndarray:
    (pixels,) = read_planes([Plane(str(file), channel, project=project)], "row 2").values()
    return pixels


def built(images: Path, out: Path, load_data: Path | None = None, **changes) -> BuildConfig:
    settings = {
        "aggregate": "none",
        "segment_channels": "DNA",
        "segmenter": "watershed",
        "workers": 1,
        **changes,
    }
    return BuildConfig(images=images, out=out, load_data=load_data, **settings)


def content(dataset: Path) -> str:
    return json.loads((dataset / "provenance.json").read_text())["content_sha256"]


@pytest.fixture(scope="module")
def from_tiff(simulated, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("built") / "dataset"
    build(options(simulated, out))
    return out


CHANNELS = {"channels": "DNA,Actin,Tubulin"}


@pytest.mark.parametrize("version", [2, 3])
def test_ome_zarr_and_tiff_build_the_same_dataset(simulated, from_tiff, tmp_path, version):
    stores = plate_formats.as_ome_zarr(simulated, tmp_path / "stores", version)
    build(built(stores, tmp_path / "dataset", stores / "load_data.csv", **CHANNELS))
    assert content(tmp_path / "dataset") == content(from_tiff)


@pytest.mark.parametrize("version", [2, 3])
def test_jump_lite_and_tiff_build_the_same_images(simulated, from_tiff, tmp_path, version):
    lite = plate_formats.as_jump_lite(simulated, tmp_path / "lite", version)
    flags = {"channels": "DNA,ER,RNA", "label_column": "Metadata_pert_iname"}
    build(built(lite / "lite.zarr", tmp_path / "dataset", lite / "index.parquet", **flags))
    dataset, expected = open_dataset(tmp_path / "dataset"), open_dataset(from_tiff)
    assert list(dataset.column("source_sha256")) == list(expected.column("source_sha256"))
    for position in (0, 23):
        np.testing.assert_array_equal(
            dataset.record(position)["image"], expected.record(position)["image"]
        )


def test_store_lists_its_sites(written, simulated):
    table = read_sites(None, written / "SIM001.zarr")
    of_csv = read_sites(simulated / "load_data.csv", simulated).sites
    assert list(table.sites["site_id"]) == [
        name for name in of_csv["site_id"] if name.startswith("SIM001")
    ]
    assert table.channels == plate_formats.WRITTEN
    assert set(read_sites(None, written).sites["Metadata_Plate"]) == {"SIM001", "SIM002"}


def test_platemap_is_joined_without_a_table(written, tmp_path):
    wells = sorted(set(read_sites(None, written).sites["Metadata_Well"]))
    lines = "".join(f"{well}\t{'' if well == 'A01' else 'BRD-1'}\n" for well in wells)
    (tmp_path / "map.tsv").write_text("well_position\tbroad_sample\n" + lines)
    build(built(written / "SIM001.zarr", tmp_path / "dataset", platemap=tmp_path / "map.tsv"))
    dataset = open_dataset(tmp_path / "dataset")
    assert len(dataset) == 12 and set(dataset.column("Metadata_broad_sample")) == {"DMSO", "BRD-1"}


def test_jump_lite_store_lists_its_sites(simulated, tmp_path):
    lite = plate_formats.as_jump_lite(simulated, tmp_path / "lite")
    table = read_sites(None, lite / "lite.zarr")
    assert len(table) == 24 and table.channels == ("AGP", "DNA", "ER", "Mito", "RNA")
    assert set(table.sites["Metadata_Source"]) == {"source_4"}


@pytest.mark.parametrize("how", ["max", "mean", "middle", "none"])
def test_stack_is_projected_by_the_chosen_method(tmp_path, how):
    stack = np.random.default_rng(0).integers(0, 60_000, (2, 5, 32, 24), dtype=np.uint16)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    scales = {"datasets": [{"path": "0"}], "axes": [{"name": axis} for axis in "czyx"]}
    channels = {"channels": [{"label": "ER"}, {"label": "DNA"}]}
    group.attrs["ome"] = {"multiscales": [scales], "omero": channels}
    group.create_array("0", data=stack, chunks=(1, 2, 32, 24))
    if how == "none":
        with pytest.raises(InputError, match=r"row 2: .*a.zarr is a stack of 5 planes"):
            probe_planes([Plane(str(tmp_path / "a.zarr"), "DNA")], "row 2")
        return
    planes = stack[1].astype(float)
    expected = {"max": planes.max(0), "mean": np.rint(planes.mean(0)), "middle": planes[2]}[how]
    np.testing.assert_array_equal(read_one(tmp_path / "a.zarr", project=how), expected)


def test_sharded_array_is_read(tmp_path):
    image = np.random.default_rng(0).integers(0, 60_000, (5, 64, 64), dtype=np.uint16)
    zarr.create_array(
        tmp_path / "a.zarr",
        name="s__b__p__A01__1",
        data=image,
        chunks=(1, 32, 32),
        shards=(5, 64, 64),
    )
    np.testing.assert_array_equal(read_one(tmp_path / "a.zarr/s__b__p__A01__1", "ER"), image[2])


def test_missing_chunk_is_an_error(stores):
    chunks = sorted(path for path in site(stores, "0", "c").rglob("*") if path.is_file())
    chunks[-1].unlink()
    with pytest.raises(
        InputError, match=r"row 2: .*SIM001.zarr/A/1/0: chunk A/1/0/0/c/0/2/0/1/0 is missing"
    ):
        read_one(site(stores), "Actin")
    assert read_one(site(stores), "DNA").any()  # its chunks exist


@pytest.mark.parametrize("kind", ["damaged", "wrong shape"])
def test_invalid_chunk_is_refused(stores, kind):
    chunk = next(path for path in site(stores, "0", "c").rglob("*") if path.is_file())
    if kind == "damaged":
        chunk.write_bytes(b"not a chunk")
    else:
        other = zarr.create_array(
            stores / "other.zarr", data=np.ones((3, 3), np.uint16), chunks=(3, 3)
        )
        chunk.write_bytes((stores / "other.zarr/c/0/0").read_bytes())
        assert other.shape == (3, 3)
    with pytest.raises(
        InputError, match=r"row 2: .*SIM001.zarr/A/1/0 cannot be read: .*a chunk is damaged"
    ):
        read_planes(
            [Plane(str(site(stores)), channel) for channel in plate_formats.WRITTEN], "row 2"
        )


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_missing_codec_is_named(stores):
    change(site(stores, "0/zarr.json"), '"zstd"', '"zstd9000"')
    with pytest.raises(
        InputError, match=r"row 2: .*A/1/0 uses a codec that is not installed .*zstd9000"
    ):
        read_one(site(stores))


@pytest.mark.parametrize("codec", ["pickle", "astype"])
def test_unsafe_codec_is_refused_before_it_runs(tmp_path, codec):
    folder = tmp_path / "a.zarr/s__b__p__A01__1"
    folder.mkdir(parents=True)
    metadata = {
        "zarr_format": 2,
        "shape": [5, 8, 8],
        "chunks": [5, 8, 8],
        "dtype": "<u2",
        "fill_value": 0,
        "order": "C",
    }
    types = {"encode_dtype": "<u2", "decode_dtype": "<u2"} if codec == "astype" else {}
    metadata |= {"filters": None, "compressor": {"id": codec, **types}}
    (folder / ".zarray").write_text(json.dumps(metadata))
    (folder / "0.0.0").write_bytes(pickle.dumps(np.zeros((5, 8, 8), np.uint16)))
    with pytest.raises(
        InputError, match=r"codec astype, which is not permitted|cannot be read: .*pickle"
    ):
        read_one(folder)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "zarr.json",
            '"name": "t"',
            '"name": "q"',
            "axes qczyx; its metadata contradict its array",
        ),
        (
            "zarr.json",
            '"label": "DNA"',
            '"label": "Hoechst"',
            r"has no channel DNA .available: Tubulin, Hoechst, Actin",
        ),
        (
            "zarr.json",
            '{\n            "label": "DNA"\n          },',
            "",
            "names 2 channels .* but has 3",
        ),
        ("zarr.json", '"path": "0"', '"path": "9"', "does not exist in the store"),
        ("zarr.json", '"multiscales"', '"scales"', "is not an OME-Zarr image"),
        ("0/zarr.json", '"uint16"', '"complex64"', "metadata are damaged .*Invalid type: 0"),
        ("0/zarr.json", "64,\n    64", "60000,\n    60000", "more than any camera image"),
    ],
)
def test_contradicting_metadata_are_one_line(stores, file, old, new, message):
    change(site(stores, file), old, new)
    with pytest.raises(InputError, match=f"row 2: .*SIM001.zarr/A/1/0 .*{message}"):
        read_one(site(stores))


def test_missing_channel_is_reported_before_segmentation(stores, tmp_path):
    change(stores / "SIM002.zarr/B/2/1/zarr.json", '"label": "DNA"', '"label": "Other"')
    with pytest.raises(
        InputError, match=r"load_data.csv, row 23: .*SIM002.zarr/B/2/1 has no channel DNA"
    ):
        build(built(stores, tmp_path / "dataset", stores / "load_data.csv"))
    assert not (tmp_path / "dataset").exists()


def test_incomplete_store_is_one_line(stores, tmp_path):
    shutil.rmtree(stores / "SIM001.zarr/A/2")
    with pytest.raises(InputError, match="metadata list well A/2; the store is incomplete"):
        read_sites(None, stores / "SIM001.zarr")
    shutil.rmtree(stores / "SIM002.zarr/A/2/1")
    table = read_sites(None, stores / "SIM002.zarr")
    row = next(row for row in table.sites.to_dict("records") if row["site_id"] == "SIM002_A02_2")
    with pytest.raises(
        InputError,
        match=r"SIM002.zarr, plate SIM002, well A02, site 2: .*A/2/1 does not exist in the store",
    ):
        probe_planes([row["file_DNA"]], table.where(row))


def test_rows_without_a_site_in_the_store_are_named(stores, tmp_path):
    table = pd.read_csv(stores / "load_data.csv", dtype=str)
    for column, value, message in [
        (
            "Metadata_Site",
            "7",
            "row 3: site 7 of well A01 is not in plate SIM001 .sites of the well: 1, 2",
        ),
        (
            "Metadata_Well",
            "P24",
            "row 3: site 2 of well P24 is not in plate SIM001 .no such well",
        ),
        ("Metadata_Plate", "SIM009", "SIM009.zarr"),
    ]:
        changed = table.copy()
        changed.loc[1, column] = value
        changed.to_csv(tmp_path / "load_data.csv", index=False)
        with pytest.raises(InputError, match=message):
            read_sites(tmp_path / "load_data.csv", stores)
    with pytest.raises(
        InputError, match=r"plate SIM002 is not in .*SIM001.zarr, which contains plate SIM001"
    ):
        read_sites(stores / "load_data.csv", stores / "SIM001.zarr")


def test_invalid_plate_is_one_line(tmp_path, stores):
    zarr.open_group(tmp_path / "empty.zarr", mode="w")
    with pytest.raises(InputError, match="is neither an OME-Zarr plate nor"):
        read_sites(None, tmp_path / "empty.zarr")
    with pytest.raises(InputError, match="is not a folder"):
        read_sites(None, tmp_path / "gone.zarr")
    with pytest.raises(InputError, match="contains no Zarr store"):
        read_sites(None, tmp_path / "dataset")
    change(stores / "SIM001.zarr/zarr.json", '"A/1"', '"../../A/1"')
    with pytest.raises(InputError, match="leads outside the store"):
        read_sites(None, stores / "SIM001.zarr")


def test_missing_extra_names_the_package(stores, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    monkeypatch.setitem(sys.modules, "zarr.storage", None)
    with pytest.raises(InputError, match=r"pip install .perturbjax\[zarr\]"):
        read_one(site(stores))
    with pytest.raises(InputError, match=r"pip install .perturbjax\[zarr\]"):
        read_sites(None, stores / "SIM001.zarr")


def test_listed_wells_without_images_are_an_error_only_if_used(stores, tmp_path):
    table = pd.read_csv(stores / "load_data.csv", dtype=str)
    shutil.rmtree(stores / "SIM001.zarr/A/2")
    with pytest.raises(InputError, match=r"row 4: site 1 of well A02 .*no such well"):
        read_sites(stores / "load_data.csv", stores)
    used = table[(table["Metadata_Plate"] != "SIM001") | (table["Metadata_Well"] != "A02")]
    used.to_csv(tmp_path / "used.csv", index=False)
    assert len(read_sites(tmp_path / "used.csv", stores)) == 22


def test_stores_may_end_in_ome_zarr(stores):
    for plate in ("SIM001", "SIM002"):
        (stores / f"{plate}.zarr").rename(stores / f"{plate}.ome.zarr")
    assert len(read_sites(stores / "load_data.csv", stores)) == 24
    metadata = stores / "SIM001.ome.zarr/zarr.json"
    text = json.loads(metadata.read_text())
    text["attributes"]["ome"]["plate"].pop("name", None)
    metadata.write_text(json.dumps(text))
    sites = read_sites(None, stores / "SIM001.ome.zarr").sites
    assert set(sites["Metadata_Plate"]) == {"SIM001"}

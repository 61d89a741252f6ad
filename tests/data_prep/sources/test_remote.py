"""Plates in S3 or behind HTTPS are built without download, and failures end in one line."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pandas as pd
import plate_formats
import pytest
import tifffile

from data_prep.build import BuildConfig, build
from data_prep.site_table import read_sites
from data_prep.sources import Plane, connections, probe_planes, read_planes, remote
from perturbjax.core.errors import InputError


def small(plate: Path, out: Path) -> Path:
    """Write a table of the first four sites of a plate, for fast builds."""
    pd.read_csv(plate / "load_data.csv", dtype=str).iloc[:4].to_csv(out, index=False)
    return out


def content(dataset: Path) -> str:
    return json.loads((dataset / "provenance.json").read_text())["content_sha256"]


def from_url(table: Path, images: str, out: Path) -> BuildConfig:
    settings = {
        "aggregate": "none",
        "segment_channels": "DNA",
        "segmenter": "watershed",
        "workers": 1,
    }
    return BuildConfig(images=images, out=out, load_data=table, **settings)


def test_bucket_and_files_build_the_same_dataset(simulated, uploaded, tmp_path):
    table = small(simulated, tmp_path / "load_data.csv")
    build(from_url(table, str(simulated), tmp_path / "local"))
    url = uploaded(simulated / "images", "tiffs")
    build(from_url(table, url, tmp_path / "dataset"))
    assert content(tmp_path / "dataset") == content(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "load_data.csv", "local"]


def test_zarr_stores_in_a_bucket_are_read(simulated, uploaded, tmp_path):
    url = uploaded(plate_formats.as_ome_zarr(simulated, tmp_path / "stores"), "zarrs")
    table = read_sites(None, f"{url}/SIM001.zarr")
    assert len(table) == 12
    assert set(read_sites(None, url).sites["Metadata_Plate"]) == {"SIM001", "SIM002"}
    row = plate_formats.table_of(simulated).iloc[5]
    planes = [table.sites.iloc[5][f"file_{channel}"] for channel in plate_formats.CHANNELS]
    pixels = read_planes(planes, "row 7")
    for plane, expected in zip(
        planes, plate_formats.site_pixels(simulated, row).values(), strict=True
    ):
        np.testing.assert_array_equal(pixels[plane], expected)


def test_server_without_byte_ranges_is_read(simulated, served, tmp_path, no_credentials):
    pytest.importorskip("obstore")
    url = served(simulated)
    table = read_sites(simulated / "load_data.csv", url, channels=("DNA", "Actin"))
    first = table.sites.iloc[0]
    assert first["file_DNA"].file == f"{url}/images/SIM001/SIM001_A01_s01_DNA.tiff"
    planes = [first["file_DNA"], first["file_Actin"]]
    assert [probe.shape for probe in probe_planes(planes, "row 2").values()] == [(64, 64)] * 2
    expected = plate_formats.site_pixels(simulated, plate_formats.table_of(simulated).iloc[0])
    np.testing.assert_array_equal(read_planes(planes, "row 2")[planes[1]], expected["Actin"])


def test_probe_of_a_large_file_reads_the_header_only(uploaded, tmp_path, monkeypatch):
    (tmp_path / "plate").mkdir()
    tifffile.imwrite(tmp_path / "plate/a.tiff", np.zeros((1080, 1080), np.uint16), metadata=None)
    plane = Plane(f"{uploaded(tmp_path / 'plate', 'large')}/a.tiff", "DNA")
    monkeypatch.setattr(remote, "_whole", lambda *_: pytest.fail("the whole file was read"))
    assert probe_planes([plane], "row 2")[plane].shape == (1080, 1080)


def test_object_deleted_after_the_probe_is_named(uploaded, s3, tmp_path):
    (tmp_path / "plate").mkdir()
    tifffile.imwrite(tmp_path / "plate/a.tiff", np.ones((8, 8), np.uint16), metadata=None)
    plane = Plane(f"{uploaded(tmp_path / 'plate', 'vanishing')}/a.tiff", "DNA")
    probe_planes([plane], "load_data.csv, row 7")
    s3.delete_object(Bucket="vanishing", Key="some where/a.tiff")
    with pytest.raises(
        InputError, match=r"load_data.csv, row 7: s3://vanishing/some where/a\.tiff does not exist"
    ):
        read_planes([plane], "load_data.csv, row 7")


def test_private_bucket_requires_credentials(uploaded, tmp_path, monkeypatch):
    (tmp_path / "plate").mkdir()
    tifffile.imwrite(tmp_path / "plate/a.tiff", np.full((8, 8), 7, np.uint16), metadata=None)
    plane = Plane(f"{uploaded(tmp_path / 'plate', 'private', acl='private')}/a.tiff", "DNA")
    with pytest.raises(
        InputError,
        match=r"row 2: s3://private/.* no permission \(no credentials in the environment\)",
    ):
        probe_planes([plane], "row 2")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    assert (read_planes([plane], "row 2")[plane] == 7).all()


def test_build_resumes_after_a_missing_object_was_added(simulated, uploaded, s3, tmp_path):
    table, url = (
        small(simulated, tmp_path / "load_data.csv"),
        uploaded(simulated / "images", "coming"),
    )
    key = "some where/SIM001/SIM001_A02_s02_DNA.tiff"
    s3.delete_object(Bucket="coming", Key=key)
    with pytest.raises(
        InputError, match=r"row 5, channel DNA: SIM001_A02_s02_DNA.tiff is neither in"
    ):
        build(from_url(table, url, tmp_path / "dataset"))
    assert not (tmp_path / "dataset").exists()
    file = str(simulated / "images/SIM001/SIM001_A02_s02_DNA.tiff")
    s3.upload_file(file, "coming", key, ExtraArgs={"ACL": "public-read"})
    build(from_url(table, url, tmp_path / "dataset"))


def test_build_keeps_finished_masks_if_an_object_vanishes(
    simulated, served, no_credentials, tmp_path, capsys
):
    """The DNA image of the last site exists when headers are read, and is missing later."""
    requests, gone = Counter(), "SIM001_A02_s02_DNA.tiff"

    class Leaving(SimpleHTTPRequestHandler):
        def send_head(self):
            requests[Path(self.path).name] += 1
            # Requests 1 to 3 are for the size, the header and the pixels for the diameter.
            if requests[gone] > 3 and self.path.endswith(gone):
                self.send_error(404)
                return None
            return super().send_head()

        def log_message(self, *_):
            pass

    url = served(functools.partial(Leaving, directory=str(simulated)))
    table = small(simulated, tmp_path / "load_data.csv")
    with pytest.raises(
        InputError, match=r"load_data.csv, row 5: http://.*SIM001_A02_s02_DNA.tiff does not exist"
    ):
        build(from_url(table, url, tmp_path / "dataset"))
    assert not (tmp_path / "dataset").exists()
    assert len(list((tmp_path / ".dataset.building/masks").glob("*.tiff"))) == 3
    requests[gone] = -100
    build(replace(from_url(table, url, tmp_path / "dataset"), mask_cache="none"))
    assert "reused masks: 3 of 4 sites" in capsys.readouterr().err


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "no permission"),
        (401, "no permission"),
        (301, "another region than us-east-1; set AWS_REGION"),
    ],
)
def test_refused_request_is_one_line(answering, no_credentials, monkeypatch, status, words, signed):
    monkeypatch.setenv("AWS_ENDPOINT_URL", answering(status=status))
    if signed:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for look in (probe_planes, read_planes):
        with pytest.raises(InputError, match=f"row 3: s3://bucket/a.tiff .*{words}") as refused:
            look([Plane("s3://bucket/a.tiff")], "row 3")
        assert "\n" not in str(refused.value)
        if status == 403:
            assert ("credentials in the environment were refused" in str(refused.value)) == signed


def test_busy_server_is_retried(answering, no_credentials, tmp_path):
    tifffile.imwrite(tmp_path / "a.tiff", np.full((8, 8), 7, np.uint16), metadata=None)
    url = answering(status=503, bad=2, content=(tmp_path / "a.tiff").read_bytes())
    plane = Plane(f"{url}/a.tiff", "DNA")
    assert (read_planes([plane], "row 2")[plane] == 7).all()


def test_permanent_server_error_names_the_object(answering, no_credentials, monkeypatch):
    monkeypatch.setattr(connections, "RETRIES", 1)
    url = answering(status=500)
    with pytest.raises(
        InputError,
        match=r"row 2: http://127.*a\.tiff cannot be read .*; run the same command again",
    ):
        read_planes([Plane(f"{url}/a.tiff")], "row 2")


def test_interrupted_response_is_retried(answering, no_credentials, tmp_path):
    tifffile.imwrite(tmp_path / "a.tiff", np.full((64, 64), 7, np.uint16), metadata=None)
    content = (tmp_path / "a.tiff").read_bytes()

    def broken(self):
        type(self).requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if type(self).requests > 2 else content[:100])

    plane = Plane(f"{answering(do_GET=broken)}/a.tiff", "DNA")
    assert (read_planes([plane], "row 2")[plane] == 7).all()


def test_huge_object_is_refused_before_reading(answering, no_credentials, monkeypatch):
    monkeypatch.setattr("data_prep.sources.files.LARGEST_FILE", 1000)
    url = answering(bad=0, content=bytes(2000))
    with pytest.raises(
        InputError, match=r"row 2: .*a\.tiff has 2000 bytes, too many for one plane"
    ):
        read_planes([Plane(f"{url}/a.tiff")], "row 2")


def test_missing_extra_names_the_package(simulated, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match=r"pip install .perturbjax\[remote\]"):
        read_sites(simulated / "load_data.csv", "s3://bucket/plate")


def test_commands_accept_urls(refused, simulated, no_credentials, monkeypatch, answering, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", answering(status=403))
    flags = ["--load-data", simulated / "load_data.csv", "--images", "s3://bucket/plate"]
    assert (
        "s3://bucket/plate/images/SIM001 cannot be read: no permission (no credentials"
        in refused("inspect", *flags)
    )
    assert "s3://bucket/plate" in refused("build", *flags, "--out", tmp_path / "dataset")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["a.tiff", "a.zarr", "a.png"])
def test_password_in_a_url_is_not_printed(answering, no_credentials, monkeypatch, file):
    monkeypatch.setattr(connections, "RETRIES", 0)
    url = answering(status=403).replace("http://", "http://user:hunter2@")
    for look in (probe_planes, read_planes):
        with pytest.raises(InputError, match=r"http://\*\*\*@127") as refused:
            look([Plane(f"{url}/{file}?X-Amz-Signature=hunter2", "DNA")], "row 2")
        assert "hunter2" not in str(refused.value)

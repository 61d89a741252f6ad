from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from data_prep import fetch as module
from data_prep.fetch import FetchConfig, fetch
from data_prep.sites import choose_label, read_sites
from perturbjax.console import InputError

BATCH, PLATE = "2020_11_04_CPJUMP1", "BR00116991"
MEASURED = f"{PLATE}__2020-11-05T19_51_35-Measurement1"


class Gallery(SimpleHTTPRequestHandler):
    """Serves files, counts what is asked for, and breaks off the first `broken` replies to a name."""

    def __init__(self, *arguments, asked: Counter, broken: dict[str, int], **options):
        self.asked, self.broken = asked, broken
        super().__init__(*arguments, **options)

    def do_GET(self):
        name = Path(self.path).name
        self.asked[name] += 1
        if self.broken.get(name, 0) >= self.asked[name]:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"only this")
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def gallery(plate, tmp_path, monkeypatch):
    """The simulated plate laid out as the Cell Painting Gallery lays out a plate of the JUMP pilot."""
    root = tmp_path / "served" / module.SOURCE
    table = pd.read_csv(plate / "load_data.csv", dtype=str)
    table = table[table["Metadata_Plate"] == "SIM001"]
    images = root / f"images/{BATCH}/images/{MEASURED}/Images"
    images.parent.mkdir(parents=True)
    (plate / "images/SIM001").rename(images)
    folder = f"/home/ubuntu/bucket/projects/2019_07_11_JUMP-CP/{BATCH}/images/{MEASURED}/Images/"
    kept = table[["Metadata_Well", "Metadata_Site"]].assign(Metadata_Plate=PLATE)
    for channel in ("DNA", "Actin", "Tubulin"):
        kept[f"FileName_Orig{channel}"] = table[f"FileName_Orig{channel}"]
        kept[f"PathName_Orig{channel}"] = folder
    samples = table.drop_duplicates("Metadata_Well")
    for path, text in {
        f"workspace/load_data_csv/{BATCH}/{PLATE}/load_data.csv": kept.to_csv(index=False),
        f"workspace/metadata/platemaps/{BATCH}/barcode_platemap.csv": (
            f"Assay_Plate_Barcode,Plate_Map_Name\n{PLATE},JUMP-Target-1_compound_platemap\n"
        ),
        f"workspace/metadata/platemaps/{BATCH}/platemap/JUMP-Target-1_compound_platemap.txt": pd.DataFrame(
            {
                "well_position": samples["Metadata_Well"],
                "broad_sample": samples["Metadata_broad_sample"].replace("DMSO", ""),
            }
        ).to_csv(sep="\t", index=False),
        "workspace/metadata/external_metadata/JUMP-Target-1_compound_metadata.tsv": (
            "broad_sample\tInChIKey\tpert_iname\nSIM-00001\tKEY-1\tfirst\nSIM-00002\tKEY-2\tsecond\n"
        ),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    asked, broken = Counter(), {}
    handler = partial(Gallery, directory=str(tmp_path / "served"), asked=asked, broken=broken)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    yield f"http://127.0.0.1:{server.server_port}", asked, broken
    server.shutdown()
    server.server_close()


def test_a_fetched_plate_is_ready_to_build(gallery, tmp_path):
    url, _, _ = gallery
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    table = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out")
    assert len(table) == 12 and table.channels == ("DNA", "Actin", "Tubulin")
    assert choose_label(table.sites, "", table.source) == "Metadata_pert_iname"
    assert set(table.sites["Metadata_pert_iname"]) == {"DMSO", "first", "second"}


def test_channels_wells_and_sites_can_be_chosen(gallery, tmp_path):
    url, asked, _ = gallery
    fetch(FetchConfig(PLATE, tmp_path / "out", channels="DNA", wells="A02,B01", sites=1, base_url=url))
    assert len(list((tmp_path / "out/images").rglob("*.tiff"))) == 2
    table = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out")
    assert list(table.sites["site_id"]) == [f"{PLATE}_A02_1", f"{PLATE}_B01_1"]
    assert not any("Actin" in name for name in asked)


def test_a_connection_that_breaks_is_tried_again_and_never_leaves_half_a_file(gallery, tmp_path):
    url, asked, broken = gallery
    name = "SIM001_A01_s01_DNA.tiff"
    broken[name] = 2
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert asked[name] == 3
    served = next((tmp_path / "served").rglob(name))
    assert (tmp_path / "out/images" / PLATE / name).read_bytes() == served.read_bytes()


def test_a_stopped_fetch_goes_on_where_it_was(gallery, tmp_path):
    url, asked, broken = gallery
    last = "SIM001_B03_s02_Tubulin.tiff"
    broken[last] = 99
    with pytest.raises(InputError, match=f"{last}: cannot be fetched after 5 tries"):
        fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert not (tmp_path / "out/load_data.csv").exists()
    assert not (tmp_path / "out/images" / PLATE / last).exists()
    there = {path.name for path in (tmp_path / "out/images").rglob("*.tiff")}
    assert there
    asked.clear()
    broken.clear()
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert not there & set(asked)
    assert len(read_sites(tmp_path / "out/load_data.csv", tmp_path / "out")) == 12


def test_an_unknown_plate_channel_or_well_is_one_line(gallery, refused, tmp_path):
    url, _, _ = gallery
    flags = ["--out", tmp_path / "out", "--base-url", url]
    assert "HTTP 404" in refused("fetch", "--plate", "BR0", *flags)
    assert "--channels Mito: the plate has no such channel" in refused(
        "fetch", "--plate", PLATE, "--channels", "Mito", *flags
    )
    assert "--wells Z99" in refused("fetch", "--plate", PLATE, "--wells", "Z99", *flags)
    assert not (tmp_path / "out/load_data.csv").exists()


def change(served: Path, name: str, old: str, new: str) -> None:
    """Change a text among what is served."""
    (file,) = served.rglob(name)
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize("name", ["../../../escaped.tiff", "/tmp/escaped.tiff", "..", "a\\\\b.tiff"])
def test_a_server_names_no_file_outside_the_output(gallery, tmp_path, name):
    url, _, _ = gallery
    change(tmp_path / "served", "load_data.csv", "SIM001_A01_s01_DNA.tiff", name)
    with pytest.raises(InputError, match="is no plain file name"):
        fetch(FetchConfig(PLATE, tmp_path / "deep/er/out", base_url=url))
    assert not list(tmp_path.rglob("*escaped*")) and not (tmp_path / "deep/er/out/load_data.csv").exists()


def test_a_server_names_no_platemap_outside_the_output(gallery, tmp_path):
    url, _, _ = gallery
    change(tmp_path / "served", "barcode_platemap.csv", "JUMP-Target-1_compound_platemap", "../../escaped")
    with pytest.raises(InputError, match=r"Plate_Map_Name: .*is no plain file name"):
        fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))


def test_what_a_killed_fetch_left_half_written_goes(gallery, tmp_path):
    url, _, _ = gallery
    half = tmp_path / "out/images" / PLATE / ".SIM001_A01_s01_DNA.4711.tmp.tiff"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert not half.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images", "metadata", "load_data.csv"}


def test_two_fetches_into_one_folder_do_not_meet(gallery, tmp_path):
    url, _, _ = gallery
    with module._alone(tmp_path), pytest.raises(InputError, match="another fetch is at work"):
        fetch(FetchConfig(PLATE, tmp_path, base_url=url))

from __future__ import annotations

import gzip
import threading
from collections import Counter
from functools import partial
from html import escape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest

from data_prep import download
from data_prep import fetch as module
from data_prep.fetch import FetchConfig, fetch
from data_prep.site_table import choose_label, read_sites
from data_prep.sources import probe_planes
from perturbjax.core.errors import InputError

BATCH, PLATE = "2020_11_04_CPJUMP1", "BR00116991"
MEASURED = f"{PLATE}__2020-11-05T19_51_35-Measurement1"


class Gallery(SimpleHTTPRequestHandler):
    """Serves files and lists folders as S3 does, counts what is asked for, breaks off the first `broken` replies."""

    def __init__(self, *arguments, asked: Counter, broken: dict[str, int], **options):
        self.asked, self.broken = asked, broken
        super().__init__(*arguments, **options)

    def do_GET(self):
        if "list-type=2" in self.path:
            self.list_objects()
            return
        name = Path(self.path).name
        self.asked[name] += 1
        if self.broken.get(name, 0) >= self.asked[name]:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"only this")
            return
        super().do_GET()

    def list_objects(self):
        """Two keys a page, as if the folder were long."""
        asked = parse_qs(urlsplit(self.path).query)
        folder = Path(self.directory) / asked["prefix"][0]
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        start = int(asked.get("continuation-token", ["0"])[0])
        keys = "".join(
            f"<Key>{asked['prefix'][0]}{escape(name)}</Key>" for name in names[start : start + 2]
        )
        more = (
            f"<NextContinuationToken>{start + 2}</NextContinuationToken>"
            if start + 2 < len(names)
            else ""
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"<ListBucketResult>{keys}{more}</ListBucketResult>".encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def gallery(plate, tmp_path, monkeypatch):
    """The simulated plate laid out as the Cell Painting Gallery lays out a plate of the JUMP pilot."""
    root = tmp_path / "served/cpg0000-jump-pilot/source_4"
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
    monkeypatch.setattr(download, "PAUSE_S", 0.01)
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
    fetch(
        FetchConfig(PLATE, tmp_path / "out", channels="DNA", wells="A02,B01", sites=1, base_url=url)
    )
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


def test_an_unknown_plate_channel_or_well_is_one_line(gallery, refused, tmp_path, monkeypatch):
    url, _, _ = gallery
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", url)
    flags = ["--out", tmp_path / "out"]
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


@pytest.mark.parametrize(
    "name", ["../../../escaped.tiff", "/tmp/escaped.tiff", "..", "a\\\\b.tiff"]
)
def test_a_server_names_no_file_outside_the_output(gallery, tmp_path, name):
    url, _, _ = gallery
    change(tmp_path / "served", "load_data.csv", "SIM001_A01_s01_DNA.tiff", name)
    with pytest.raises(InputError, match="is no plain file name"):
        fetch(FetchConfig(PLATE, tmp_path / "deep/er/out", base_url=url))
    assert (
        not list(tmp_path.rglob("*escaped*"))
        and not (tmp_path / "deep/er/out/load_data.csv").exists()
    )


def test_a_server_names_no_platemap_outside_the_output(gallery, tmp_path):
    url, _, _ = gallery
    change(
        tmp_path / "served",
        "barcode_platemap.csv",
        "JUMP-Target-1_compound_platemap",
        "../../escaped",
    )
    with pytest.raises(InputError, match=r"Plate_Map_Name: .*is no plain file name"):
        fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))


def test_what_a_killed_fetch_left_half_written_goes(gallery, tmp_path):
    url, _, _ = gallery
    half = tmp_path / "out/images" / PLATE / ".SIM001_A01_s01_DNA.4711.tmp.tiff"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert not half.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "images",
        "metadata",
        "load_data.csv",
    }


def test_two_fetches_into_one_folder_do_not_meet(gallery, tmp_path):
    url, _, _ = gallery
    with module._alone(tmp_path), pytest.raises(InputError, match="another fetch is at work"):
        fetch(FetchConfig(PLATE, tmp_path, base_url=url))


def moved(tmp_path: Path, accession: str, source: str) -> Path:
    """The served plate as one of another accession; its root."""
    served = tmp_path / "served"
    (served / accession).mkdir()
    (served / "cpg0000-jump-pilot/source_4").rename(served / accession / source)
    return served / accession / source


def rows_of(root: Path) -> tuple[Path, pd.DataFrame]:
    path = next(root.rglob("load_data.csv"))
    return path, pd.read_csv(path, dtype=str)


def renamed(root: Path, numbers: dict[str, int]) -> None:
    """Files called as an Opera Phenix calls them, with channels of those numbers."""
    path, table = rows_of(root)
    for channel, number in numbers.items():
        for name in table[f"FileName_Orig{channel}"]:
            found = next(root.rglob(name))
            found.rename(found.with_name(f"{found.stem}-ch{number}sk1fk1fl1.tiff"))
        table[f"FileName_Orig{channel}"] = (
            table[f"FileName_Orig{channel}"].str[:-5] + f"-ch{number}sk1fk1fl1.tiff"
        )
    table.columns = [
        column.replace("Actin", "AGP").replace("Tubulin", "ER") for column in table.columns
    ]
    table.to_csv(path, index=False)


def jump_tables(served: Path, wells: list[str]) -> None:
    (served / "jump").mkdir()
    lines = "".join(
        f"source_3,{PLATE},{well},JCP2022_{'033924' if well == 'A01' else '000001'}\n"
        for well in wells
    )
    (served / "jump/well.csv.gz").write_bytes(
        gzip.compress(
            b"Metadata_Source,Metadata_Plate,Metadata_Well,Metadata_JCP2022\n" + lines.encode()
        )
    )
    (served / "jump/compound.csv.gz").write_bytes(
        gzip.compress(
            b"Metadata_JCP2022,Metadata_InChIKey\nJCP2022_033924,KEY-D\nJCP2022_000001,KEY-1\n"
        )
    )
    (served / "jump/perturbation_control.csv").write_text(
        "Metadata_JCP2022,Metadata_pert_type,Metadata_Name,Metadata_modality\nJCP2022_033924,negcon,DMSO,compound\n"
    )


def of_jump(url: str, out: Path) -> FetchConfig:
    place = {"accession": "cpg0016", "source": "source_3", "batch": BATCH}
    return FetchConfig(PLATE, out, **place, base_url=url, jump_metadata_url=f"{url}/jump")


def test_a_plate_of_jumps_production_gets_its_perturbations_from_jumps_tables(
    gallery, tmp_path, capsys
):
    url, _, _ = gallery
    root = moved(tmp_path, "cpg0016-jump", "source_3")
    path, table = rows_of(root)
    path.with_name("load_data.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    jump_tables(tmp_path / "served", ["A01", "A02", "A03", "B01", "B02"])
    fetch(of_jump(url, tmp_path / "out"))
    said = capsys.readouterr().err
    assert (
        "1 wells have images and stand in no table of JUMP's (B03)" in said
        and "numbered otherwise" not in said
    )
    found = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out").sites
    assert len(found) == 10 and len(table) == 12
    assert set(found["Metadata_pert_iname"]) == {"DMSO", "JCP2022_000001"}
    assert set(found["Metadata_InChIKey"]) == {"KEY-D", "KEY-1"}


@pytest.mark.parametrize(
    ("numbers", "told"), [({"DNA": 5, "Actin": 2, "Tubulin": 4}, False), ({"DNA": 1}, True)]
)
def test_channels_numbered_otherwise_than_the_catalogue_says_are_told_of(
    gallery, tmp_path, capsys, numbers, told
):
    url, _, _ = gallery
    root = moved(tmp_path, "cpg0016-jump", "source_3")
    renamed(root, numbers)
    jump_tables(tmp_path / "served", ["A01", "A02", "A03", "B01", "B02", "B03"])
    fetch(of_jump(url, tmp_path / "out"))
    assert ("catalogue of source_3 says (DNA is 1 and not 5)" in capsys.readouterr().err) == told


def test_sites_whose_images_the_gallery_lacks_are_left_out_and_listed(gallery, tmp_path, capsys):
    url, _, _ = gallery
    next((tmp_path / "served").rglob("SIM001_A02_s01_Actin.tiff")).unlink()
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert (
        "1 of 12 sites lack images at the gallery (1, the first of well A02, site 1)"
        in capsys.readouterr().err
    )
    table = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out")
    assert len(table) == 11 and f"{PLATE}_A02_1" not in set(table.sites["site_id"])
    assert "SIM001_A02_s01_Actin.tiff" in (tmp_path / "out/missing_images.csv").read_text()


def test_a_plate_without_any_image_is_refused(gallery, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", gallery[0])
    for path in (tmp_path / "served").rglob("*.tiff"):
        path.unlink()
    assert "no site has all its images there" in refused(
        "fetch", "--plate", PLATE, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out/load_data.csv").exists()


def twins(root: Path) -> None:
    """AGP and Mito name one file, as in cpg0012 (jump-cellpainting/datasets#33), and the files are named as there."""
    path, table = rows_of(root)
    for channel, number in (("Actin", 4), ("Tubulin", 5)):
        for name in table[f"FileName_Orig{channel}"]:
            found = next(root.rglob(name))
            found.rename(
                found.with_name(f"{name.rpartition('_')[0]}_w{number}{hash(name) % 10**9}.tiff")
            )
    ends = [
        next(root.rglob(f"{name.rpartition('_')[0]}_w4*")).name
        for name in table["FileName_OrigActin"]
    ]
    table = table.rename(
        columns=lambda column: column.replace("Actin", "AGP").replace("Tubulin", "Mito")
    )
    table["FileName_OrigAGP"] = table["FileName_OrigMito"] = ends
    table.to_csv(path, index=False)


def test_channels_that_name_one_file_in_cpg0012_are_mended_by_what_is_there(
    gallery, tmp_path, capsys
):
    url, _, _ = gallery
    root = moved(tmp_path, "cpg0012-wawer-bioactivecompoundprofiling", "broad")
    twins(root)
    fetch(FetchConfig(PLATE, tmp_path / "out", accession="cpg0012", batch=BATCH, base_url=url))
    assert (
        "names the same files for AGP and Mito (jump-cellpainting/datasets#33); mended"
        in capsys.readouterr().err
    )
    sites = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out").sites
    assert all("_w4" in plane.file for plane in sites["file_AGP"])
    assert all("_w5" in plane.file for plane in sites["file_Mito"])


def test_channels_that_name_one_file_elsewhere_are_refused_until_one_is_chosen(
    gallery, refused, tmp_path, monkeypatch
):
    url, _, _ = gallery
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", url)
    twins(tmp_path / "served")
    flags = ["fetch", "--plate", PLATE, "--out", tmp_path / "out"]
    assert "channels AGP and Mito name the same file (SIM001_A01_s01_w4" in refused(*flags)
    fetch(FetchConfig(PLATE, tmp_path / "out", channels="DNA,AGP", base_url=url))


def test_illumination_functions_come_along_where_they_are_asked_for(gallery, tmp_path, capsys):
    url, _, _ = gallery
    folder = tmp_path / f"served/cpg0000-jump-pilot/source_4/images/{BATCH}/illum/{PLATE}"
    folder.mkdir(parents=True)
    for channel in ("DNA", "Actin"):
        np.save(folder / f"{PLATE}_Illum{channel}.npy", np.ones((64, 64)))
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url, illumination=True))
    there = sorted(path.name for path in (tmp_path / "out/illum" / PLATE).iterdir())
    assert there == [f"{PLATE}_IllumActin.npy", f"{PLATE}_IllumDNA.npy"]
    assert "no illumination function of channel Tubulin" in capsys.readouterr().err


def test_tables_alone_are_enough_to_build_from_where_the_images_lie(gallery, tmp_path):
    url, asked, _ = gallery
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url, tables_only=True))
    assert not (tmp_path / "out/images").exists() and not any("tiff" in name for name in asked)
    table = read_sites(tmp_path / "out/load_data.csv", url)
    plane = table.sites["file_DNA"].iloc[3]
    assert plane.file.startswith(
        f"{url}/cpg0000-jump-pilot/source_4/images/{BATCH}/images/{MEASURED}/Images/"
    )
    assert probe_planes([plane], "row 5")[plane].shape == (64, 64)


@pytest.mark.parametrize("tables", [1, 0])
def test_compounds_of_any_name_are_joined_and_without_them_the_platemap_alone(
    gallery, tmp_path, capsys, tables
):
    url, _, _ = gallery
    external = next((tmp_path / "served").rglob("*_metadata.tsv"))
    if tables:
        external.rename(external.with_name("external_metadata.tsv"))
    else:
        external.unlink()
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert ("platemap alone is joined" in capsys.readouterr().err) == (tables == 0)
    columns = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out").sites.columns
    assert "Metadata_broad_sample" in columns and ("Metadata_pert_iname" in columns) == bool(tables)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accession", "cpg0016"], "--source: say which of cpg0016"),
        (["--accession", "cpg0016", "--source", "source_4"], "--batch: say which of cpg0016"),
        (["--accession", "../cpg", "--batch", "b"], "is no plain file name"),
        (["--accession", "cpg0099-none", "--batch", "b"], "HTTP 404"),
    ],
)
def test_an_accession_that_is_not_told_in_full_or_not_there_is_one_line(
    gallery, refused, tmp_path, monkeypatch, flags, message
):
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", gallery[0])
    assert message in refused("fetch", "--plate", PLATE, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out/load_data.csv").exists()

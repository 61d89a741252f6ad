from __future__ import annotations

import gzip
import threading
from collections import Counter
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from gallery_server import Gallery, change, move_plate, read_rows, rename_files

from data_prep import download
from data_prep.fetch import FetchConfig, exclusive, fetch
from data_prep.site_table import choose_label, read_sites
from data_prep.sources import probe_planes
from perturbjax.core.errors import InputError

BATCH, PLATE = "2020_11_04_CPJUMP1", "BR00116991"
MEASURED = f"{PLATE}__2020-11-05T19_51_35-Measurement1"


@pytest.fixture
def gallery(plate, tmp_path, monkeypatch):
    """Local server with the simulated plate in the folders of the JUMP pilot."""
    root = tmp_path / "served/cpg0000-jump-pilot/source_4"
    table = pd.read_csv(plate / "load_data.csv", dtype=str)
    table = table[table["Metadata_Plate"] == "SIM001"]
    images = root / f"images/{BATCH}/images/{MEASURED}/Images"
    images.parent.mkdir(parents=True)
    (plate / "images/SIM001").rename(images)
    folder = f"/home/ubuntu/bucket/projects/2019_07_11_JUMP-CP/{BATCH}/images/{MEASURED}/Images/"
    listed = table[["Metadata_Well", "Metadata_Site"]].assign(Metadata_Plate=PLATE)
    for channel in ("DNA", "Actin", "Tubulin"):
        listed[f"FileName_Orig{channel}"] = table[f"FileName_Orig{channel}"]
        listed[f"PathName_Orig{channel}"] = folder
    samples = table.drop_duplicates("Metadata_Well")
    maps = f"workspace/metadata/platemaps/{BATCH}"
    for path, text in {
        f"workspace/load_data_csv/{BATCH}/{PLATE}/load_data.csv": listed.to_csv(index=False),
        f"{maps}/barcode_platemap.csv": (
            f"Assay_Plate_Barcode,Plate_Map_Name\n{PLATE},JUMP-Target-1_compound_platemap\n"
        ),
        f"{maps}/platemap/JUMP-Target-1_compound_platemap.txt": pd.DataFrame(
            {
                "well_position": samples["Metadata_Well"],
                "broad_sample": samples["Metadata_broad_sample"].replace("DMSO", ""),
            }
        ).to_csv(sep="\t", index=False),
        "workspace/metadata/external_metadata/JUMP-Target-1_compound_metadata.tsv": (
            "broad_sample\tInChIKey\tpert_iname\n"
            "SIM-00001\tKEY-1\tfirst\nSIM-00002\tKEY-2\tsecond\n"
        ),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    requests, broken = Counter(), {}
    handler = partial(Gallery, directory=str(tmp_path / "served"), requests=requests, broken=broken)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(download, "PAUSE_S", 0.01)
    yield f"http://127.0.0.1:{server.server_port}", requests, broken
    server.shutdown()
    server.server_close()


def test_fetched_plate_is_ready_to_build(gallery, tmp_path):
    url, _, _ = gallery
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    table = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out")
    assert len(table) == 12 and table.channels == ("DNA", "Actin", "Tubulin")
    assert choose_label(table.sites, "", table.source) == "Metadata_pert_iname"
    assert set(table.sites["Metadata_pert_iname"]) == {"DMSO", "first", "second"}


def test_channels_wells_and_sites_are_selected(gallery, tmp_path):
    url, requests, _ = gallery
    fetch(
        FetchConfig(PLATE, tmp_path / "out", channels="DNA", wells="A02,B01", sites=1, base_url=url)
    )
    assert len(list((tmp_path / "out/images").rglob("*.tiff"))) == 2
    table = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out")
    assert list(table.sites["site_id"]) == [f"{PLATE}_A02_1", f"{PLATE}_B01_1"]
    assert not any("Actin" in name for name in requests)


def test_broken_connection_is_retried(gallery, tmp_path):
    url, requests, broken = gallery
    name = "SIM001_A01_s01_DNA.tiff"
    broken[name] = 2
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert requests[name] == 3
    served = next((tmp_path / "served").rglob(name))
    assert (tmp_path / "out/images" / PLATE / name).read_bytes() == served.read_bytes()


def test_interrupted_fetch_resumes(gallery, tmp_path):
    url, requests, broken = gallery
    last = "SIM001_B03_s02_Tubulin.tiff"
    broken[last] = 99
    with pytest.raises(InputError, match=f"{last}: cannot be downloaded after 5 attempts"):
        fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert not (tmp_path / "out/load_data.csv").exists()
    assert not (tmp_path / "out/images" / PLATE / last).exists()
    downloaded = {path.name for path in (tmp_path / "out/images").rglob("*.tiff")}
    assert downloaded
    requests.clear()
    broken.clear()
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert not downloaded & set(requests)
    assert len(read_sites(tmp_path / "out/load_data.csv", tmp_path / "out")) == 12


def test_unknown_plate_channel_or_well_is_one_line(gallery, refused, tmp_path, monkeypatch):
    url, _, _ = gallery
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", url)
    flags = ["--out", tmp_path / "out"]
    assert "HTTP 404" in refused("fetch", "--plate", "BR0", *flags)
    assert "--channels Mito: not on this plate" in refused(
        "fetch", "--plate", PLATE, "--channels", "Mito", *flags
    )
    assert "--wells Z99" in refused("fetch", "--plate", PLATE, "--wells", "Z99", *flags)
    assert not (tmp_path / "out/load_data.csv").exists()


@pytest.mark.parametrize(
    "name", ["../../../escaped.tiff", "/tmp/escaped.tiff", "..", "a\\\\..\\\\b.tiff"]
)
def test_server_cannot_write_outside_the_output(gallery, tmp_path, name):
    url, _, _ = gallery
    change(tmp_path / "served", "load_data.csv", "SIM001_A01_s01_DNA.tiff", name)
    with pytest.raises(InputError, match=r"is not a plain file name|is not below batch"):
        fetch(FetchConfig(PLATE, tmp_path / "deep/er/out", base_url=url))
    assert (
        not list(tmp_path.rglob("*escaped*"))
        and not (tmp_path / "deep/er/out/load_data.csv").exists()
    )


def test_server_cannot_name_a_platemap_outside_the_output(gallery, tmp_path):
    url, _, _ = gallery
    change(
        tmp_path / "served",
        "barcode_platemap.csv",
        "JUMP-Target-1_compound_platemap",
        "../../escaped",
    )
    with pytest.raises(InputError, match=r"Plate_Map_Name: .*is not a plain file name"):
        fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))


def test_partial_files_of_a_killed_fetch_are_removed(gallery, tmp_path):
    url, _, _ = gallery
    partial_file = tmp_path / "out/images" / PLATE / ".SIM001_A01_s01_DNA.4711.tmp.tiff"
    partial_file.parent.mkdir(parents=True)
    partial_file.write_bytes(b"partial")
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert not partial_file.exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "images",
        "metadata",
        "load_data.csv",
    }


def test_second_fetch_in_the_same_folder_is_refused(gallery, tmp_path):
    url, _, _ = gallery
    with exclusive(tmp_path), pytest.raises(InputError, match="another fetch is running"):
        fetch(FetchConfig(PLATE, tmp_path, base_url=url))


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
        "Metadata_JCP2022,Metadata_pert_type,Metadata_Name,Metadata_modality\n"
        "JCP2022_033924,negcon,DMSO,compound\n"
    )


def jump_options(url: str, out: Path) -> FetchConfig:
    keys = {"accession": "cpg0016", "source": "source_3", "batch": BATCH}
    return FetchConfig(PLATE, out, **keys, base_url=url, jump_metadata_url=f"{url}/jump")


def test_cpg0016_treatments_are_joined_from_jump_tables(gallery, tmp_path, capsys):
    url, _, _ = gallery
    root = move_plate(tmp_path, "cpg0016-jump", "source_3")
    path, table = read_rows(root)
    path.with_name("load_data.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    jump_tables(tmp_path / "served", ["A01", "A02", "A03", "B01", "B02"])
    fetch(jump_options(url, tmp_path / "out"))
    messages = capsys.readouterr().err
    assert (
        "1 wells with images are in no JUMP table (B03)" in messages
        and "channel numbers" not in messages
    )
    sites = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out").sites
    assert len(sites) == 10 and len(table) == 12
    assert set(sites["Metadata_pert_iname"]) == {"DMSO", "JCP2022_000001"}
    assert set(sites["Metadata_InChIKey"]) == {"KEY-D", "KEY-1"}


@pytest.mark.parametrize(
    ("numbers", "is_reported"), [({"DNA": 5, "Actin": 2, "Tubulin": 4}, False), ({"DNA": 1}, True)]
)
def test_unexpected_channel_numbers_are_reported(gallery, tmp_path, capsys, numbers, is_reported):
    url, _, _ = gallery
    root = move_plate(tmp_path, "cpg0016-jump", "source_3")
    rename_files(root, numbers)
    jump_tables(tmp_path / "served", ["A01", "A02", "A03", "B01", "B02", "B03"])
    fetch(jump_options(url, tmp_path / "out"))
    messages = capsys.readouterr().err
    assert ("catalog of source_3 (DNA is 1, not 5)" in messages) == is_reported


def test_sites_with_missing_images_are_left_out_and_listed(gallery, tmp_path, capsys):
    url, _, _ = gallery
    next((tmp_path / "served").rglob("SIM001_A02_s01_Actin.tiff")).unlink()
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert (
        "1 of 12 sites lack images in the gallery (1 images, the first of well A02, site 1)"
        in capsys.readouterr().err
    )
    table = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out")
    assert len(table) == 11 and f"{PLATE}_A02_1" not in set(table.sites["site_id"])
    assert "SIM001_A02_s01_Actin.tiff" in (tmp_path / "out/missing_images.csv").read_text()


def test_plate_without_images_is_refused(gallery, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", gallery[0])
    for path in (tmp_path / "served").rglob("*.tiff"):
        path.unlink()
    assert "no site has all its images in the gallery" in refused(
        "fetch", "--plate", PLATE, "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out/load_data.csv").exists()


def duplicate_names(root: Path) -> None:
    """Name one file for AGP and Mito, as in cpg0012 (jump-cellpainting/datasets#33)."""
    path, table = read_rows(root)
    for channel, number in (("Actin", 4), ("Tubulin", 5)):
        for name in table[f"FileName_Orig{channel}"]:
            file = next(root.rglob(name))
            file.rename(
                file.with_name(f"{name.rpartition('_')[0]}_w{number}{hash(name) % 10**9}.tiff")
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


def test_duplicate_names_in_cpg0012_are_repaired(gallery, tmp_path, capsys):
    url, _, _ = gallery
    root = move_plate(tmp_path, "cpg0012-wawer-bioactivecompoundprofiling", "broad")
    duplicate_names(root)
    fetch(FetchConfig(PLATE, tmp_path / "out", accession="cpg0012", batch=BATCH, base_url=url))
    assert (
        "names the same files for AGP and Mito (jump-cellpainting/datasets#33); repaired"
        in capsys.readouterr().err
    )
    sites = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out").sites
    assert all("_w4" in plane.file for plane in sites["file_AGP"])
    assert all("_w5" in plane.file for plane in sites["file_Mito"])


def test_duplicate_names_require_a_choice_of_channels(gallery, refused, tmp_path, monkeypatch):
    url, _, _ = gallery
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", url)
    duplicate_names(tmp_path / "served")
    flags = ["fetch", "--plate", PLATE, "--out", tmp_path / "out"]
    assert "channels AGP and Mito name the same file (SIM001_A01_s01_w4" in refused(*flags)
    fetch(FetchConfig(PLATE, tmp_path / "out", channels="DNA,AGP", base_url=url))


def test_illumination_functions_are_downloaded(gallery, tmp_path, capsys):
    url, _, _ = gallery
    folder = tmp_path / f"served/cpg0000-jump-pilot/source_4/images/{BATCH}/illum/{PLATE}"
    folder.mkdir(parents=True)
    for channel in ("DNA", "Actin"):
        np.save(folder / f"{PLATE}_Illum{channel}.npy", np.ones((64, 64)))
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url, illumination=True))
    names = sorted(path.name for path in (tmp_path / "out/illum" / PLATE).iterdir())
    assert names == [f"{PLATE}_IllumActin.npy", f"{PLATE}_IllumDNA.npy"]
    assert "no illumination function of channel Tubulin" in capsys.readouterr().err


def test_tables_only_reads_images_from_the_gallery(gallery, tmp_path):
    url, requests, _ = gallery
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url, tables_only=True))
    assert not (tmp_path / "out/images").exists() and not any("tiff" in name for name in requests)
    table = read_sites(tmp_path / "out/load_data.csv", url)
    plane = table.sites["file_DNA"].iloc[3]
    assert plane.file.startswith(
        f"{url}/cpg0000-jump-pilot/source_4/images/{BATCH}/images/{MEASURED}/Images/"
    )
    assert probe_planes([plane], "row 5")[plane].shape == (64, 64)


@pytest.mark.parametrize("tables", [1, 0])
def test_compound_table_may_have_any_name_or_be_missing(gallery, tmp_path, capsys, tables):
    url, _, _ = gallery
    external = next((tmp_path / "served").rglob("*_metadata.tsv"))
    if tables:
        external.rename(external.with_name("external_metadata.tsv"))
    else:
        external.unlink()
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    assert ("only the plate map is joined" in capsys.readouterr().err) == (tables == 0)
    columns = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out").sites.columns
    assert "Metadata_broad_sample" in columns and ("Metadata_pert_iname" in columns) == bool(tables)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accession", "cpg0016"], "--source: is required for cpg0016"),
        (["--accession", "cpg0016", "--source", "source_4"], "--batch: is required for cpg0016"),
        (["--accession", "../cpg", "--batch", "b"], "is not a plain file name"),
        (["--accession", "cpg0099-none", "--batch", "b"], "HTTP 404"),
    ],
)
def test_incomplete_or_unknown_accession_is_one_line(
    gallery, refused, tmp_path, monkeypatch, flags, message
):
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", gallery[0])
    assert message in refused("fetch", "--plate", PLATE, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out/load_data.csv").exists()


def test_equal_names_in_different_folders_keep_their_folders(gallery, tmp_path):
    url, _, _ = gallery
    path, table = read_rows(tmp_path / "served")
    images = next((tmp_path / "served").rglob("SIM001_A01_s01_DNA.tiff")).parent
    table = table[[name for name in table if "Actin" not in name and "Tubulin" not in name]]
    for row, name in enumerate(table["FileName_OrigDNA"]):
        folder = images / f"{table['Metadata_Well'][row]}_{table['Metadata_Site'][row]}"
        folder.mkdir()
        (images / name).rename(folder / "ch1.tiff")
        table.loc[row, "PathName_OrigDNA"] += folder.name
    table["FileName_OrigDNA"] = "ch1.tiff"
    table.to_csv(path, index=False)
    fetch(FetchConfig(PLATE, tmp_path / "out", wells="A01", base_url=url))
    assert (tmp_path / "out/images" / PLATE / "A01_2/ch1.tiff").is_file()
    fetch(FetchConfig(PLATE, tmp_path / "out", base_url=url))
    sites = read_sites(tmp_path / "out/load_data.csv", tmp_path / "out").sites
    files = {plane.file for plane in sites["file_DNA"]}
    assert len(files) == len({Path(file).read_bytes() for file in files}) == 12


@pytest.mark.parametrize(
    "url", ["http://user:secret@127.0.0.1:9", "http://user:se@cret@127.0.0.1:9"]
)
def test_password_in_the_base_url_is_not_printed(refused, tmp_path, monkeypatch, url):
    monkeypatch.setenv("PERTURBJAX_GALLERY_URL", url)
    monkeypatch.setattr(download, "PAUSE_S", 0.01)
    line = refused("fetch", "--plate", PLATE, "--out", tmp_path / "out")
    assert "cret" not in line and "***@127.0.0.1" in line

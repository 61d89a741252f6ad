"""`table`: channels, planes, time points, missing images, plate maps and the summary."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from data_prep.inspection import InspectConfig, inspect
from data_prep.make_table import TableConfig, make_table
from perturbjax.core.errors import InputError


def write_images(root: Path, *names: str) -> Path:
    """Create empty files; `table` reads names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two wells, two sites and two channels of one plate."""
    names = [f"P_{w}_s{s}_w{c}.tif" for w in ("A01", "B02") for s in (1, 2) for c in (1, 2)]
    return write_images(tmp_path / "images", *names)


def table_of(root: Path, **options: object) -> pd.DataFrame:
    out = root.parent / "load_data.csv"
    table = make_table(TableConfig(images=root, out=out, **options))  # type: ignore[arg-type]
    written = pd.read_csv(out, dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(written, table.astype(object), check_dtype=False)
    return table


def test_table_has_one_row_per_site(folder, capsys):
    table = table_of(folder)
    assert table["Metadata_Well"].tolist() == ["A01", "A01", "B02", "B02"]
    assert table.loc[3, "FileName_OrigCh2"] == "P_B02_s2_w2.tif"
    summary = capsys.readouterr().out
    for text in (
        "ImageXpress (MetaXpress), 8 images",
        "2 (2 per plate)",
        "4 (2 per well)",
        "Ch1, Ch2",
        "missing    none",
        "none; add them with --platemap",
        f"perturbjax inspect --load-data {folder.parent / 'load_data.csv'} --images {folder} "
        "--label-column none",
    ):
        assert text in summary


def test_sites_are_sorted_by_number(tmp_path):
    root = write_images(tmp_path / "i", *(f"P_A01_s{site}_w1.tif" for site in (1, 2, 10)))
    assert table_of(root)["Metadata_Site"].tolist() == ["1", "2", "10"]


def test_sites_without_a_channel_are_left_out_and_reported(folder, capsys):
    (folder / "P_B02_s2_w2.tif").unlink()
    assert len(table_of(folder)) == 3
    report = capsys.readouterr().out
    assert (
        "1 sites without an image of some channel are left out (plate P, well B02, site 2: no Ch2)"
        in report
    )


def test_channels_are_renamed_and_selected(folder):
    table = table_of(folder, channels="AGP=2,DNA=1")
    assert [name for name in table if name.startswith("FileName")] == [
        "FileName_OrigAGP",
        "FileName_OrigDNA",
    ]
    assert table.loc[0, "FileName_OrigAGP"] == "P_A01_s1_w2.tif"
    assert [name for name in table_of(folder, channels="Ch2") if name.startswith("File")] == [
        "FileName_OrigCh2"
    ]
    with pytest.raises(
        InputError, match="--channels DNA=7: no channel 7; the images have Ch1=1, Ch2=2"
    ):
        table_of(folder, channels="DNA=7")


def test_two_channels_need_two_names(folder):
    with pytest.raises(InputError, match="--channels DNA=1,DNA=2: two channels have the name DNA"):
        table_of(folder, channels="DNA=1,DNA=2")


def test_channel_names_of_the_microscope_suit_the_command_line(tmp_path):
    names = [f"A1--W00001--P00001--Z00000--T00000--{c}.tif" for c in ("Alexa 488", "DAPI, 2")]
    table = table_of(write_images(tmp_path / "data", *names))
    assert {"FileName_OrigAlexa_488", "FileName_OrigDAPI_2"} <= set(table)


def test_the_middle_focal_plane_is_used_with_a_note(tmp_path, capsys):
    names = [f"r01c01f01p0{z}-ch1sk1fk1fl1.tiff" for z in (1, 2, 3)]
    table = table_of(write_images(tmp_path / "p", *names))
    assert table["FileName_OrigCh1"].tolist() == [names[1]]
    note = capsys.readouterr().err
    assert "have 3 focal planes; the middle one of each site is used" in note
    pattern = note.rpartition("--pattern ")[2].strip()
    assert pattern == "'{well}f{site}p01-ch{channel}sk{time}fk1fl1.tiff'"
    table = table_of(tmp_path / "p", pattern=pattern.strip("'"))
    assert table["FileName_OrigCh1"].tolist() == [names[0]]


def test_time_points_are_refused_with_a_pattern_that_chooses_one(tmp_path):
    names = [f"VID1_A1_1_0{day}d00h00m.tif" for day in (0, 1)]
    root = write_images(tmp_path / "i", *names)
    with pytest.raises(InputError, match="2 time points") as refused:
        table_of(root)
    pattern = refused.value.message.split("'")[1]
    assert pattern == "{plate}_{well}_{site}_01d00h00m.tif"
    assert table_of(root, pattern=pattern)["FileName_OrigCh1"].tolist() == names[1:]


def test_two_images_of_one_position_are_refused(tmp_path):
    names = [f"x{n}/ZStep_{z}/P_A01_s1_w1.tif" for n in (1, 2) for z in (1, 2, 3)]
    with pytest.raises(
        InputError, match=r"x1/ZStep_1/.*\.tif and x2/ZStep_1/.* are both plate P, well A01"
    ):
        table_of(write_images(tmp_path / "i", *names))
    table = table_of(tmp_path / "i", pattern="{plate}/ZStep_{z}/*_{well}_s{site}_w{channel}.tif")
    assert table["Metadata_Plate"].tolist() == ["x1", "x2"]
    assert table["PathName_OrigCh1"].tolist() == ["x1/ZStep_2", "x2/ZStep_2"]


def test_plate_map_adds_treatments_and_negative_controls(folder, capsys):
    path = folder.parent / "map.csv"
    path.write_text("well,compound,dose\nA1,DMSO,\nB2,taxol,10\nC3,taxol,5\n")
    table = table_of(folder, platemap=path)
    assert table["Metadata_pert_iname"].tolist() == ["DMSO", "DMSO", "taxol", "taxol"]
    report = capsys.readouterr().out
    assert "1 negative control wells (DMSO)" in report and "2: DMSO (1 wells), taxol (1" in report
    path.write_text("well,compound,control_type\nA1,x,neg\nB2,taxol,\n")
    assert (
        table_of(folder, platemap=path)["Metadata_control_type"].tolist()
        == ["negcon"] * 2 + [""] * 2
    )
    assert "1 negative control wells (x)" in capsys.readouterr().out
    path.write_text("well,compound\nA1,x\nB2,taxol\n")
    table_of(folder, platemap=path)
    assert "no negative control wells; name them DMSO in the plate map" in capsys.readouterr().out


def test_wells_without_a_treatment_are_left_out_with_a_warning(folder, capsys):
    path = folder.parent / "map.csv"
    path.write_text("well,compound\nA1,taxol\nB2,\n")
    assert set(table_of(folder, platemap=path)["Metadata_Well"]) == {"A01"}
    assert "2 sites of 1 wells have no treatment in the plate map" in capsys.readouterr().err
    path.write_text("well,compound\nH1,taxol\n")
    with pytest.raises(InputError, match="well A01 of row 2 is not in the plate map"):
        table_of(folder, platemap=path)


@pytest.mark.shared
def test_real_folders_are_recognized(shared, tmp_path, capsys):
    out = tmp_path / "load_data.csv"
    table = make_table(TableConfig(images=shared / "data/sbs_transfluor", out=out))
    assert len(table) == 72 and table["Metadata_Well"].nunique() == 24
    inspect(InspectConfig(shared / "data/sbs_transfluor", load_data=out, label_column="none"))
    assert "512 x 512 uint8 (48)" in capsys.readouterr().out
    table = make_table(
        TableConfig(images=shared / "data/jump_fov", out=out, channels="DNA=4,AGP=5")
    )
    assert table["FileName_OrigAGP"].tolist() == ["r01c02f01p01-ch5sk1fk1fl1.tiff"]

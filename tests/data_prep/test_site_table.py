from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import plate_formats
import pytest
import tifffile

from data_prep.site_table import choose_label, merged_identities, read_sites
from perturbjax.core.errors import InputError
from perturbjax.core.plates import normalize_well


def test_sites_have_files_in_channel_order(plate):
    table = read_sites(plate / "load_data.csv", plate, channels=("Tubulin", "DNA"))
    assert len(table) == 24
    assert table.channels == ("Tubulin", "DNA")
    first = table.sites.iloc[0]
    assert (first["site_id"], first["row"]) == ("SIM001_A01_1", 2)
    assert first["file_Tubulin"].file == str(
        (plate / "images/SIM001/SIM001_A01_s01_Tubulin.tiff").resolve()
    )


def test_channels_do_not_depend_on_column_order(plate, edit):
    before = read_sites(plate / "load_data.csv", plate, channels=("DNA", "Actin")).sites
    edit(lambda table: table[sorted(table.columns, reverse=True)])
    after = read_sites(plate / "load_data.csv", plate, channels=("DNA", "Actin")).sites
    pd.testing.assert_frame_equal(before, after[before.columns])


@pytest.mark.parametrize(
    "folder",
    [
        "images/{plate}",
        "/home/ubuntu/bucket/projects/batch/images/{plate}",
        "D:\\screens\\batch\\images\\{plate}\\",
    ],
)
def test_path_of_another_machine_is_matched_by_its_last_folders(plate, edit, folder):
    def change(table):
        for channel in ("DNA", "Actin", "Tubulin"):
            table[f"PathName_Orig{channel}"] = [
                folder.format(plate=p) for p in table["Metadata_Plate"]
            ]
        return table

    edit(change)
    planes = read_sites(plate / "load_data.csv", plate).sites["file_DNA"]
    assert all(Path(plane.file).is_file() for plane in planes)


@pytest.mark.parametrize(
    "name", ["img/{name}", "img\\{name}", "{root}/img/{name}", "file:///D:/data/img/{url}"]
)
def test_file_names_may_contain_folders(simulated, tmp_path, name):
    table = pd.read_csv(simulated / "load_data.csv", dtype=str).head(2)
    names = [f"A {site}#1.tif" for site in (1, 2)]
    for file, folder, new in zip(
        table["FileName_OrigDNA"], table["PathName_OrigDNA"], names, strict=True
    ):
        (tmp_path / "img").mkdir(exist_ok=True)
        shutil.copy(simulated / folder / file, tmp_path / "img" / new)
    column = "URL_OrigDNA" if name.startswith("file") else "FileName_OrigDNA"
    position = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
    table = table[position].assign(
        **{column: [name.format(name=n, root=tmp_path, url=quote(n)) for n in names]}
    )
    table.to_csv(tmp_path / "load_data.csv", index=False)
    planes = read_sites(tmp_path / "load_data.csv", tmp_path).sites["file_DNA"]
    assert [Path(plane.file).name for plane in planes] == names


def test_rows_of_different_folders_with_one_file_are_refused(plate, edit):
    shutil.rmtree(plate / "images/SIM002")

    def change(table):
        table["FileName_OrigDNA"] = table["FileName_OrigDNA"].str.replace("SIM002", "SIM001")
        return table[[name for name in table if "Actin" not in name and "Tubulin" not in name]]

    edit(change)
    with pytest.raises(
        InputError, match=r"row 14, channel DNA: SIM001_A01_s01_DNA.tiff of images/SI"
    ):
        read_sites(plate / "load_data.csv", plate / "images/SIM001")


def test_repeated_images_are_reported(plate, edit, capsys):
    def change(table):
        table.loc[1, "FileName_OrigDNA"] = table.loc[0, "FileName_OrigDNA"]
        table["FileName_OrigActin"] = table["FileName_OrigTubulin"]
        return table

    edit(change)
    read_sites(plate / "load_data.csv", plate)
    messages = capsys.readouterr().err
    assert "rows 2 and 3, channel DNA: both sites use the same image" in messages
    assert "row 2: channels Actin and Tubulin use the same image" in messages
    assert "(24 such rows)" in messages


def test_colors_of_one_image_are_no_repeated_images(plate, tmp_path, capsys):
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 7
    tifffile.imwrite(plate / "a.tif", image, photometric="rgb")
    header = "Metadata_Plate,Metadata_Well,Metadata_Site,FileName_OrigA,FileName_OrigB"
    (tmp_path / "t.csv").write_text(
        f"{header},Channel_OrigA,Channel_OrigB\nP1,A01,1,a.tif,a.tif,R,G\n"
    )
    read_sites(tmp_path / "t.csv", plate)
    assert "same image" not in capsys.readouterr().err


def test_channels_in_one_ome_tiff_are_no_repeated_images(simulated, tmp_path, capsys):
    plate = plate_formats.as_ome_tiff(simulated, tmp_path / "plate")
    capsys.readouterr()
    read_sites(plate / "load_data.csv", plate)
    assert "same image" not in capsys.readouterr().err


def test_urls_replace_missing_file_names(plate, edit):
    def change(table):
        for channel in ("DNA", "Actin", "Tubulin"):
            folder, name = (
                table.pop(f"PathName_Orig{channel}"),
                table.pop(f"FileName_Orig{channel}"),
            )
            table[f"URL_Orig{channel}"] = "s3://bucket/project/" + folder + "/" + name
        return table

    edit(change)
    table = read_sites(plate / "load_data.csv", plate)
    assert table.channels == ("DNA", "Actin", "Tubulin")
    assert table.sites["file_DNA"].map(lambda plane: Path(plane.file).is_file()).all()


@pytest.mark.parametrize(
    ("spelling", "well"),
    [("a1", "A01"), ("A01", "A01"), ("P024", "P24"), ("AF48", "AF48"), ("B01.Q4", "D02")],
)
def test_well_names_are_normalized(spelling, well):
    assert normalize_well(spelling) == well


def test_wells_with_and_without_quadrant_are_refused(plate, edit):
    edit(lambda table: table.assign(Metadata_Well="Q2-" + table["Metadata_Well"]))
    wells = set(read_sites(plate / "load_data.csv", plate).sites["Metadata_Well"])
    assert wells and all(int(well[1:]) % 2 == 0 for well in wells)

    def change(table):
        table.loc[1, "Metadata_Well"] = "A02"
        return table

    edit(change)
    with pytest.raises(InputError, match=r"plate SIM001 has wells with a quadrant \(Q2-A01\) and"):
        read_sites(plate / "load_data.csv", plate)


def test_wells_that_differ_in_spelling_only_are_duplicates(plate, edit):
    def change(table):
        table.loc[1, ["Metadata_Well", "Metadata_Site"]] = ["a1", "01"]
        return table

    edit(change)
    with pytest.raises(InputError, match=r"rows 2 and 3: both are plate SIM001, well A01, site 1"):
        read_sites(plate / "load_data.csv", plate)


def test_default_label_is_the_first_usable_column(plate):
    table = read_sites(plate / "load_data.csv", plate)
    assert choose_label(table.sites, "", table.source) == "Metadata_pert_iname"


def test_empty_treatment_is_solvent_in_a_platemap_only(plate, edit, tmp_path):
    edit(lambda table: table.replace({"Metadata_pert_iname": {"DMSO": ""}}))
    table = read_sites(plate / "load_data.csv", plate)
    with pytest.raises(
        InputError, match=r"row \d+: Metadata_pert_iname is empty or NA .*fill it in .DMSO"
    ):
        choose_label(table.sites, "", table.source)
    wells = "".join(
        f"{well}\t{'' if well == 'A01' else 'BRD-1'}\n"
        for well in sorted(set(table.sites["Metadata_Well"]))
    )
    (tmp_path / "map.tsv").write_text("well_position\tbroad_sample\n" + wells)
    joined = read_sites(plate / "load_data.csv", plate, platemap=tmp_path / "map.tsv").sites
    assert set(joined.loc[joined["Metadata_Well"] == "A01", "Metadata_broad_sample"]) == {"DMSO"}


def test_empty_label_is_refused_with_its_row(plate, edit):
    def change(table):
        table.loc[3, "Metadata_moa"] = "NA"
        return table

    edit(change)
    table = read_sites(plate / "load_data.csv", plate)
    with pytest.raises(InputError, match="row 5: Metadata_moa is empty"):
        choose_label(table.sites, "Metadata_moa", table.source)


def test_label_without_prefix_is_refused_with_the_correct_name(plate, edit):
    edit(lambda table: table.assign(drug="taxol"))
    table = read_sites(plate / "load_data.csv", plate)
    with pytest.raises(
        InputError, match=r"--label-column drug: .* rename it there to Metadata_drug"
    ):
        choose_label(table.sites, "drug", table.source)


def test_merged_labels_are_reported(plate):
    sites = read_sites(plate / "load_data.csv", plate).sites
    assert merged_identities(sites, "Metadata_pert_iname") == []
    merged = merged_identities(sites, "Metadata_moa")
    assert (
        "Metadata_moa merges several Metadata_pert_iname in 1 of its classes: mechanism 1 (2)"
        in merged
    )


def test_empty_samples_are_untreated_if_the_map_has_controls(plate, tmp_path, capsys):
    wells = sorted(set(read_sites(plate / "load_data.csv", plate).sites["Metadata_Well"]))
    samples = ["", "", "ORF-1", "ORF-1", "LacZ", "LacZ"]
    lines = [f"{well}\t{sample}" for well, sample in zip(wells, samples, strict=True)]
    (tmp_path / "map.tsv").write_text("well_position\tbroad_sample\n" + "\n".join(lines))
    (tmp_path / "orf.tsv").write_text(
        "broad_sample\tpert_iname\tcontrol_type\nORF-1\tBRCA1\t\nLacZ\tLacZ\tnegcon\n"
    )
    maps = {"platemap": tmp_path / "map.tsv", "compounds": tmp_path / "orf.tsv"}
    sites = read_sites(plate / "load_data.csv", plate, **maps).sites
    empty = sites[sites["Metadata_Well"].isin(wells[:2])]
    assert set(empty["Metadata_pert_iname"]) == {"untreated"}
    assert set(empty["Metadata_control_type"]) == {""}
    assert "empty in 2 of 6 wells; they are labeled untreated" in capsys.readouterr().err


@pytest.mark.shared
def test_jump_target_1_has_64_dmso_wells_and_four_merged_names(shared, plate, tmp_path):
    profiles = shared / "data/cpjump1_profiles"
    maps = profiles / "JUMP-Target-1_compound_platemap.tsv"
    wells = pd.read_csv(maps, sep="\t")["well_position"]
    image = "images/SIM001/SIM001_A01_s01_DNA.tiff"
    rows = {
        "Metadata_Plate": "BR00116991",
        "Metadata_Well": wells,
        "Metadata_Site": 1,
        "FileName_OrigDNA": image,
    }
    pd.DataFrame(rows).assign(
        FileName_OrigDNA=Path(image).name, PathName_OrigDNA="images/SIM001"
    ).to_csv(tmp_path / "load_data.csv", index=False)
    compounds = profiles / "JUMP-Target-1_compound_metadata.tsv"
    table = read_sites(tmp_path / "load_data.csv", plate, platemap=maps, compounds=compounds)
    label = choose_label(table.sites, "", table.source)
    assert (table.sites[label] == "DMSO").sum() == 64
    assert (
        table.sites.loc[table.sites[label] == "DMSO", "Metadata_control_type"] == "negcon"
    ).all()
    assert any(
        "merges several Metadata_broad_sample in 4 of its classes" in note
        for note in merged_identities(table.sites, label)
    )


def test_well_outside_the_platemap_is_refused(plate, tmp_path):
    (tmp_path / "map.tsv").write_text("well_position\tbroad_sample\nA01\tBRD-1\n")
    with pytest.raises(InputError, match=r"map\.tsv: well A02 of row 4 is not in the plate map"):
        read_sites(plate / "load_data.csv", plate, platemap=tmp_path / "map.tsv")


@pytest.mark.parametrize("column", ["Well", "Site"])
def test_platemap_with_position_columns_is_refused(plate, tmp_path, column):
    (tmp_path / "map.tsv").write_text(f"well_position\tbroad_sample\t{column}\nA01\tBRD-1\tX\n")
    with pytest.raises(
        InputError, match=rf"map\.tsv: column {column} would replace Metadata_{column}"
    ):
        read_sites(plate / "load_data.csv", plate, platemap=tmp_path / "map.tsv")


def test_other_digits_stay_text(plate, edit):
    edit(lambda table: table.replace({"Metadata_Site": {"2": "²"}}))
    assert set(read_sites(plate / "load_data.csv", plate).sites["Metadata_Site"]) == {"1", "²"}


def test_plates_of_one_name_are_separated_by_batch(plate, edit, capsys):
    edit(lambda table: table.assign(Metadata_Plate="1"))
    with pytest.raises(InputError, match=r"plate 1, well A01, site 1; .*a column Metadata_Batch"):
        read_sites(plate / "load_data.csv", plate)
    edit(lambda table: table.assign(Metadata_Batch=["b1"] * 12 + ["b2"] * 12))
    table = read_sites(plate / "load_data.csv", plate).sites
    assert list(table["Metadata_Plate"].unique()) == ["b1_1", "b2_1"]
    assert table["site_id"].is_unique and table["site_id"].iloc[0] == "b1_1_A01_1"
    assert "renamed plates that occur in several batches" in capsys.readouterr().err
    # A batch for each row of wells is no reason to rename the plate.
    edit(lambda table: table.iloc[:12].assign(Metadata_Batch=table["Metadata_Well"].str[0]))
    assert set(read_sites(plate / "load_data.csv", plate).sites["Metadata_Plate"]) == {"1"}

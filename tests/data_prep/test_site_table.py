from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from data_prep.site_table import choose_label, merged_identities, read_sites
from perturbjax.core.errors import InputError
from perturbjax.core.plates import normalize_well


def test_every_row_is_one_site_with_its_files_in_the_order_asked_for(plate):
    table = read_sites(plate / "load_data.csv", plate, channels=("Tubulin", "DNA"))
    assert len(table) == 24
    assert table.channels == ("Tubulin", "DNA")
    first = table.sites.iloc[0]
    assert (first["site_id"], first["row"]) == ("SIM001_A01_1", 2)
    assert first["file_Tubulin"].file == str(
        (plate / "images/SIM001/SIM001_A01_s01_Tubulin.tiff").resolve()
    )


def test_channels_go_by_name_whatever_the_order_of_columns(plate, edit):
    before = read_sites(plate / "load_data.csv", plate, channels=("DNA", "Actin")).sites
    edit(lambda table: table[sorted(table.columns, reverse=True)])
    after = read_sites(plate / "load_data.csv", plate, channels=("DNA", "Actin")).sites
    pd.testing.assert_frame_equal(before, after[before.columns])


@pytest.mark.parametrize(
    "written",
    [
        "images/{plate}",
        "/home/ubuntu/bucket/projects/batch/images/{plate}",
        "D:\\screens\\batch\\images\\{plate}\\",
    ],
)
def test_a_path_of_another_machine_is_matched_by_its_last_folders(plate, edit, written):
    def change(table):
        for channel in ("DNA", "Actin", "Tubulin"):
            table[f"PathName_Orig{channel}"] = [
                written.format(plate=p) for p in table["Metadata_Plate"]
            ]
        return table

    edit(change)
    found = read_sites(plate / "load_data.csv", plate).sites["file_DNA"]
    assert all(Path(plane.file).is_file() for plane in found)


def test_urls_serve_where_there_are_no_file_names(plate, edit):
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
    ("spelling", "well"), [("a1", "A01"), ("A01", "A01"), ("P024", "P24"), ("AF48", "AF48")]
)
def test_wells_are_spelt_one_way(spelling, well):
    assert normalize_well(spelling) == well


def test_wells_that_only_differ_in_spelling_are_duplicates(plate, edit):
    def change(table):
        table.loc[1, ["Metadata_Well", "Metadata_Site"]] = ["a1", "01"]
        return table

    edit(change)
    with pytest.raises(InputError, match=r"rows 2 and 3: both are plate SIM001, well A01, site 1"):
        read_sites(plate / "load_data.csv", plate)


def test_the_label_is_the_first_usable_column(plate):
    table = read_sites(plate / "load_data.csv", plate)
    assert choose_label(table.sites, "", table.source) == "Metadata_pert_iname"


def test_an_empty_perturbation_is_the_solvent_only_where_the_platemap_says_so(
    plate, edit, tmp_path
):
    edit(lambda table: table.replace({"Metadata_pert_iname": {"DMSO": ""}}))
    table = read_sites(plate / "load_data.csv", plate)
    with pytest.raises(
        InputError, match=r"row \d+: Metadata_pert_iname is empty .*fill it in .DMSO"
    ):
        choose_label(table.sites, "", table.source)
    wells = "".join(
        f"{well}\t{'' if well == 'A01' else 'BRD-1'}\n"
        for well in sorted(set(table.sites["Metadata_Well"]))
    )
    (tmp_path / "map.tsv").write_text("well_position\tbroad_sample\n" + wells)
    joined = read_sites(plate / "load_data.csv", plate, platemap=tmp_path / "map.tsv").sites
    assert set(joined.loc[joined["Metadata_Well"] == "A01", "Metadata_broad_sample"]) == {"DMSO"}


def test_an_empty_label_of_another_column_is_refused_with_its_row(plate, edit):
    def change(table):
        table.loc[3, "Metadata_moa"] = ""
        return table

    edit(change)
    table = read_sites(plate / "load_data.csv", plate)
    with pytest.raises(InputError, match="row 5: Metadata_moa is empty"):
        choose_label(table.sites, "Metadata_moa", table.source)


def test_a_label_without_the_prefix_of_metadata_is_refused_with_the_name_it_needs(plate, edit):
    edit(lambda table: table.assign(drug="taxol"))
    table = read_sites(plate / "load_data.csv", plate)
    with pytest.raises(
        InputError, match=r"--label-column drug: .* rename it there to Metadata_drug"
    ):
        choose_label(table.sites, "drug", table.source)


def test_what_a_label_merges_is_said(plate):
    sites = read_sites(plate / "load_data.csv", plate).sites
    assert merged_identities(sites, "Metadata_pert_iname") == []
    merged = merged_identities(sites, "Metadata_moa")
    assert (
        "Metadata_moa merges several Metadata_pert_iname in 1 of its classes: mechanism 1 (2)"
        in merged
    )


@pytest.mark.shared
def test_jump_target_1_has_64_dmso_wells_and_four_names_of_two_samples(shared, plate, tmp_path):
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


def test_a_well_outside_the_platemap_is_refused(plate, tmp_path):
    (tmp_path / "map.tsv").write_text("well_position\tbroad_sample\nA01\tBRD-1\n")
    with pytest.raises(InputError, match=r"map\.tsv: well A02 of row 4 is not in the platemap"):
        read_sites(plate / "load_data.csv", plate, platemap=tmp_path / "map.tsv")


@pytest.mark.parametrize("column", ["Plate", "Well", "Site"])
def test_a_platemap_that_would_replace_a_sites_position_is_refused(plate, tmp_path, column):
    (tmp_path / "map.tsv").write_text(f"well_position\tbroad_sample\t{column}\nA01\tBRD-1\tX\n")
    with pytest.raises(
        InputError, match=rf"map\.tsv: column {column} would replace Metadata_{column}"
    ):
        read_sites(plate / "load_data.csv", plate, platemap=tmp_path / "map.tsv")


def test_a_site_number_that_only_looks_like_one_is_kept_as_text(plate, edit):
    edit(lambda table: table.replace({"Metadata_Site": {"2": "²"}}))
    assert set(read_sites(plate / "load_data.csv", plate).sites["Metadata_Site"]) == {"1", "²"}

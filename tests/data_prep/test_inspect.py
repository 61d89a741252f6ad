"""Summary, warnings and suggested command of `inspect`."""

from __future__ import annotations

import shlex

import pandas as pd
import pytest
import tifffile

from data_prep.inspection import InspectConfig, build_command, inspect


def inspect_plate(plate) -> None:
    inspect(InspectConfig(images=plate, load_data=plate / "load_data.csv"))


def test_inspect_counts_plates_wells_sites_and_classes(plate, capsys):
    inspect_plate(plate)
    report = capsys.readouterr().out
    for text in (
        "12 (6 per plate)",
        "24 (2 per well",
        "DNA, Actin, Tubulin",
        "64 x 64 uint16 (24)",
    ):
        assert text in report
    assert "merges" not in report


def test_inspect_ends_with_the_build_command(plate, capsys):
    inspect_plate(plate)
    command = capsys.readouterr().out.rpartition("Next step: ")[2].strip()
    table = plate / "load_data.csv"
    assert shlex.split(command) == [
        *("perturbjax", "build", "--load-data", str(table), "--images", str(plate)),
        *("--aggregate", "none", "--segment-channels", "DNA", "--out", "dataset"),
    ]


def test_build_command_adds_the_flags_for_stacks_and_sizes():
    headers = pd.DataFrame({"shape": [(64, 64), (32, 48)], "depth": [1, 5]})
    command = build_command(InspectConfig(images="a b", label_column="none"), ("x",), headers)
    assert command == (
        "perturbjax build --images 'a b' --label-column none --project max --resize 32 --out "
        "dataset"
    )


def test_inspect_warns_about_mixed_bit_depths(plate, capsys):
    for path in (plate / "images/SIM001").glob("*_Actin.tiff"):
        tifffile.imwrite(path, (tifffile.imread(path) >> 8).astype("uint8"), metadata=None)
    inspect_plate(plate)
    report = capsys.readouterr().out
    assert "warning: images of channel Actin have different data types (uint16 on plate" in report


def test_inspect_warns_about_labels_that_differ_in_case(plate, edit, capsys):
    edit(lambda t: t.assign(Metadata_pert_iname=["dmso", *t["Metadata_pert_iname"][1:]]))
    inspect_plate(plate)
    assert "dmso differ only in upper and lower case" in capsys.readouterr().out


def test_inspect_counts_missing_files_and_ends_with_status_2(plate, refused):
    for path in (plate / "images/SIM001").glob("*_Actin.tiff"):
        path.unlink()
    line = refused("inspect", "--load-data", plate / "load_data.csv", "--images", plate)
    assert "row 2, channel Actin: the file does not exist (12 missing files)" in line


def test_inspect_refuses_a_table_without_file_names(plate, refused):
    (plate / "load_data.csv").write_text("Metadata_Plate,Metadata_Well\np,A01\n")
    line = refused("inspect", "--load-data", plate / "load_data.csv", "--images", plate)
    assert "no FileName_Orig<CHANNEL> column" in line


@pytest.mark.shared
def test_inspect_warns_about_the_majority_class_of_real_cells(shared, capsys):
    cells = shared / "data/bbbc021_cells"
    inspect(
        InspectConfig(images=cells, load_data=cells / "load_data.csv", label_column="Metadata_moa")
    )
    report = capsys.readouterr().out
    assert "Microtubule stabilizers is the label of 38.8% of all sites" in report

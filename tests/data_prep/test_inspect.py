from __future__ import annotations

import pandas as pd
import pytest

from data_prep.inspection import InspectConfig, inspect
from data_prep.layout_warnings import layout_warnings
from perturbjax.core.plates import shared_layouts
from perturbjax.data import splits


def wells(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["Metadata_Plate", "Metadata_Well", "Metadata_pert_iname"])


def test_the_report_counts_plates_wells_sites_and_classes(plate, capsys):
    inspect(InspectConfig(images=plate, load_data=plate / "load_data.csv"))
    report = capsys.readouterr().out
    for words in (
        "12 (6 per plate)",
        "24 (2 per well",
        "DNA, Actin, Tubulin",
        "64 x 64 uint16 (24)",
    ):
        assert words in report
    assert "merges" not in report


def test_a_compound_in_one_well_is_warned_of():
    sites = wells(
        [("p", "A01", "DMSO"), ("p", "A02", "DMSO"), ("p", "A03", "x"), ("p", "A04", "y")]
    )
    assert any(
        "2 of 3 classes" in warning and "one well only" in warning
        for warning in layout_warnings(sites, "Metadata_pert_iname")
    )


def test_plates_of_one_layout_are_named():
    layout = [("A01", "DMSO"), ("A02", "x"), ("A03", "y")]
    sites = wells([(plate, well, label) for plate in ("p", "q") for well, label in layout])
    assert shared_layouts(sites) == [["p", "q"]]
    found = layout_warnings(sites, "Metadata_pert_iname")
    assert any("2 plates share one layout (p, q)" in warning for warning in found)
    assert any(
        "treatment and position effects cannot be distinguished" in warning for warning in found
    )
    other = wells(
        [
            ("p", "A01", "DMSO"),
            ("p", "A02", "x"),
            ("p", "A03", "y"),
            ("q", "A01", "x"),
            ("q", "A02", "y"),
            ("q", "A03", "DMSO"),
        ]
    )
    assert shared_layouts(other) == []


def test_inspect_and_split_mean_the_same_by_a_layout_where_a_plate_lost_two_wells():
    layout = [(f"A{column:02d}", f"compound-{column}") for column in range(1, 13)]
    rows = [("p", *well) for well in layout] + [("q", *well) for well in layout[:-2]]
    rows += [("r", well, f"other-{well}") for well, _ in layout]
    sites = wells(rows)
    assert any(
        "2 plates share one layout (p, q)" in warning
        for warning in layout_warnings(sites, "Metadata_pert_iname")
    )
    groups = dict(zip(sites["Metadata_Plate"], splits.assign_groups(sites, "layout"), strict=True))
    assert groups == {"p": "p", "q": "p", "r": "r"}


def test_missing_files_are_counted_and_end_with_status_2(plate, refused, capsys):
    for path in (plate / "images/SIM001").glob("*_Actin.tiff"):
        path.unlink()
    line = refused("inspect", "--load-data", plate / "load_data.csv", "--images", plate)
    assert "row 2, channel Actin: the file does not exist (12 missing files)" in line


def test_a_table_that_cannot_be_used_ends_with_status_2(plate, refused):
    (plate / "load_data.csv").write_text("Metadata_Plate,Metadata_Well\np,A01\n")
    assert "no FileName_Orig<CHANNEL> column" in refused(
        "inspect", "--load-data", plate / "load_data.csv", "--images", plate
    )


@pytest.mark.shared
def test_the_majority_class_of_real_cells_is_warned_of(shared, capsys):
    cells = shared / "data/bbbc021_cells"
    inspect(
        InspectConfig(images=cells, load_data=cells / "load_data.csv", label_column="Metadata_moa")
    )
    report = capsys.readouterr().out
    assert "Microtubule stabilizers is the label of 38.8% of all sites" in report

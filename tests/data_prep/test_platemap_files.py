"""Plate maps: lists with usual column names, grids, several plates, and spreadsheets."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pandas as pd
import pytest

from data_prep.platemap import join_platemap
from data_prep.platemap_files import read_platemap
from perturbjax.core.errors import InputError
from perturbjax.core.plates import FORMATS, row_name


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def grid_rows(shape: tuple[int, int], value: str = "c", corner: str = "") -> list[list[str]]:
    height, width = shape
    header = [corner, *map(str, range(1, width + 1))]
    return [header] + [
        [row_name(row), *(f"{value}{row % 3}" for _ in range(width))] for row in range(height)
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    ("header", "columns"),
    [
        (["Well", "Compound", "Dose"], {"well_position", "pert_iname", "Dose"}),
        (["well_position", "broad_sample", "x"], {"well_position", "broad_sample", "x"}),
        (
            ["Metadata_Well", "drug", "Conc (µM)"],
            {"well_position", "pert_iname", "concentration_uM"},
        ),
        (["Position", "pert_iname", "gene"], {"well_position", "pert_iname", "gene"}),
        (["Well ID", "siRNA", "dose_um"], {"well_position", "pert_iname", "dose_uM"}),
    ],
)
def test_usual_column_names_are_read(tmp_path, separator, header, columns):
    text = separator.join(header) + "\n" + separator.join(["A1", "taxol", "0.5"]) + "\n"
    table = read_platemap(write(tmp_path / "map.csv", text))
    assert set(table.columns) == columns


def test_blank_columns_are_left_out(tmp_path):
    table = read_platemap(write(tmp_path / "map.csv", "well,drug,,\nA1,x,,\nA2,y,,\n"))
    assert list(table.columns) == ["well_position", "pert_iname"]


def test_rows_and_columns_give_wells(tmp_path):
    table = read_platemap(write(tmp_path / "map.csv", "row,col,drug\nB,3,x\n2,4,y\n"))
    assert list(table["well_position"]) == ["B3", "r2c4"]


@pytest.mark.parametrize("shape", FORMATS.values())
def test_grids_of_standard_plates_are_read(tmp_path, shape):
    text = "\n".join(",".join(row) for row in grid_rows(shape)) + "\n"
    table = read_platemap(write(tmp_path / "map.csv", text))
    assert len(table) == shape[0] * shape[1] and set(table.columns) == {
        "well_position",
        "pert_iname",
    }
    assert table["pert_iname"].iloc[shape[1]] == "c1"  # the first well of row B


def test_several_grids_have_titles(tmp_path):
    blocks = [[["Compound"]], grid_rows((8, 12)), [[""]], grid_rows((8, 12), "1,", "dose")]
    text = "\n".join(";".join(row) for block in blocks for row in block)
    table = read_platemap(write(tmp_path / "map.csv", text))
    assert list(table.columns) == ["well_position", "pert_iname", "dose"]
    assert table.iloc[-1].tolist() == ["H12", "c1", "1.1"]


def test_a_single_grid_has_the_treatments(tmp_path):
    for title, expected in (("Plate 1", "pert_iname"), ("dose", "dose"), ("", "pert_iname")):
        rows = [[title], *grid_rows((8, 12))]
        text = "\n".join(",".join(row) for row in rows if any(row))
        assert expected in read_platemap(write(tmp_path / "map.csv", text)).columns


def test_empty_wells_of_a_grid_are_left_out(tmp_path):
    rows = grid_rows((8, 12))
    rows[1][1:] = [""] * 12
    text = "\n".join("\t".join(row) for row in rows)
    assert len(read_platemap(write(tmp_path / "map.tsv", text))) == 84


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compound,dose\nx,1\n", "has no column of wells, and no grid"),
        (
            ",1,2,3\nA,x,y,z\nB,x,y,z\nC,x,y,z\n",
            "a grid has 3 rows and 3 columns; plates have 2 x 3",
        ),
        (",1,2,3\nA,x,y,z\nB,x,y,z\n,1,2,3\nA,x,y,z\nB,x,y,z\n", "two grids of pert_iname"),
        ("", "is empty"),
    ],
)
def test_maps_that_are_not_clear_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_platemap(write(tmp_path / "map.csv", text))


SITES = pd.DataFrame(
    {
        "row": [2, 3, 4],
        "Metadata_Plate": ["P1", "P1", "P2"],
        "Metadata_Well": ["A01", "A02", "A01"],
        "Metadata_Site": ["1", "1", "1"],
    }
)


def join(tmp_path: Path, text: str) -> pd.DataFrame:
    path = write(tmp_path / "map.csv", text)
    return join_platemap(SITES, read_platemap(path), path, None)


def test_a_map_with_plates_is_joined_by_plate_and_well(tmp_path):
    joined = join(tmp_path, "Plate,Well,Compound\nP1,A1,x\nP1,A2,y\nP2,A1,z\nP3,A1,q\n")
    assert list(joined["Metadata_pert_iname"]) == ["x", "y", "z"]


def test_a_map_without_plates_applies_to_all_plates_with_a_note(tmp_path, capsys):
    joined = join(tmp_path, "Well,Compound\nA1,x\nA2,y\n")
    assert list(joined["Metadata_pert_iname"]) == ["x", "y", "x"]
    assert "applies to all 2 plates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plate,well,drug\nX,A1,x\n", "has none of the plates P1, P2; its plates are X"),
        (
            "plate,well,drug\nP1,A1,x\nP1,A2,x\n",
            "well A01 of plate P2 of row 4 is not in the plate",
        ),
        ("plate,well,drug\nP1,A1,x\nP1,A01,y\n", "well_position A01, plate P1 occurs twice"),
    ],
)
def test_maps_of_other_plates_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        join(tmp_path, text)


def test_control_types_have_one_spelling(tmp_path):
    text = "well,drug,control_type\nA1,x,Negative control\nA2,y,pos\nA3,z,\nA4,w,trt\n"
    table = read_platemap(write(tmp_path / "map.csv", text))
    assert list(table["control_type"]) == ["negcon", "poscon", "", "trt"]


def write_workbook(path: Path, sheets: dict[str, list[list[object]]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_a_workbook_with_a_list_is_read(tmp_path):
    rows: list[list[object]] = [["Well", "Compound", "Dose"], ["A1", "x", 10], ["A2", None, 0.5]]
    path = write_workbook(tmp_path / "map.xlsx", {"Notes": [["by Ann"]], "Plate": rows})
    table = read_platemap(path)
    assert table.to_numpy().tolist() == [["A1", "x", "10"], ["A2", "", "0.5"]]


def test_grids_on_sheets_have_the_names_of_the_sheets(tmp_path):
    rows = grid_rows((8, 12))
    path = write_workbook(tmp_path / "map.xlsx", {"Sheet1": rows, "dose": grid_rows((8, 12), "1")})
    assert list(read_platemap(path).columns) == ["well_position", "pert_iname", "dose"]


def test_damaged_and_hostile_workbooks_are_refused(tmp_path, monkeypatch):
    path = write_workbook(tmp_path / "map.xlsx", {"a": [["well", "drug"], ["A1", "x"]]})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("xl/extra.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>")
    with pytest.raises(InputError, match="has a document type"):
        read_platemap(path)
    with pytest.raises(InputError, match="cannot be read as XLSX"):
        read_platemap(write(tmp_path / "text.xlsx", "well,drug\n"))
    with pytest.raises(InputError, match="old Excel file"):
        read_platemap(write(tmp_path / "old.xls", "x"))
    monkeypatch.setattr("data_prep.excel.LARGEST_WORKBOOK", 1000)
    with pytest.raises(InputError, match="after decompression; at most"):
        read_platemap(path)

"""Which columns are features and how metadata are read: the same for CSV, parquet and AnnData."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from tiny_profiles import make_table, write

from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.evaluation.score_tables import ranking_table
from perturbjax.profiles.classify import classify
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import ClassifyConfig, Preparation, ProfileConfig
from perturbjax.profiles.profile_reader import read_profiles

PLATES = [f"P{i}" for i in range(1, 6)]


def make_noise(features: int = 12, wells: int = 24, seed: int = 5) -> pd.DataFrame:
    """Return noise on five plates: treatments in random wells, rows sorted by treatment."""
    rng = np.random.default_rng(seed)
    rows = []
    for plate in PLATES:
        for well, name in enumerate(
            rng.permutation(np.repeat(["DMSO", "a", "b", "c"], wells // 4))
        ):
            row = {
                "Metadata_Plate": plate,
                "Metadata_Well": f"{chr(65 + well // 6)}{well % 6 + 1:02d}",
                "Metadata_pert_iname": name,
                "Metadata_control_type": "negcon" if name == "DMSO" else "trt",
            }
            values = rng.normal(size=features)
            rows.append({**row, **{f"Cells_AreaShape_F{i}": v for i, v in enumerate(values)}})
    table = pd.DataFrame(rows)
    return table.sort_values(["Metadata_pert_iname", "Metadata_Plate"]).reset_index(drop=True)


CODES = {"DMSO": 0, "a": 1, "b": 3, "c": 10}
LEAKS = {
    "Unnamed: 0": lambda t: t.insert(0, "Unnamed: 0", range(len(t))),
    "row": lambda t: t.insert(0, "row", range(1, len(t) + 1)),
    "ObjectNumber": lambda t: t.insert(4, "ObjectNumber", np.arange(len(t)) * 2),
    "Cells_Parent_Nuclei": lambda t: t.insert(4, "Cells_Parent_Nuclei", np.arange(len(t)) * 2),
    "WellID": lambda t: t.insert(4, "WellID", np.arange(len(t)) * 2),
    "Image_Metadata_TreatmentID": lambda t: t.insert(
        4, "Image_Metadata_TreatmentID", t["Metadata_pert_iname"].map(CODES)
    ),
    "Concentration_uM": lambda t: t.insert(
        4, "Concentration_uM", t["Metadata_pert_iname"].map(CODES)
    ),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("column", LEAKS)
def test_columns_that_are_no_measurements_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture, column: str, suffix: str
) -> None:
    table = make_noise()
    LEAKS[column](table)
    path = write(table, tmp_path / f"noise{suffix}")
    profiles, _, _ = load_profiles(ProfileConfig((path,)))
    assert len(profiles.names) == 12 and column not in profiles.names
    messages = capsys.readouterr().err
    assert "info: 120 profiles with" in messages and "left out" in messages and column in messages


def test_row_numbers_do_not_give_scores_on_noise(tmp_path: Path) -> None:
    path = tmp_path / "with_index.csv"
    make_noise().assign(Concentration_uM=lambda t: t["Metadata_pert_iname"].map(CODES)).to_csv(path)
    evaluation = classify(
        ClassifyConfig(
            ProfileConfig((path,)),
            tmp_path / "out",
            models="random_forest",
            split=SplitConfig("plate"),
            preparation=Preparation(normalize_by="training"),
            replicates=20,
        )
    )
    table = ranking_table(evaluation).set_index(["level", "model"])
    assert table.loc[("site", "random_forest"), "accuracy"] < 0.5


def test_feature_that_nearly_determines_the_plate_is_kept_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = make_noise()
    code = table["Metadata_Plate"].map({plate: i for i, plate in enumerate(PLATES)})
    table["Cells_Exposure"] = code.where(table.index != 3, 4 - code)
    profiles, _, _ = load_profiles(ProfileConfig((write(table, tmp_path / "a.csv"),)))
    assert "Cells_Exposure" in profiles.names
    warning = "warning: feature Cells_Exposure determines Metadata_Plate for at least 99%"
    assert warning in capsys.readouterr().err


def test_measurements_of_cellprofiler_are_kept(tmp_path: Path) -> None:
    names = (
        "Cells_AreaShape_EulerNumber",
        "Cells_Neighbors_NumberOfNeighbors_5",
        "Image_Count_Cells",
    )
    rng = np.random.default_rng(0)
    table = make_noise().assign(**{name: rng.integers(0, 9, 120) for name in names})
    profiles, _, _ = load_profiles(ProfileConfig((write(table, tmp_path / "a.csv"),)))
    assert set(names) <= set(profiles.names)


def test_means_of_identifiers_over_cells_are_kept(tmp_path: Path) -> None:
    """Published profiles of wells use them; they depend on the number of cells."""
    values = np.random.default_rng(0).normal(size=120)
    path = write(make_noise().assign(Cells_Parent_Nuclei=values), tmp_path / "a.csv")
    assert "Cells_Parent_Nuclei" in load_profiles(ProfileConfig((path,)))[0].names


def test_spreadsheet_error_names_the_dropped_column(tmp_path: Path) -> None:
    table = make_noise().astype({"Cells_AreaShape_F3": object})
    table.loc[16, "Cells_AreaShape_F3"] = "#DIV/0!"
    for path in (tmp_path / "a.csv", tmp_path / "a.parquet"):
        profiles = read_profiles([write(table.astype({"Cells_AreaShape_F3": str}), path)])
        assert len(profiles.names) == 11
        reason = "Cells_AreaShape_F3 (not numeric: 1 cells such as '#DIV/0!' in row 17)"
        assert any(reason in note for note in profiles.notes)


LABELS = ["01", "1", "1.0", "NA", "None", "null", "nan", "N/A", "1e5", "TRUE", "inf", " a", "a"]


def test_csv_parquet_and_anndata_give_the_same_metadata(tmp_path: Path) -> None:
    table = make_table(plates=2, wells=len(LABELS)).assign(Metadata_pert_iname=LABELS * 2)
    table["Metadata_Plate"] = table["Metadata_Plate"].map({"P0": "007", "P1": "008"})
    features = [name for name in table if not name.startswith("Metadata_")]
    rows = table.drop(columns=features).set_axis(table.index.astype(str))
    anndata.AnnData(
        table[features].to_numpy(np.float32), obs=rows, var=pd.DataFrame(index=features)
    ).write_h5ad(tmp_path / "a.h5ad")
    paths = [write(table, tmp_path / "a.csv"), write(table, tmp_path / "a.parquet")]
    first, *others = (read_profiles([path]) for path in (*paths, tmp_path / "a.h5ad"))
    for other in others:
        pd.testing.assert_frame_equal(other.metadata, first.metadata)
        np.testing.assert_allclose(other.values, first.values, rtol=1e-6)
    labels = ["01", "1", "1.0", "", "", "", "", "", "1e5", "TRUE", "inf", "a", "a"]
    assert first.metadata["Metadata_pert_iname"].tolist() == labels * 2
    assert set(first.metadata["Metadata_Plate"]) == {"007", "008"}
    assert any("removed spaces at the ends of 2 cells" in note for note in first.notes)


def test_wells_and_sites_are_normalized(tmp_path: Path) -> None:
    table = make_table(plates=1).assign(Metadata_Site="01")
    table["Metadata_Well"] = table["Metadata_Well"].str.lower().str.replace("0", "")
    profiles = read_profiles([write(table, tmp_path / "a.csv")])
    assert profiles.metadata["site_id"][0] == "P0_A01_1"
    assert any("renamed wells of 24 rows (such as 'a1' to A01)" in one for one in profiles.notes)


def test_labels_that_differ_in_case_give_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = make_noise()
    table.loc[:2, "Metadata_pert_iname"] = "A"
    load_profiles(ProfileConfig((write(table, tmp_path / "a.csv"),)))
    assert "warning: labels differ only in upper and lower case: A, a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("separator", "decimal", "note"),
    [
        (";", ".", "columns are separated by semicolons"),
        (";", ",", "columns are separated by semicolons, decimal commas"),
        ("\t", ".", "columns are separated by tabs"),
    ],
)
def test_other_separators_are_read(tmp_path: Path, separator: str, decimal: str, note: str) -> None:
    table = make_noise()
    table.to_csv(tmp_path / "a.csv", sep=separator, decimal=decimal, index=False)
    profiles = read_profiles([tmp_path / "a.csv"])
    features = table.filter(like="Cells_").to_numpy(np.float32)
    np.testing.assert_allclose(profiles.values, features, rtol=1e-6)
    assert f"{tmp_path / 'a.csv'}: {note}" in profiles.notes


def make_cells(table: pd.DataFrame, cells: int = 5) -> pd.DataFrame:
    """Return a table of single cells with about the profiles of `table`."""
    repeated = table.loc[table.index.repeat(cells)].reset_index(drop=True)
    repeated.insert(2, "Metadata_ObjectNumber", np.tile(range(1, cells + 1), len(table)))
    features = repeated.filter(like="Cells_").columns
    repeated[features] += np.random.default_rng(0).normal(size=(len(repeated), len(features)))
    return repeated


@pytest.mark.parametrize("site", [False, True])
def test_single_cells_need_aggregation(tmp_path: Path, site: bool) -> None:
    table = make_table()
    cells = make_cells(table.assign(Metadata_Site="1") if site else table)
    path = write(cells, tmp_path / "cells.csv")
    with pytest.raises(InputError, match=r"480 rows .* single cells. Use --aggregate median"):
        load_profiles(ProfileConfig((path,)))
    profiles, negcon, _ = load_profiles(ProfileConfig((path,), aggregate="median"))
    assert len(profiles) == len(table) and negcon.sum() == 16
    medians = cells.groupby(["Metadata_Plate", "Metadata_Well"], sort=False)["Cells_f0"].median()
    np.testing.assert_allclose(profiles.values[:, 0], medians, rtol=1e-5)


def test_plate_in_two_files_is_named(tmp_path: Path) -> None:
    table = make_table(plates=2)
    paths = [write(table, tmp_path / f"b{batch}.csv") for batch in "12"]
    for aggregate in ("none", "median"):
        with pytest.raises(InputError, match=r"b1\.csv and .*b2\.csv: plate P0 is in both files"):
            read_profiles(paths, aggregate)
    for path, batch in zip(paths, "12", strict=True):
        write(table.assign(Metadata_Batch=batch), path)
    profiles = read_profiles(paths)
    assert set(profiles.column("Metadata_Plate")) == {"1_P0", "1_P1", "2_P0", "2_P1"}
    assert "renamed plates that occur in several batches" in " ".join(profiles.notes)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK", "Excel is not supported. Export the table as CSV"),
        ("a.sqlite", b"SQLite format 3", "is a database of single cells. Use --aggregate median"),
        ("a.h5ad", b"nothing", "cannot be read as AnnData"),
        ("a.csv", "Metadata_Plate,Metadata_Well,µ\n".encode("utf-16"), "is not UTF-8 text"),
        ("a.csv", b"Metadata_Plate,Metadata_Well,f\nP,A01,1\nP,A02,\xb5\n", "is not UTF-8 text"),
    ],
)
def test_unsupported_files_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_profiles([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_folder_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder. Give its files"):
        read_profiles([tmp_path])


def test_missing_labels_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = make_noise().replace({"Metadata_pert_iname": {"c": "None"}})
    profiles, _, _ = load_profiles(ProfileConfig((write(table, tmp_path / "a.csv"),)))
    assert len(profiles) == 90
    assert "info: left out 30 rows without Metadata_pert_iname" in capsys.readouterr().err


def test_no_shared_class_is_reported_for_a_dataset_too(monkeypatch, tmp_path: Path) -> None:
    """With --data there is no feature file to name: the message names the dataset."""
    from perturbjax.profiles import classify as module
    from perturbjax.profiles.profile_options import SourceConfig

    table = make_table(plates=2)
    first = table["Metadata_Plate"] == "P0"
    table.loc[first, "Metadata_pert_iname"] += " of P0"
    profiles = read_profiles([write(table, tmp_path / "a.parquet")])
    none = np.zeros(len(profiles), bool)
    label = "Metadata_pert_iname"
    monkeypatch.setattr(module, "load_profiles", lambda config: (profiles, none, label))
    config = ClassifyConfig(
        ProfileConfig(source=SourceConfig((tmp_path / "dataset",))), tmp_path / "out", hold_out="P1"
    )
    with pytest.raises(InputError, match=r"dataset: no class of column Metadata_pert_iname is in"):
        classify(config)
    with pytest.raises(InputError, match="no class of column"):
        classify(replace(config, hold_out="each"))

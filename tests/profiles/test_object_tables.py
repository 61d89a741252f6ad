from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.profiles.profile_reader import read_profiles

KINDS = ("Cells", "Nuclei")


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """Twelve images in six wells, with 3 to 8 cells and nuclei each."""
    rng = np.random.default_rng(0)
    numbers = np.arange(1, 13)
    images = pd.DataFrame(
        {
            "ImageNumber": numbers,
            "Metadata_Plate": ["0012" if number <= 6 else "0013" for number in numbers],
            "Metadata_Well": [f"A{(number + 1) // 2:02d}" for number in numbers],
            "Metadata_Site": numbers % 2 + 1,
            "Metadata_pert_iname": ["a" if number % 4 in (1, 2) else "b" for number in numbers],
            "Count_Cells": numbers,
        }
    )
    objects = {}
    for kind in KINDS:
        image = np.repeat(numbers, rng.integers(3, 9, 12))
        count = pd.Series(image).groupby(image).cumcount() + 1
        objects[kind] = pd.DataFrame(
            {
                "ImageNumber": image,
                "ObjectNumber": count,
                "Parent_Cells": count,
                "AreaShape_Area": rng.normal(100, 9, len(image)),
                "Intensity_Mean_DNA": rng.normal(5, 1, len(image)),
            }
        )
    return {"Image": images, **objects}


def prefixed(table: pd.DataFrame, prefix: str) -> pd.DataFrame:
    return table.rename(columns={c: f"{prefix}_{c}" for c in table if "Number" not in c})


def write_database(path: Path, tables: dict[str, pd.DataFrame], per: str = "") -> Path:
    with closing(sqlite3.connect(path)) as database:
        for kind, table in tables.items():
            prefixed(table, kind).to_sql(per + kind, database, index=False)
    return path


def expected_medians(tables: dict[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    wells = tables["Image"].set_index("ImageNumber")[["Metadata_Plate", "Metadata_Well"]]
    return {
        f"{kind}_{name}": tables[kind]
        .join(wells, on="ImageNumber")
        .groupby(["Metadata_Plate", "Metadata_Well"])[name]
        .median()
        .to_numpy()
        for kind in KINDS
        for name in ("AreaShape_Area", "Intensity_Mean_DNA")
    }


def check_profiles(paths: list[Path], tables: dict[str, pd.DataFrame]) -> None:
    profiles = read_profiles(paths, "median")
    expected = expected_medians(tables)
    assert set(profiles.names) == set(expected)
    for number, name in enumerate(profiles.names):
        np.testing.assert_allclose(profiles.values[:, number], expected[name], rtol=1e-6)
    assert set(profiles.column("Metadata_Plate")) == {"0012", "0013"}
    assert "Metadata_pert_iname" in profiles.metadata and len(profiles) == 6
    cells = tables["Cells"].groupby((tables["Cells"]["ImageNumber"] + 1) // 2).size()
    assert list(profiles.column("Metadata_Count_Cells")) == list(cells.astype(str))


@pytest.mark.parametrize("per", ["", "Per_", "MyExpt_Per_"])
def test_database_gives_medians_of_wells(tmp_path, tables, per):
    check_profiles([write_database(tmp_path / "plate.sqlite", tables, per)], tables)


def test_objects_in_csv_get_the_wells_of_their_images(tmp_path, tables):
    for kind, table in tables.items():
        table.to_csv(tmp_path / f"MyExpt_{kind}.csv", index=False)
    paths = [tmp_path / f"MyExpt_{kind}.csv" for kind in KINDS]
    check_profiles(paths, tables)
    with pytest.raises(InputError, match=r"as in a table of single cells. Use --aggregate median"):
        read_profiles(paths)
    (tmp_path / "MyExpt_Image.csv").unlink()
    with pytest.raises(InputError, match=r"MyExpt_Cells.csv: no column .*MyExpt_Image.csv, which"):
        read_profiles(paths, "median")


def test_runs_are_identified_by_their_table_number(tmp_path, tables):
    runs = []
    for run in (1, 2):
        part = {kind: table.assign(TableNumber=run) for kind, table in tables.items()}
        part["Image"] = part["Image"].assign(Metadata_Plate=f"P{run}")
        runs.append(part)
    joined = {kind: pd.concat([run[kind] for run in runs]) for kind in tables}
    profiles = read_profiles([write_database(tmp_path / "a.db", joined)], "median")
    assert len(profiles) == 12 and set(profiles.column("Metadata_Plate")) == {"P1", "P2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"Cells": t["Cells"]}, "is not a database of CellProfiler with one table"),
        (lambda t: t | {"Image": t["Image"].drop(columns="Metadata_Well")}, "no column Metadata_W"),
        (lambda t: t | {"Image": t["Image"].iloc[1:]}, r"ImageNumber 1 is not in the table of im"),
        (lambda t: t | {"Image": pd.concat([t["Image"]] * 2)}, "ImageNumber 1 occurs twice"),
    ],
)
def test_unusable_database_is_named(tmp_path, tables, change, message):
    path = write_database(tmp_path / "plate.sqlite", change(tables))
    with pytest.raises(InputError, match=rf"plate\.sqlite.*{message}"):
        read_profiles([path], "median")


def test_damaged_database_is_named(tmp_path, tables):
    path = write_database(tmp_path / "plate.sqlite", tables)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"plate\.sqlite: cannot be read as a SQLite database"):
        read_profiles([path], "median")
    path.write_text("no database")
    with pytest.raises(InputError, match=r"plate\.sqlite: cannot be read as a SQLite database"):
        read_profiles([path], "median")

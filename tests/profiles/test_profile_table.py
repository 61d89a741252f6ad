"""Reading tables of features, ours and CellProfiler's."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny_profiles import make_table, write

from perturbjax.core.errors import InputError
from perturbjax.profiles.profile_table import aggregate_to_wells, read_profiles


def test_parquet_and_compressed_csv_read_the_same(tmp_path: Path) -> None:
    table = make_table(plates=2)
    a = read_profiles([write(table, tmp_path / "a.parquet")])
    b = read_profiles([write(table, tmp_path / "b.csv.gz")])
    pd.testing.assert_frame_equal(a.metadata, b.metadata)
    np.testing.assert_allclose(a.values, b.values, rtol=1e-6)
    assert a.names == b.names == tuple(f"Cells_f{i}" for i in range(12))


def test_metadata_is_text_and_never_a_feature(tmp_path: Path) -> None:
    table = make_table(plates=1).assign(Metadata_pubchem_cid=[679.0, np.nan] * 12, Metadata_count=7)
    profiles = read_profiles([write(table, tmp_path / "a.csv")])
    assert list(profiles.metadata["Metadata_pubchem_cid"][:2]) == ["679", ""]
    assert not any(name.startswith("Metadata_") for name in profiles.names)


def test_rows_without_an_id_are_called_by_plate_well_and_site(tmp_path: Path) -> None:
    table = make_table(plates=1)
    assert read_profiles([write(table, tmp_path / "a.csv")]).metadata["site_id"][0] == "P0_A01"
    table.insert(2, "Metadata_Site", 3)
    assert read_profiles([write(table, tmp_path / "a.csv")]).metadata["site_id"][0] == "P0_A01_3"
    table["Metadata_site_id"] = [f"site {i}" for i in range(24)]
    assert read_profiles([write(table, tmp_path / "a.csv")]).metadata["site_id"][0] == "site 0"


def test_files_are_joined_on_the_features_they_share_and_this_is_said(tmp_path: Path) -> None:
    table = make_table(plates=2)
    one = write(
        table[table["Metadata_Plate"] == "P0"].drop(columns="Cells_f3"), tmp_path / "a.parquet"
    )
    two = write(
        table[table["Metadata_Plate"] == "P1"].drop(columns="Cells_f5"), tmp_path / "b.parquet"
    )
    profiles = read_profiles([one, two])
    assert len(profiles) == 48
    assert set(profiles.names) == {f"Cells_f{i}" for i in range(12)} - {"Cells_f3", "Cells_f5"}
    assert profiles.notes == ("2 columns (Cells_f3, Cells_f5) are not in every file, left out",)


def test_files_of_other_features_are_joined_by_site_plate_by_plate(tmp_path: Path) -> None:
    """Two networks, a file a plate each, rows in another order, and one site that a network did not see."""
    table = make_table(plates=2)
    other = table.rename(columns=lambda name: name.replace("Cells_", "resnet_")).sample(
        frac=1, random_state=0
    )
    other = other[~((other["Metadata_Plate"] == "P0") & (other["Metadata_Well"] == "A01"))]
    paths = [
        write(
            rows[rows["Metadata_Plate"] == plate].assign(Metadata_from=kind),
            tmp_path / f"{kind}_{plate}.parquet",
        )
        for kind, rows in (("a", table), ("b", other))
        for plate in ("P0", "P1")
    ]
    profiles = read_profiles(paths)
    assert len(profiles) == 47
    assert profiles.names == tuple(
        f"{kind}_f{i}" for kind in ("Cells", "resnet") for i in range(12)
    )
    np.testing.assert_array_equal(profiles.values[:, :12], profiles.values[:, 12:])
    assert set(profiles.metadata["Metadata_from"]) == {"a"}, "metadata are the first file's"
    said = f"1 rows of {paths[0]} or {paths[2]} have no row of the same site in the other, left out"
    assert profiles.notes == (said,)


def test_files_that_share_nothing_or_say_different_of_a_site_are_refused(tmp_path: Path) -> None:
    table = make_table(plates=1).assign(site_id=[f"s{i}" for i in range(24)])
    other = table.rename(columns=lambda name: name.replace("Cells_", "resnet_"))
    a = write(table, tmp_path / "a.parquet")
    b = write(other.assign(site_id=[f"t{i}" for i in range(24)]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="share neither a feature column nor a site"):
        read_profiles([a, b])
    c = write(
        other.assign(Metadata_Well=other["Metadata_Well"][::-1].to_numpy()), tmp_path / "c.parquet"
    )
    with pytest.raises(
        InputError, match=r"c\.parquet: site 's0' has another Metadata_Well than in"
    ):
        read_profiles([a, c])


def test_columns_of_text_are_left_out_and_named(tmp_path: Path) -> None:
    path = write(make_table(plates=1).assign(Cells_note="ok"), tmp_path / "a.parquet")
    profiles = read_profiles([path])
    assert "Cells_note" not in profiles.names
    assert profiles.notes == (f"{path}: 1 column (Cells_note) is not numbers, left out",)


def test_infinite_values_are_missing_values(tmp_path: Path) -> None:
    table = make_table(plates=1)
    table.loc[0, "Cells_f0"], table.loc[1, "Cells_f1"] = np.inf, -np.inf
    profiles = read_profiles([write(table, tmp_path / "a.parquet")])
    assert np.isnan(profiles.values).sum() == 2
    assert profiles.notes == ("2 infinite values are taken as missing",)


def test_wells_are_the_median_of_their_sites(tmp_path: Path) -> None:
    table = make_table(plates=1, wells=6)
    sites = pd.concat([table.assign(Metadata_Site=s) for s in range(3)])
    features = [c for c in table if c.startswith("Cells")]
    sites.loc[sites["Metadata_Site"] == 2, features] = 1e6
    wells = aggregate_to_wells(read_profiles([write(sites, tmp_path / "a.parquet")]))
    np.testing.assert_allclose(wells.values, table[features], rtol=1e-6)
    assert "Metadata_Site" not in wells.metadata
    assert list(wells.metadata["Metadata_pert_iname"]) == list(table["Metadata_pert_iname"])
    assert wells.metadata["site_id"][0] == "P0_A01"


def test_what_is_written_puts_metadata_first(tmp_path: Path) -> None:
    profiles = read_profiles([write(make_table(plates=1), tmp_path / "a.parquet")])
    again = read_profiles([write(profiles.frame(), tmp_path / "b.parquet")])
    np.testing.assert_array_equal(again.values, profiles.values)
    first = [c.startswith("Metadata_") for c in profiles.frame().columns]
    assert first == sorted(first, reverse=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop(columns="Metadata_Well"), "no column Metadata_Well"),
        (lambda t: t[0:0], "has no rows"),
        (lambda t: t[[c for c in t if c.startswith("Metadata_")]], "no numeric feature"),
        (lambda t: pd.concat([t, t]), "'P0_A01' occurs more than once"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_in_one_line(
    tmp_path: Path, change, says: str
) -> None:
    path = write(change(make_table(plates=1)), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=says) as caught:
        read_profiles([path])
    assert "a.parquet" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read"):
        read_profiles([tmp_path / "a.parquet"])
    with pytest.raises(InputError, match="no such features file"):
        read_profiles([tmp_path / "none.csv"])


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_packed_table_that_would_fill_the_memory_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.csv{suffix}"
    with {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].open(path, "wb") as file:
        file.write(b"Metadata_Plate,Metadata_Well,f\n" + b"P0,A01,0\n" * 2_000_000)
    with pytest.raises(InputError, match=r"a\.csv.*: unfolds to more than 64 times its size"):
        read_profiles([path])


@pytest.mark.shared
def test_cellprofiler_profiles_read_whole(shared: Path) -> None:
    paths = sorted((shared / "data" / "cpjump1_profiles").glob("*.csv.gz"))
    if not paths:
        pytest.skip("no cpjump1_profiles in the shared folder")
    profiles = read_profiles(paths[:1])
    assert profiles.values.shape == (384, 904)
    assert profiles.column("Metadata_pert_iname").nunique() == 303
    assert profiles.notes == ()

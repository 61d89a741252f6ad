"""Reading tables of profiles: formats, joins, rows and messages."""

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
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.profile_table import aggregate_to_wells


def test_parquet_and_compressed_csv_give_the_same_profiles(tmp_path: Path) -> None:
    table = make_table(plates=2)
    a = read_profiles([write(table, tmp_path / "a.parquet")])
    b = read_profiles([write(table, tmp_path / "b.csv.gz")])
    pd.testing.assert_frame_equal(a.metadata, b.metadata)
    np.testing.assert_allclose(a.values, b.values, rtol=1e-6)
    assert a.names == b.names == tuple(f"Cells_f{i}" for i in range(12))


def test_metadata_are_text_and_never_features(tmp_path: Path) -> None:
    table = make_table(plates=1).assign(Metadata_pubchem_cid=[679.0, np.nan] * 12, Metadata_count=7)
    profiles = read_profiles([write(table, tmp_path / "a.csv")])
    assert list(profiles.metadata["Metadata_pubchem_cid"][:2]) == ["679", ""]
    assert not any(name.startswith("Metadata_") for name in profiles.names)


def test_site_id_is_plate_well_site_by_default(tmp_path: Path) -> None:
    table = make_table(plates=1)
    assert read_profiles([write(table, tmp_path / "a.csv")]).metadata["site_id"][0] == "P0_A01"
    table.insert(2, "Metadata_Site", 3)
    assert read_profiles([write(table, tmp_path / "a.csv")]).metadata["site_id"][0] == "P0_A01_3"
    table["Metadata_site_id"] = [f"site {i}" for i in range(24)]
    assert read_profiles([write(table, tmp_path / "a.csv")]).metadata["site_id"][0] == "site 0"


def test_files_are_concatenated_on_shared_features(tmp_path: Path) -> None:
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
    assert profiles.notes == ("left out 2 columns: Cells_f3, Cells_f5 (not in every file)",)


def test_files_without_shared_features_are_joined_by_site(tmp_path: Path) -> None:
    """Two networks, one file per plate, rows in another order, one site missing."""
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
    assert set(profiles.metadata["Metadata_from"]) == {"a"}, "metadata come from the first file"
    note = f"left out 1 rows whose site is only in {paths[0]} or only in {paths[2]}"
    assert profiles.notes == (note,)


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    table = make_table(plates=1).assign(site_id=[f"s{i}" for i in range(24)])
    other = table.rename(columns=lambda name: name.replace("Cells_", "resnet_"))
    a = write(table, tmp_path / "a.parquet")
    b = write(other.assign(site_id=[f"t{i}" for i in range(24)]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="share neither a feature nor a site"):
        read_profiles([a, b])
    c = write(
        other.assign(Metadata_Well=other["Metadata_Well"][::-1].to_numpy()), tmp_path / "c.parquet"
    )
    with pytest.raises(
        InputError, match=r"c\.parquet: site 's0' has another Metadata_Well than in"
    ):
        read_profiles([a, c])


def test_text_columns_are_left_out(tmp_path: Path) -> None:
    path = write(make_table(plates=1).assign(Cells_note="ok"), tmp_path / "a.parquet")
    profiles = read_profiles([path])
    assert "Cells_note" not in profiles.names
    reason = "not numeric: 24 cells such as 'ok' in row 1"
    assert profiles.notes == (f"{path}: left out 1 column: Cells_note ({reason})",)


def test_infinite_values_are_missing(tmp_path: Path) -> None:
    table = make_table(plates=1)
    table.loc[0, "Cells_f0"], table.loc[1, "Cells_f1"] = np.inf, -np.inf
    profiles = read_profiles([write(table, tmp_path / "a.parquet")])
    assert np.isnan(profiles.values).sum() == 2
    assert profiles.notes == ("2 infinite values are read as missing",)


def test_aggregate_to_wells_takes_median_of_sites(tmp_path: Path) -> None:
    table = make_table(plates=1, wells=6)
    sites = pd.concat([table.assign(Metadata_Site=s) for s in range(3)])
    features = [c for c in table if c.startswith("Cells")]
    sites.loc[sites["Metadata_Site"] == 2, features] = 1e6
    wells = aggregate_to_wells(read_profiles([write(sites, tmp_path / "a.parquet")]))
    np.testing.assert_allclose(wells.values, table[features], rtol=1e-6)
    assert "Metadata_Site" not in wells.metadata
    assert list(wells.metadata["Metadata_pert_iname"]) == list(table["Metadata_pert_iname"])
    assert wells.metadata["site_id"][0] == "P0_A01"


def test_frame_puts_metadata_first_and_can_be_read_again(tmp_path: Path) -> None:
    profiles = read_profiles([write(make_table(plates=1), tmp_path / "a.parquet")])
    copy = read_profiles([write(profiles.frame(), tmp_path / "b.parquet")])
    np.testing.assert_array_equal(copy.values, profiles.values)
    first = [c.startswith("Metadata_") for c in profiles.frame().columns]
    assert first == sorted(first, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="Metadata_Well"), "no column Metadata_Well"),
        (lambda t: t[0:0], "has no rows"),
        (lambda t: t[[c for c in t if c.startswith("Metadata_")]], "no feature columns"),
        (lambda t: pd.concat([t, t]), "P0_A01.*single cells.*--aggregate median"),
    ],
)
def test_unusable_tables_are_refused_in_one_line(tmp_path: Path, change, message: str) -> None:
    path = write(change(make_table(plates=1)), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message) as caught:
        read_profiles([path])
    assert "a.parquet" in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read"):
        read_profiles([tmp_path / "a.parquet"])
    with pytest.raises(InputError, match="file not found"):
        read_profiles([tmp_path / "none.csv"])


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_compression_bomb_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.csv{suffix}"
    with {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].open(path, "wb") as file:
        file.write(b"Metadata_Plate,Metadata_Well,f\n" + b"P0,A01,0\n" * 2_000_000)
    with pytest.raises(InputError, match=r"a\.csv.*: unpacked, it is more than 64 times larger"):
        read_profiles([path])


@pytest.mark.shared
def test_real_cellprofiler_profiles_keep_all_features(shared: Path) -> None:
    paths = sorted((shared / "data" / "cpjump1_profiles").glob("*.csv.gz"))
    if not paths:
        pytest.skip("no cpjump1_profiles in the shared folder")
    profiles = read_profiles(paths[:1])
    assert profiles.values.shape == (384, 904)
    assert profiles.column("Metadata_pert_iname").nunique() == 303
    assert profiles.notes == ()

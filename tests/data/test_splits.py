"""Train/test splits: no group is divided, and the same parameters give the same fold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.core.plates import plate_layouts
from perturbjax.data import splits

POLICIES = ("site", "well", "plate", "layout", "compound")


def plate_index(
    *, plates: int = 6, wells: int = 12, sites: int = 2, compounds: int = 6, layouts: int = 0
) -> pd.DataFrame:
    """An index of `plates` plates; plate p has layout p % layouts (0: each its own)."""
    rows = []
    for plate in range(plates):
        random = np.random.default_rng(plate % layouts if layouts else plate)
        order = random.permutation(np.arange(wells) % compounds)
        for well in range(wells):
            for site in range(sites):
                name = f"{'ABCDEFGH'[well // 12]}{well % 12 + 1:02d}"
                rows.append(
                    (
                        f"P{plate}_{name}_{site}",
                        f"P{plate}",
                        name,
                        f"cpd{order[well]}",
                        f"moa{order[well] % 3}",
                    )
                )
    columns = ["site_id", "Metadata_Plate", "Metadata_Well", "Metadata_pert_iname", "Metadata_moa"]
    return pd.DataFrame(rows, columns=columns)


@settings(max_examples=25)
@given(
    policy=st.sampled_from(POLICIES),
    plates=st.integers(4, 7),
    wells=st.integers(6, 24),
    folds=st.integers(2, 4),
    seed=st.integers(0, 5),
)
def test_make_split_never_divides_groups_and_folds_partition_sites(
    policy, plates, wells, folds, seed
):
    index = plate_index(plates=plates, wells=wells)
    test_sites = []
    for fold in range(folds):
        try:
            manifest = splits.make_split(
                index, policy, label="Metadata_moa", folds=folds, fold=fold, seed=seed
            )
        except InputError as error:
            assert "fewer folds" in str(error) or "nothing can be learned" in str(error)
            return
        assert list(manifest["site_id"]) == list(index["site_id"])
        assert (manifest.groupby("group")["part"].nunique() == 1).all()
        test_sites += list(manifest.loc[manifest["part"] == "test", "site_id"])
    assert sorted(test_sites) == sorted(index["site_id"])


def test_plate_split_equals_scikit_learn_stratified_group_k_fold():
    from sklearn.model_selection import StratifiedGroupKFold

    index = plate_index()
    folder = StratifiedGroupKFold(5, shuffle=True, random_state=3)
    _, test_sites = list(
        folder.split(np.zeros(len(index)), index["Metadata_moa"], index["Metadata_Plate"])
    )[2]
    manifest = splits.make_split(index, "plate", label="Metadata_moa", folds=5, fold=2, seed=3)
    assert list(np.flatnonzero(manifest["part"] == "test")) == list(test_sites)


def test_plates_with_same_plate_map_share_a_layout():
    layouts = plate_layouts(plate_index(plates=6, wells=24, compounds=12, layouts=2))
    assert layouts == {"P0": "P0", "P1": "P1", "P2": "P0", "P3": "P1", "P4": "P0", "P5": "P1"}


def test_plate_layouts_tolerates_missing_wells():
    index = plate_index(plates=2, wells=24, compounds=12, layouts=1)
    index = index.drop(index[(index["Metadata_Plate"] == "P1")].index[:6])
    assert set(plate_layouts(index).values()) == {"P0"}


def test_fingerprint_ignores_row_order():
    index = plate_index()
    manifest = splits.make_split(index, "well", label="Metadata_moa", seed=0)
    other = splits.make_split(index, "well", label="Metadata_moa", seed=1)
    assert splits.fingerprint(manifest) == splits.fingerprint(
        manifest.sample(frac=1, random_state=0)
    )
    assert splits.fingerprint(manifest) != splits.fingerprint(other)


def test_manifest_round_trip(tmp_path):
    index = plate_index()
    manifest = splits.make_split(index, "plate", label="Metadata_moa", fold=1)
    splits.write_split(manifest, tmp_path / "split.parquet")
    config = SplitConfig(split_file=str(tmp_path / "split.parquet"))
    read = splits.create_manifest(index, config, label="Metadata_moa", seed=9)
    pd.testing.assert_frame_equal(read, manifest)
    assert read.attrs["policy"] == "plate"


def test_csv_manifest_without_groups_gets_wells_or_sites(tmp_path):
    index, path = plate_index(), tmp_path / "split.csv"
    for policy, groups in (("plate", "well"), ("site", "site")):
        manifest = splits.make_split(index, policy, label="Metadata_moa")
        splits.write_split(manifest.drop(columns="group"), path)
        read = splits.read_split(path, index)
        expected = splits.assign_groups(index, groups)
        pd.testing.assert_frame_equal(read[["site_id", "part"]], manifest[["site_id", "part"]])
        assert read["group"].tolist() == expected.tolist()
    manifest = splits.make_split(index, "plate", label="Metadata_moa")
    splits.write_split(manifest, path)
    pd.testing.assert_frame_equal(splits.read_split(path, index), manifest)


def test_read_split_omits_sites_absent_from_the_manifest(tmp_path):
    index = plate_index()
    manifest = splits.make_split(index, "plate", label="Metadata_moa").iloc[5:]
    splits.write_split(manifest, tmp_path / "split.parquet")
    assert len(splits.read_split(tmp_path / "split.parquet", index)) == len(index) - 5


def damaged(manifest: pd.DataFrame, how: str) -> pd.DataFrame:
    manifest = manifest.copy()
    match how:
        case "overlap":
            manifest.loc[manifest.index[0], "part"] = (
                "train" if manifest["part"].iloc[0] == "test" else "test"
            )
        case "unknown part":
            manifest.loc[3, "part"] = "holdout"
        case "twice":
            manifest.loc[1, "site_id"] = manifest.loc[0, "site_id"]
        case "stranger":
            manifest.loc[1, "site_id"] = "elsewhere_A01_1"
        case "no part":
            manifest = manifest.drop(columns="part")
        case "empty group":
            manifest.loc[3, "group"] = ""
        case "null group":
            manifest.loc[3, "group"] = None
        case "one side":
            manifest["part"] = "train"
    return manifest


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("overlap", "is in both"),
        ("unknown part", "holdout"),
        ("twice", "twice"),
        ("stranger", "elsewhere_A01_1"),
        ("no part", "no column 'part'"),
        ("empty group", "has no group"),
        ("null group", "has no group"),
        ("one side", "no site is in test"),
    ],
)
def test_read_split_rejects_damaged_manifest(tmp_path, how, words):
    index = plate_index()
    path = tmp_path / "split.parquet"
    splits.write_split(damaged(splits.make_split(index, "plate", label="Metadata_moa"), how), path)
    with pytest.raises(InputError, match=words) as caught:
        splits.read_split(path, index)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "label", "folds", "words"),
    [
        ("plate", "Metadata_moa", 7, "only 6 groups"),
        ("plate", "Metadata_moa", 1, "at least 2 folds"),
        ("compound", "Metadata_pert_iname", 2, "nothing can be learned"),
        ("nonsense", "Metadata_moa", 2, "unknown"),
        ("site", "site_id", 2, "no class of column site_id has more than 1 sites. Use fewer folds"),
        ("well", "Metadata_moa", 200, "Use --folds 72, or add wells"),
    ],
)
def test_make_split_rejects_impossible_split(policy, label, folds, words):
    with pytest.raises(InputError, match=words):
        splits.make_split(plate_index(), policy, label=label, folds=folds)


@pytest.mark.parametrize("policy", ["plate", "layout"])
def test_split_of_one_plate_names_another_split(policy):
    index = plate_index()
    index = index[index["Metadata_Plate"] == index["Metadata_Plate"].iloc[0]]
    words = rf"only one {policy}, so no number of folds .* Use --split well"
    with pytest.raises(InputError, match=words):
        splits.make_split(index, policy, label="Metadata_moa", folds=2)


def test_site_split_rejects_class_with_one_site():
    index = plate_index()
    index.loc[0, "Metadata_moa"] = "single"
    with pytest.raises(InputError, match=r"'single'.*one site"):
        splits.make_split(index, "site", label="Metadata_moa")


@pytest.mark.shared
def test_real_plates_give_the_reported_fold(shared):
    index = pd.read_csv(shared / "data/bbbc021_cells/load_data.csv", dtype=str)
    index["site_id"] = index["Metadata_Plate"] + index["Metadata_Well"] + index["Metadata_Site"]
    manifest = splits.make_split(index, "plate", label="Metadata_moa", folds=5, fold=0, seed=0)
    test_sites = index[(manifest["part"] == "test").to_numpy()]
    assert len(test_sites) == 425
    assert test_sites["Metadata_moa"].value_counts(normalize=True).max() == pytest.approx(
        0.376, abs=0.001
    )

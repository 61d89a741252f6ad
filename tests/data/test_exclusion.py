"""Exclusion rules remove sites from train and test; the number of excluded sites is reported."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.data import splits
from perturbjax.data.exclusion import apply_exclusions, match_rule, read_rules
from perturbjax.data.splits import ManifestConfig, split_dataset


@pytest.fixture
def index() -> pd.DataFrame:
    wells = [f"{row}{column:02d}" for row in "ABCD" for column in range(1, 6)]
    return pd.DataFrame(
        {
            "site_id": [f"s{k}" for k in range(20)],
            "Metadata_Plate": "P",
            "Metadata_Well": wells,
            "Metadata_moa": ["DMSO", "taxol"] * 10,
            "focus_DNA": [-9.0, -8.0, np.nan, *np.linspace(-4, -3, 17)],
        }
    )


@pytest.mark.parametrize(
    ("rule", "sites"),
    [
        ("focus_DNA<-6", ["s0", "s1"]),
        (" focus_DNA <= -8 ", ["s0", "s1"]),
        ("focus_DNA>=-3", ["s19"]),
        ("focus_DNA==-9", ["s0"]),
        ("Metadata_Well==A03", ["s2"]),
        ("Metadata_Plate!=P", []),
    ],
)
def test_match_rule_finds_sites(index, rule, sites):
    assert list(index["site_id"][match_rule(index, rule)]) == sites


def test_apply_exclusions_counts_excluded_sites(index):
    included, sentences = apply_exclusions(
        index, ("focus_DNA<-6", "Metadata_Well==A03"), "Metadata_moa"
    )
    assert included.sum() == 17
    assert (
        sentences[0]
        == "excluded by focus_DNA<-6: 2 of 20 sites (1 sites without focus_DNA are included)"
    )
    assert sentences[2] == "excluded in total: 3 sites (DMSO 2, taxol 1)"
    assert (
        "no sites remain of taxol"
        in apply_exclusions(index, ("Metadata_moa==taxol",), "Metadata_moa")[1][1]
    )
    assert apply_exclusions(index, (), "Metadata_moa")[1] == []


def test_read_rules_reads_files(tmp_path):
    (tmp_path / "rules.txt").write_text(
        "# blurred\nfocus_DNA<-6  # by inspection\n\nMetadata_Well==A03\n"
    )
    rules = read_rules((str(tmp_path / "rules.txt"), "debris>9"))
    assert rules == ("focus_DNA<-6", "Metadata_Well==A03", "debris>9")


@pytest.mark.parametrize("by_file", [False, True])
def test_manifest_has_no_excluded_sites(index, tmp_path, by_file):
    config = SplitConfig(exclude=("focus_DNA<-6",))
    if by_file:
        splits.write_split(
            splits.make_split(index, "well", label="Metadata_moa"), tmp_path / "split.parquet"
        )
        config = SplitConfig(split_file=str(tmp_path / "split.parquet"), exclude=("focus_DNA<-6",))
    manifest = splits.create_manifest(index, config, label="Metadata_moa", seed=0)
    assert set(manifest["site_id"]) == {f"s{k}" for k in range(2, 20)}
    assert manifest.attrs["notes"][0].startswith("excluded by focus_DNA<-6: 2 of 20 sites")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("focus_DNA", "--exclude focus_DNA: neither a rule nor a file of rules"),
        ("nowhere.txt", "--exclude nowhere.txt: neither a rule nor a file .*no file of"),
        ("focus_RNA<-6", "no column 'focus_RNA' \\(available: site_id"),
        ("Metadata_Well<3", "Metadata_Well contains text"),
        ("focus_DNA<low", "'low' is not a number"),
        ("Metadata_Plate==P", "excludes all sites"),
    ],
)
def test_unusable_rule_raises_input_error(index, rule, message):
    with pytest.raises(InputError, match=message):
        splits.create_manifest(index, SplitConfig(exclude=(rule,)), label="Metadata_moa", seed=0)


def test_read_rules_rejects_invalid_line(tmp_path):
    (tmp_path / "rules.txt").write_text("focus_DNA low\n")
    with pytest.raises(InputError, match="'focus_DNA low' is not a rule"):
        read_rules((str(tmp_path / "rules.txt"),))


def test_split_dataset_excludes_sites(tmp_path, capsys):
    from tiny_dataset import write_dataset

    path = write_dataset(tmp_path / "data", sites=48, size=8, channels=["DNA"])
    options = ManifestConfig((path,), tmp_path / "split.parquet", exclude=("Metadata_Well==A01",))
    split_dataset(options)
    assert "excluded by Metadata_Well==A01" in capsys.readouterr().err
    import perturbjax

    index = perturbjax.open_dataset(path).index
    out = set(index.loc[index["Metadata_Well"] == "A01", "site_id"])
    assert out and not out & set(pd.read_parquet(tmp_path / "split.parquet")["site_id"])

"""`build --append` adds plates to a dataset without changing existing records."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_prep_builds import contents, options, swap_pixels

from data_prep import existing_dataset as existing
from data_prep.build import BuildConfig, build
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset
from perturbjax.dataset.checksums import verify_dataset


def write_table(
    plate: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table
) -> Path:
    """Write the load_data.csv of one of the two plates."""
    table = pd.read_csv(plate / "load_data.csv", dtype=str, keep_default_na=False)
    change(table[table["Metadata_Plate"] == name]).to_csv(plate / f"{name}.csv", index=False)
    return plate / f"{name}.csv"


def plate_options(
    plate: Path, name: str, out: Path, *, change=lambda table: table, **changes
) -> BuildConfig:
    from dataclasses import replace

    return replace(options(plate, out, **changes), load_data=write_table(plate, name, change))


@pytest.fixture
def first(plate: Path, tmp_path: Path) -> Path:
    """Dataset of the first plate."""
    build(plate_options(plate, "SIM001", tmp_path / "dataset"))
    return tmp_path / "dataset"


def test_append_keeps_existing_shards(plate, first, tmp_path):
    before = {path.read_bytes(): path.stat().st_ino for path in first.glob("*array_record*")}
    original = open_dataset(first)
    labels, images = list(original.index["label"]), original.read(np.arange(12))[0]
    build(plate_options(plate, "SIM002", first, append=True))
    opened = open_dataset(first)
    assert len(opened) == 24 and set(opened.column("Metadata_Plate")) == {"SIM001", "SIM002"}
    after = {path.read_bytes(): path.stat().st_ino for path in first.glob("*array_record*")}
    assert before.items() <= after.items() and len(after) == 2
    assert list(opened.index["label"][:12]) == labels
    np.testing.assert_array_equal(opened.read(np.arange(12))[0], images)
    assert "24 sites" in verify_dataset(first)
    build(options(plate, tmp_path / "whole"))
    whole = open_dataset(tmp_path / "whole")
    np.testing.assert_array_equal(opened.read(np.arange(24))[0], whole.read(np.arange(24))[0])
    pd.testing.assert_frame_equal(
        opened.index.drop(columns="label"), whole.index.drop(columns="label")
    )
    (added,) = opened.provenance["appended"]
    assert added["n_sites"] == 12 and added["source"]["name"] == "SIM002.csv"
    assert sorted(path.name for path in first.parent.iterdir() if path.name.startswith(".")) == []


def test_append_is_idempotent(plate, first, capsys):
    build(plate_options(plate, "SIM002", first, append=True))
    before = contents(first)
    build(plate_options(plate, "SIM002", first, append=True))
    build(plate_options(plate, "SIM001", first))
    assert capsys.readouterr().err.count("is already built") == 2
    assert contents(first) == before


def test_append_numbers_new_classes_after_existing_ones(plate, first):
    def renamed(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(Metadata_pert_iname=table["Metadata_pert_iname"].replace("DMSO", "AAA"))

    build(plate_options(plate, "SIM002", first, append=True, change=renamed))
    opened = open_dataset(first)
    assert "AAA" in set(opened.column("Metadata_pert_iname"))
    assert opened.index.groupby("Metadata_pert_iname")["label"].nunique().eq(1).all()
    assert opened.index.set_index("Metadata_pert_iname")["label"]["AAA"].iloc[0] == 3
    assert "24 sites" in verify_dataset(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize": 32}, "was built with resize 0, not 32; use the same --resize"),
        ({"channels": "DNA"}, "was built with channels .*, not .*; use the same --channels"),
        ({"label_column": "Metadata_moa"}, "use the same --label-column"),
        ({"segmenter": "watershed", "diameter": 9.0}, "use the same --segmenter, --weights"),
        ({"illumination": "estimate"}, "was built with illumination none, not estimate 1"),
    ],
)
def test_append_refuses_other_settings(plate, first, changes, message):
    before = contents(first)
    with pytest.raises(InputError, match=message):
        build(plate_options(plate, "SIM002", first, append=True, **changes))
    assert contents(first) == before


def test_append_refuses_incompatible_plates(plate, first, tmp_path):
    with pytest.raises(InputError, match="already contains plate SIM001"):
        build(
            plate_options(plate, "SIM001", first, append=True, change=lambda table: table.iloc[:4])
        )
    with pytest.raises(InputError, match="has no column Metadata_moa"):
        build(
            plate_options(
                plate,
                "SIM002",
                first,
                append=True,
                change=lambda table: table.drop(columns="Metadata_moa"),
            )
        )
    with pytest.raises(InputError, match="there is no dataset at"):
        build(plate_options(plate, "SIM002", tmp_path / "nowhere", append=True))
    with pytest.raises(InputError, match="used without --overwrite"):
        plate_options(plate, "SIM002", first, append=True, overwrite=True)


def test_append_detects_changed_images(plate, first):
    build(plate_options(plate, "SIM002", first, append=True))
    swap_pixels(plate, "SIM001_A01_s01")
    with pytest.raises(InputError, match="other images"):
        build(plate_options(plate, "SIM001", first, append=True))


def test_append_omits_additional_columns(plate, first, capsys):
    build(
        plate_options(
            plate,
            "SIM002",
            first,
            append=True,
            change=lambda table: table.assign(Metadata_more="x"),
        )
    )
    assert "Metadata_more: not in" in capsys.readouterr().err
    assert "Metadata_more" not in open_dataset(first).index.columns


def test_append_restores_the_dataset_after_a_kill_between_renames(plate, first, monkeypatch):
    real = os.rename

    def killed(source, target):
        if Path(target) == first:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(existing.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        build(plate_options(plate, "SIM002", first, append=True))
    assert not first.exists()
    monkeypatch.undo()
    build(plate_options(plate, "SIM002", first, append=True))
    assert len(open_dataset(first)) == 24


def test_append_copies_shards_without_hard_links(plate, first, monkeypatch):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    build(plate_options(plate, "SIM002", first, append=True))
    assert "24 sites" in verify_dataset(first)

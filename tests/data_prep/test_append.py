"""Plates are added to a dataset, and nothing of what it held changes."""

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


def part(
    plate: Path, name: str, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table
) -> Path:
    """The load_data.csv of one plate of the two."""
    table = pd.read_csv(plate / "load_data.csv", dtype=str, keep_default_na=False)
    change(table[table["Metadata_Plate"] == name]).to_csv(plate / f"{name}.csv", index=False)
    return plate / f"{name}.csv"


def of(plate: Path, name: str, out: Path, *, change=lambda table: table, **changes) -> BuildConfig:
    from dataclasses import replace

    return replace(options(plate, out, **changes), load_data=part(plate, name, change))


@pytest.fixture
def first(plate: Path, tmp_path: Path) -> Path:
    """A dataset of the first plate alone."""
    build(of(plate, "SIM001", tmp_path / "dataset"))
    return tmp_path / "dataset"


def test_a_plate_is_added_and_the_shards_that_were_there_are_the_same_files(plate, first, tmp_path):
    before = {path.read_bytes(): path.stat().st_ino for path in first.glob("*array_record*")}
    known = open_dataset(first)
    labels, images = list(known.index["label"]), known.read(np.arange(12))[0]
    build(of(plate, "SIM002", first, append=True))
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


def test_adding_again_and_building_the_first_part_again_change_nothing(plate, first, capsys):
    build(of(plate, "SIM002", first, append=True))
    before = contents(first)
    build(of(plate, "SIM002", first, append=True))
    build(of(plate, "SIM001", first))
    assert capsys.readouterr().err.count("is already built") == 2
    assert contents(first) == before


def test_new_classes_come_after_those_that_are_there(plate, first):
    def renamed(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(Metadata_pert_iname=table["Metadata_pert_iname"].replace("DMSO", "AAA"))

    build(of(plate, "SIM002", first, append=True, change=renamed))
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
def test_plates_of_other_settings_are_refused(plate, first, changes, message):
    before = contents(first)
    with pytest.raises(InputError, match=message):
        build(of(plate, "SIM002", first, append=True, **changes))
    assert contents(first) == before


def test_what_does_not_fit_is_one_line(plate, first, tmp_path):
    with pytest.raises(InputError, match="already contains plate SIM001"):
        build(of(plate, "SIM001", first, append=True, change=lambda table: table.iloc[:4]))
    with pytest.raises(InputError, match="has no column Metadata_moa"):
        build(
            of(
                plate,
                "SIM002",
                first,
                append=True,
                change=lambda table: table.drop(columns="Metadata_moa"),
            )
        )
    with pytest.raises(InputError, match="there is no dataset at"):
        build(of(plate, "SIM002", tmp_path / "nowhere", append=True))
    with pytest.raises(InputError, match="used without --overwrite"):
        of(plate, "SIM002", first, append=True, overwrite=True)


def test_images_that_changed_after_they_were_added_are_told_of(plate, first):
    build(of(plate, "SIM002", first, append=True))
    swap_pixels(plate, "SIM001_A01_s01")
    with pytest.raises(InputError, match="other images"):
        build(of(plate, "SIM001", first, append=True))


def test_a_column_more_is_left_out_and_said(plate, first, capsys):
    build(
        of(
            plate,
            "SIM002",
            first,
            append=True,
            change=lambda table: table.assign(Metadata_more="x"),
        )
    )
    assert "Metadata_more: not in" in capsys.readouterr().err
    assert "Metadata_more" not in open_dataset(first).index.columns


def test_killed_between_its_two_renames_the_dataset_is_found_again(plate, first, monkeypatch):
    real = os.rename

    def killed(source, target):
        if Path(target) == first:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(existing.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        build(of(plate, "SIM002", first, append=True))
    assert not first.exists()
    monkeypatch.undo()
    build(of(plate, "SIM002", first, append=True))
    assert len(open_dataset(first)) == 24


def test_without_links_shards_are_copied(plate, first, monkeypatch):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    build(of(plate, "SIM002", first, append=True))
    assert "24 sites" in verify_dataset(first)

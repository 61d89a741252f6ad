from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from data_prep_builds import contents, options

from data_prep.build import build
from data_prep.site_table import read_sites
from data_prep.sources.floats import FloatRange, FloatScale, choose_scale, measure_range
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 3.7e-9), (-0.02, 0.9), (-40_000, 30_000), (0, 3e38), (5, 5.5)]
)
def test_scale_is_invertible_and_uses_the_range(low, high):
    image = np.random.default_rng(0).uniform(low, high, (40, 40)).astype(np.float32)
    image[0, :2] = low, high
    scale = choose_scale(measure_range(image))
    stored = scale.stored(image)
    restored = (stored.astype(np.float64) - scale.zero) * scale.step
    assert np.abs(restored - image).max() <= scale.step / 2
    assert np.frexp(scale.step)[0] == 0.5  # a power of two
    assert (scale.zero == 0) == (low >= 0) and stored.max() >= 65_535 // 4
    zeros = scale.stored(np.array([[0, np.nan, np.inf, -np.inf]], np.float32))
    assert (zeros == scale.zero).all()


def test_whole_numbers_are_stored_unchanged():
    image = np.arange(64, dtype=np.float16).reshape(8, 8)
    assert choose_scale(measure_range(image)) == FloatScale(1.0, 0)
    assert choose_scale(FloatRange(0, 70_000, 0, True)).step == 2
    assert choose_scale(FloatRange(-1, 60_000, 0, True)) == FloatScale(1.0, 1)


@pytest.fixture
def floats(plate) -> Path:
    """The plate with float images: SIM002 is brighter and has a NaN and a negative pixel."""
    for path in sorted(plate.glob("images/*/*.tiff")):
        image = tifffile.imread(path).astype(np.float32) / 65_535
        if path.parent.name == "SIM002":
            image *= 5
            image[3, 4], image[3, 5] = np.nan, -0.001
        tifffile.imwrite(path, image, metadata=None)
    return plate


def facts(dataset: Path) -> dict:
    return json.loads((dataset / "provenance.json").read_text())


def test_build_stores_floats_and_their_mapping(floats, tmp_path, capsys):
    build(options(floats, tmp_path / "one"))
    printed = capsys.readouterr().err
    assert "plate SIM002, channel DNA: float values from -0.001 to" in printed
    assert "12 NaN or infinite pixels become 0" in printed
    scales = facts(tmp_path / "one")["float_images"]
    assert scales["SIM001"]["DNA"]["zero"] == 0 < scales["SIM002"]["DNA"]["zero"]
    assert scales["SIM002"]["DNA"]["replaced_pixels"] == 12
    table, dataset = read_sites(floats / "load_data.csv", floats), open_dataset(tmp_path / "one")
    for position in (0, len(dataset) - 1):
        row, record = table.sites.iloc[position], dataset.record(position)
        for number, channel in enumerate(table.channels):
            scale = scales[row["Metadata_Plate"]][channel]
            image = np.nan_to_num(tifffile.imread(row[f"file_{channel}"].file))
            restored = (record["image"][..., number].astype(float) - scale["zero"]) * scale["step"]
            assert np.abs(restored - image).max() <= scale["step"] / 2
    # Neither the number of workers nor an interruption changes the result.
    build(options(floats, tmp_path / "two", workers=2))
    sums = [facts(tmp_path / name)["content_sha256"] for name in ("one", "two")]
    assert sums[0] == sums[1]
    before = contents(tmp_path / "one")
    build(options(floats, tmp_path / "one"))
    assert "already built" in capsys.readouterr().err and contents(tmp_path / "one") == before


def test_changed_scale_is_another_dataset(floats, tmp_path):
    build(options(floats, tmp_path / "one", channels="DNA"))
    for path in floats.glob("images/*/*.tiff"):
        tifffile.imwrite(path, tifffile.imread(path) * 2, metadata=None)
    # The stored pixels are the same: only the mapping differs.
    with pytest.raises(InputError, match="contains a dataset of other settings"):
        build(options(floats, tmp_path / "one", channels="DNA"))


def test_append_measures_each_plate_and_refuses_more_sites(floats, tmp_path):
    table = pd.read_csv(floats / "load_data.csv", dtype=str, keep_default_na=False)
    first, second = (table[table["Metadata_Plate"] == name] for name in ("SIM001", "SIM002"))

    def build_rows(rows: pd.DataFrame, **changes) -> None:
        rows.to_csv(floats / "load_data.csv", index=False)
        build(options(floats, tmp_path / "one", channels="DNA", **changes))

    build_rows(first.iloc[:8])
    with pytest.raises(
        InputError, match="already contains plate SIM001; a plate can only be added"
    ):
        build_rows(first.iloc[8:], append=True)
    build_rows(second, append=True)
    assert list(facts(tmp_path / "one")["appended"][0]["float_images"]) == ["SIM002"]


def test_plate_without_a_finite_value_is_refused(floats, tmp_path):
    for path in floats.glob("images/SIM001/*_DNA.tiff"):
        tifffile.imwrite(path, np.full((64, 64), np.nan, np.float32), metadata=None)
    with pytest.raises(InputError, match="plate SIM001, channel DNA: all float pixels are NaN"):
        build(options(floats, tmp_path / "one"))
    assert not (tmp_path / "one").exists()


def test_outlier_gives_a_warning(floats, tmp_path, capsys):
    path = next(floats.glob("images/SIM001/*_DNA.tiff"))
    image = tifffile.imread(path)
    image[0, 0] = 1e6
    tifffile.imwrite(path, image, metadata=None)
    build(options(floats, tmp_path / "one", channels="DNA"))
    assert "plate SIM001, channel DNA: the largest float value 1e+06 is" in capsys.readouterr().err

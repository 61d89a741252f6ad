"""Illumination correction with functions from files and with estimated functions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from data_prep_builds import contents, options

from data_prep.build import build
from data_prep.illumination import (
    divide,
    edge_to_center_ratio,
    find_functions,
    fit_surface,
    read_function,
)
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset

pytestmark = pytest.mark.full

CHANNELS = ("DNA", "Actin", "Tubulin")


def vignette(size: int) -> np.ndarray:
    """Return an illumination function: 1 at the darkest corner, above 2 in the center."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, size)] * 2, indexing="ij")
    function = np.exp(-0.5 * (x**2 + 0.8 * y**2) + 0.1 * x)
    return (function / np.percentile(function, 2)).astype(np.float32)


@pytest.fixture
def functions(plate: Path, tmp_path: Path) -> Path:
    """Folder of functions; one plate has a subfolder."""
    folder = tmp_path / "illum"
    for name, folder_of_plate in (("SIM001", folder / "SIM001"), ("SIM002", folder)):
        folder_of_plate.mkdir(parents=True, exist_ok=True)
        for channel in CHANNELS:
            np.save(folder_of_plate / f"{name}_Illum{channel}.npy", vignette(64))
    return folder


def test_images_are_divided_by_the_function_of_plate_and_channel(plate, functions, tmp_path):
    build(options(plate, tmp_path / "dataset", illumination=str(functions)))
    opened = open_dataset(tmp_path / "dataset")
    table = pd.read_csv(plate / "load_data.csv", dtype=str)
    raw = tifffile.imread(plate / table["PathName_OrigActin"][20] / table["FileName_OrigActin"][20])
    np.testing.assert_array_equal(
        opened.read([20])[0][0, ..., 1], np.rint(raw / vignette(64)).astype(np.uint16)
    )
    facts = opened.provenance["illumination"]
    assert facts["how"] == "functions" and set(facts["sha256"]) == {"SIM001", "SIM002"}
    assert set(facts["sha256"]["SIM001"]) == set(CHANNELS)


def test_changed_function_makes_another_dataset(plate, functions, tmp_path):
    build(options(plate, tmp_path / "dataset", illumination=str(functions)))
    np.save(functions / "SIM002_IllumDNA.npy", np.ones((64, 64)))
    with pytest.raises(InputError, match="contains a dataset of other settings"):
        build(options(plate, tmp_path / "dataset", illumination=str(functions)))


def test_estimate_removes_simulated_vignetting(plate, tmp_path):
    for path in (plate / "images").rglob("*_DNA.tiff"):
        shaded = 400 + tifffile.imread(path).astype(float) / 4
        tifffile.imwrite(path, np.rint(shaded * vignette(64)).astype(np.uint16), metadata=None)
    build(options(plate, tmp_path / "shaded"))
    build(options(plate, tmp_path / "even", illumination="estimate"))
    before, after = (
        open_dataset(tmp_path / name).read(np.arange(24))[0][..., 0] for name in ("shaded", "even")
    )
    assert np.median([edge_to_center_ratio(image) for image in before]) < 0.65
    assert np.median([edge_to_center_ratio(image) for image in after]) == pytest.approx(1, abs=0.06)
    facts = json.loads((tmp_path / "even" / "provenance.json").read_text())["illumination"]
    assert facts["how"] == "estimate" and set(facts["sha256"]["SIM002"]) == set(CHANNELS)


def test_estimate_is_independent_of_the_number_of_workers(simulated, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for workers in (1, 2):
        build(options(simulated, tmp_path / str(workers), illumination="estimate", workers=workers))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_fit_surface_ignores_bright_objects():
    disturbed = vignette(128).astype(np.float64)
    disturbed[40:52, 60:80] *= 3  # cells at the same position on most sites
    np.testing.assert_allclose(fit_surface(disturbed, (256, 256)), vignette(256), rtol=0.04)


def test_divide_clips_to_the_data_type():
    plane = np.array([[0, 255]], np.uint8)
    np.testing.assert_array_equal(divide(plane, np.array([[0.5, 0.5]], np.float32)), [[0, 255]])


def broken_function(folder: Path, kind: str) -> None:
    path = folder / "SIM002_IllumActin.npy"
    if kind == "missing":
        path.unlink()
    elif kind == "size":
        np.save(path, np.ones((64, 60)))
    elif kind == "zero":
        np.save(path, np.zeros((64, 64)))
    elif kind == "cube":
        np.save(path, np.ones((2, 64, 64)))
    elif kind == "pickle":
        np.save(path, np.array([[{}]], object), allow_pickle=True)
    else:
        path.write_bytes(b"no array")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "SIM002_IllumActin.npy is missing"),
        (
            "size",
            r"row 14: the images have shape \(64, 64\), but the illumination "
            r".*IllumActin.npy has shape \(64, 60\)",
        ),
        ("zero", "SIM002_IllumActin.npy: contains values that are not finite and positive"),
        ("cube", "SIM002_IllumActin.npy: not an illumination function"),
        ("pickle", "SIM002_IllumActin.npy: cannot be read as an illumination function"),
        ("text", "SIM002_IllumActin.npy: cannot be read as an illumination function"),
    ],
)
def test_invalid_function_is_refused_before_segmentation(
    functions, refused, build_arguments, tmp_path, kind, message
):
    import re

    broken_function(functions, kind)
    line = refused(*build_arguments("--illumination", functions))
    assert re.search(message, line), line
    assert not (tmp_path / "dataset").exists() and not list(
        tmp_path.glob(".dataset.building/masks/*")
    )


def test_missing_folder_and_too_few_sites_are_refused(edit, refused, build_arguments, tmp_path):
    assert "--illumination nowhere: no such folder" in refused(
        *build_arguments("--illumination", "nowhere")
    )
    edit(lambda table: table.iloc[:20])
    assert "plate SIM002 has 8 sites (10 required)" in refused(
        *build_arguments("--illumination", "estimate")
    )
    assert not (tmp_path / "dataset").exists()


def test_estimate_refuses_a_plate_without_signal(plate, refused, build_arguments):
    for path in (plate / "images/SIM002").glob("*_Actin.tiff"):
        tifffile.imwrite(path, np.zeros((64, 64), np.uint16), metadata=None)
    line = refused(*build_arguments("--illumination", "estimate"))
    assert "plate SIM002, channel Actin: only 0 sites contain signal" in line


def test_read_function_returns_a_read_only_array(tmp_path):
    np.save(tmp_path / "f.npy", np.ones((4, 4)))
    with pytest.raises(ValueError, match="read-only"):
        read_function(tmp_path / "f.npy")[0, 0] = 2


def test_huge_functions_and_long_names_are_refused_before_reading(tmp_path):
    with open(tmp_path / "P_IllumDNA.npy", "wb") as file:
        file.truncate(60 << 30)
    with pytest.raises(InputError, match="more than an illumination function"):
        find_functions(tmp_path, ["P"], ["DNA"])
    with pytest.raises(InputError, match="is not allowed in a file name"):
        find_functions(tmp_path, ["P" * 300], ["DNA"])

"""Quality columns measure focus, saturation, border cells and debris on the original pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from data_prep_builds import options
from scipy import ndimage

from data_prep import quality
from data_prep.build import build
from perturbjax.dataset import open_dataset


@pytest.fixture(scope="module")
def sharp() -> np.ndarray:
    """Draw a field of small disks."""
    rng = np.random.default_rng(0)
    field = np.zeros((256, 256))
    field[rng.integers(0, 256, 300), rng.integers(0, 256, 300)] = 1
    return 200 + 4000 * ndimage.gaussian_filter(ndimage.grey_dilation(field, 7), 0.7)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 10, image.shape)
    return np.rint(ndimage.gaussian_filter(image, sigma) + noise).astype(np.uint16)


def test_spectrum_slope_decreases_with_blur(sharp):
    images = [blurred(sharp, sigma) for sigma in (0, 1, 2, 4)]
    slopes = [quality.spectrum_slope(image) for image in images]
    assert sorted(slopes, reverse=True) == slopes and slopes[0] - slopes[2] > 1
    laplacians = [quality.laplacian_variance(image) for image in images[:3]]
    assert sorted(laplacians, reverse=True) == laplacians


def test_spectrum_slope_is_independent_of_brightness(sharp):
    image = blurred(sharp, 1)
    assert quality.spectrum_slope(image * 3) == pytest.approx(
        quality.spectrum_slope(image), abs=0.01
    )


def test_focus_of_a_constant_image_is_nan():
    assert np.isnan(quality.spectrum_slope(np.full((64, 64), 7, np.uint16)))
    assert np.isnan(quality.laplacian_variance(np.full((2, 2), 7, np.uint16)))


@pytest.mark.parametrize(
    ("brightest", "fraction"), [(4095, 0.01), (65535, 0.01), (255, 0.01), (4000, 0.0)]
)
def test_saturated_fraction_uses_the_range_of_cameras(brightest, fraction):
    plane = np.zeros((10, 10), np.uint16)
    plane[0, 0] = brightest
    assert quality.saturated_fraction(plane) == fraction


def test_border_fraction_and_debris_are_counted():
    mask = np.zeros((60, 60), np.uint16)
    mask[0:10, 20:30], mask[25:35, 25:35], mask[40:50, 5:15], mask[52:54, 50:53] = 1, 2, 3, 9
    image = np.where(mask > 0, 100, 10)
    image[10:14, 50:54] = 200  # far from every cell
    image[23:26, 25:28] = 200  # a bright spot that a cell touches
    assert quality.border_fraction(mask) == pytest.approx(1 / 4)
    assert quality.count_debris(mask, image) == 2
    assert (
        quality.border_fraction(np.zeros_like(mask))
        == quality.count_debris(np.zeros_like(mask), image)
        == 0
    )


def test_build_writes_quality_columns_of_every_channel(plate, tmp_path):
    table = pd.read_csv(plate / "load_data.csv", dtype=str)
    path = plate / table["PathName_OrigActin"][5] / table["FileName_OrigActin"][5]
    saturated = tifffile.imread(path)
    saturated[:8] = 4095
    tifffile.imwrite(path, np.minimum(saturated, 4095), metadata=None)
    build(
        options(
            plate, tmp_path / "dataset", aggregate="median", channels="Actin,Tubulin", resize=32
        )
    )
    opened = open_dataset(tmp_path / "dataset")
    names = [
        f"{kind}_{name}"
        for name in ("Actin", "Tubulin", "DNA")
        for kind in ("focus", "laplacian", "saturated")
    ]
    assert {*names, "background_DNA", "border_cells", "debris", "segmentation_failed"} <= set(
        opened.index.columns
    )
    assert (
        opened.index["saturated_Actin"][5] >= 8 / 64 and not opened.index["saturated_Tubulin"].any()
    )
    assert opened.provenance["quality"] == quality.VERSION
    expected = quality.spectrum_slope(
        tifffile.imread(plate / table["PathName_OrigDNA"][3] / table["FileName_OrigDNA"][3])
    )
    assert opened.index["focus_DNA"][3] == pytest.approx(expected)


def test_preview_lists_a_well_out_of_focus(plate, tmp_path):
    for path in (plate / "images/SIM001").glob("*_B02_*_DNA.tiff"):
        soft = ndimage.gaussian_filter(tifffile.imread(path).astype(float), 3)
        tifffile.imwrite(path, np.rint(soft).astype(np.uint16), metadata=None)
    table = pd.read_csv(plate / "load_data.csv", dtype=str)
    assert "B02" in set(table["Metadata_Well"])
    build(options(plate, tmp_path / "dataset"))
    page = Path(tmp_path / "dataset" / "preview.html").read_text()
    from perturbjax.report.pages.preview import outliers, well_table

    wells = well_table(open_dataset(tmp_path / "dataset"))
    far = outliers(wells)
    assert ("SIM001", "B02", "DNA focus") in set(
        far[["Metadata_Plate", "Metadata_Well", "measure"]].itertuples(False, None)
    )
    assert "DNA focus" in page

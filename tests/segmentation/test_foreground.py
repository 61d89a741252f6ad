"""Empty and sparse fields: engines must not invent objects in noise."""

import numpy as np
import pytest

import perturbjax
from data_prep import segment
from data_prep.segment import SegmenterConfig
from perturbjax.segmentation.foreground import (
    MIN_RANGE,
    analyze_foreground,
    estimate_noise,
    remove_implausible_objects,
)

#: Name: nuclei, background in counts, brightness of nuclei in counts, vignetting, small bright
#: spots.
FIELDS = {
    "dark noise": (0, 100, 0, 0.0, 0),
    "bright noise": (0, 2000, 0, 0.0, 0),
    "vignetting": (0, 1000, 0, 0.4, 0),
    "debris": (0, 600, 0, 0.2, 12),
    "one nucleus": (1, 500, 3000, 0.2, 0),
    "two nuclei": (2, 500, 3000, 0.0, 0),
    "four dim nuclei": (4, 500, 300, 0.2, 0),
    "thirty nuclei": (30, 500, 3000, 0.2, 0),
}


def draw_field(name: str, size: int = 512, seed: int = 0) -> np.ndarray:
    """Draw round nuclei of radius 14 over uneven illumination, with Poisson and camera noise."""
    count, background, brightness, vignetting, spots = FIELDS[name]
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    distance = ((y - size / 2) ** 2 + (x - size / 2) ** 2) / (size**2 / 2)
    image = background * (1 - vignetting * distance)
    grid = [
        (row, column) for row in range(50, size - 30, 75) for column in range(50, size - 30, 75)
    ]
    for index in rng.permutation(len(grid))[:count]:
        row, column = grid[index] + rng.uniform(-8, 8, 2)
        image += brightness / (1 + np.exp((np.hypot(y - row, x - column) - 14) / 1.5))
    for row, column in rng.uniform(10, size - 10, (spots, 2)):
        image += 4000 * np.exp(-((y - row) ** 2 + (x - column) ** 2) / 4)
    return np.clip(rng.poisson(image) + rng.normal(100, 8, image.shape), 0, 65535).astype(np.uint16)


@pytest.mark.parametrize("engine", ["nuclei", "watershed"])
def test_engines_count_nuclei_in_sparse_fields(engine):
    created = segment.create(SegmenterConfig(engine))
    for name, (count, *_) in FIELDS.items():
        labels = created.segment(draw_field(name)[..., None], 28.0)
        assert abs(int(labels.max()) - count) <= (1 if count else 0), name


@pytest.mark.shared
def test_cellpose_returns_empty_masks_for_noise(shared):
    weights = str(shared / "data/weights/nuclei_dsb2018")
    created = segment.create(SegmenterConfig("cellpose", weights, 28.0))
    for name, count in (("bright noise", 0), ("two nuclei", 2)):
        assert created.segment(draw_field(name, 256)[..., None]).max() == count, name


@pytest.mark.full  # PyTorch and cellpose take ten seconds
@pytest.mark.shared
def test_cellpose_torch_returns_empty_masks_for_noise(shared):
    pytest.importorskip("cellpose")
    weights = str(shared / "data/weights/nuclei_dsb2018")
    created = segment.create(SegmenterConfig("cellpose-torch", weights, 28.0))
    for name, count in (("bright noise", 0), ("two nuclei", 2)):
        assert created.segment(draw_field(name, 256)[..., None]).max() == count, name


@pytest.mark.parametrize("size", [64, 256, 2048])
def test_segment_returns_an_empty_mask_for_noise_of_any_size(size):
    rng = np.random.default_rng(0)
    noise = np.clip(rng.poisson(300, (size, size)) + rng.normal(0, 20, (size, size)), 0, None)
    assert not perturbjax.segment(noise.astype(np.uint16)).any()
    assert not perturbjax.segment((noise / 65535).astype(np.float32)).any()


def test_hot_pixels_are_not_objects():
    image = draw_field("dark noise", 128)
    image[[10, 60, 90], [20, 30, 100]] = 65535
    assert not analyze_foreground(image[..., None]).present


@pytest.mark.parametrize("sigma", [3.0, 40.0])
def test_estimate_noise_of_a_field_with_objects(sigma):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    image = 500 + 0.5 * x + 2000 * ((y % 64 - 32) ** 2 + (x % 64 - 32) ** 2 < 200)
    noisy = (image + rng.normal(0, sigma, image.shape)).astype(np.float32)
    assert estimate_noise(noisy) == pytest.approx(sigma, rel=0.1)


def test_intensity_range_never_amplifies_noise():
    for name in FIELDS:
        image = draw_field(name)[..., None]
        foreground = analyze_foreground(image)
        assert foreground.ranges[0, 1] >= MIN_RANGE * foreground.noise[0] * 0.999
        assert foreground.present == (name not in ("dark noise", "bright noise", "vignetting"))


def test_intensity_range_of_a_dense_field_is_its_percentiles():
    image = draw_field("thirty nuclei")
    low, high = np.percentile(image, (1, 99))
    ranges = analyze_foreground(image[..., None]).ranges
    np.testing.assert_allclose(ranges, [[low, high - low]], rtol=1e-5)


def test_remove_implausible_objects_checks_contrast_and_area():
    labels = np.zeros((100, 100), np.uint16)
    labels[10:30, 10:30], labels[10:30, 60:80], labels[60:63, 60:63], labels[50:95, 5:50] = (
        1,
        2,
        3,
        4,
    )
    image = 100 + np.isin(labels, (1, 3, 4)) * 50.0
    image += (labels == 2) * 2.0
    noise = np.array([1.0])
    kept = remove_implausible_objects(labels, image[..., None], noise, diameter=20)
    np.testing.assert_array_equal(kept > 0, np.isin(labels, (1, 4)))
    assert set(np.unique(kept)) == {0, 1, 2}
    same = remove_implausible_objects(labels, image[..., None], noise / 100, diameter=15)
    assert same is labels

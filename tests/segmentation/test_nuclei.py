"""The network included in perturbjax: `perturbjax.segment` and the engine `nuclei`."""

import numpy as np
import pytest
import tifffile

import perturbjax
from data_prep import segment
from data_prep.segment import SegmenterConfig, pipeline
from data_prep.segment.network import NetworkSegmenter
from data_prep.simulate import layout
from data_prep.simulate.cells import draw_site
from perturbjax.core.errors import InputError
from perturbjax.segmentation import average_precision as precision
from perturbjax.segmentation import weight_files
from perturbjax.segmentation.diameters import guess_diameter


@pytest.fixture(scope="module")
def engine() -> NetworkSegmenter:
    return segment.create(SegmenterConfig("nuclei", diameter="per-site"))


def draw(size: int, seed: int):
    traits = {name: trait.typical for name, trait in layout.TRAITS.items()}
    return draw_site(traits, size, np.random.default_rng(seed))


def test_nuclei_segments_simulated_nuclei(engine):
    drawn = draw(128, 3)
    labels = engine.segment(drawn.image[..., :1])
    assert (precision.match(drawn.nuclei, labels).average_precision >= [0.95, 0.95, 0.4]).all()


def test_nuclei_estimates_the_diameter(engine):
    drawn = draw(96, 5)
    larger = np.kron(drawn.image[..., :1], np.ones((4, 4, 1), np.uint16))
    truth = np.kron(drawn.nuclei, np.ones((4, 4), np.uint16))
    labels = engine.segment(larger)
    assert precision.match(truth, labels, [0.5]).average_precision[0] > 0.9
    diameter = engine.estimate_diameter([np.zeros_like(larger), larger])
    sizes = 2 * np.sqrt(np.bincount(truth.ravel())[1:] / np.pi)
    assert 1 / 1.3 < diameter / np.median(sizes) < 1.3


def test_segment_agrees_with_the_engine(engine):
    """One definition of the network serves both."""
    image = draw(128, 3).image[..., :1]
    np.testing.assert_array_equal(perturbjax.segment(image), engine.segment(image))


@pytest.mark.slow
@pytest.mark.shared
def test_segment_scores_on_the_dsb2018_test_images(shared):
    masks = sorted((shared / "data/dsb2018_nuclei/test").glob("*_labels.tif"))
    images = [tifffile.imread(str(mask).replace("_labels", "")) for mask in masks]
    scores = [
        precision.match(tifffile.imread(mask), labels)
        for mask, labels in zip(masks, perturbjax.segment(images), strict=True)
    ]
    assert (precision.mean(scores)[:2].round(3) >= [0.847, 0.672]).all()


def test_nuclei_returns_an_empty_mask_for_a_black_image(engine):
    assert not engine.segment(np.zeros((40, 50, 1), np.uint8)).any()
    assert engine.estimate_diameter([np.zeros((40, 50, 1), np.uint8)]) == 0


def test_describe_names_weights_checksum_and_diameter(engine):
    described = engine.describe()
    assert described["engine"] == "nuclei" and described["weights"] == "nuclei_small.safetensors"
    assert len(described["sha256"]) == 64 and described["parameters"]["diameter"] == "per-site"
    assert described["parameters"]["flow_threshold"] == 0.8
    for diameter, expected in ((30.0, 30.0), ("auto", "per-plate"), (0.0, "per-plate")):
        other = segment.create(SegmenterConfig("nuclei", diameter=diameter)).describe()
        assert other["parameters"]["diameter"] == expected


def test_nuclei_refuses_other_weights():
    with pytest.raises(InputError, match="--weights cyto: --segmenter nuclei has its own weights"):
        segment.create(SegmenterConfig("nuclei", "cyto"))


def test_suited_engine_depends_on_the_number_of_channels():
    assert pipeline.suited(("DNA",), ()) == "nuclei"
    assert pipeline.suited(("DNA", "Actin"), ("DNA",)) == "nuclei"
    assert pipeline.suited(("DNA", "Actin"), ()) == "watershed"


def test_included_weights_are_small_and_have_a_card():
    path = weight_files.find("nuclei_small")
    assert path.stat().st_size < 4e6 and path.with_suffix(".md").is_file()
    with pytest.raises(InputError, match="nuclei_small"):
        weight_files.find("nuclei_smal")


@pytest.mark.parametrize("radius", [6, 12, 25])
def test_guess_diameter_is_near_the_diameter_of_disks(radius):
    """The network corrects a guess within a factor of 1.5."""
    y, x = np.mgrid[:200, :200]
    image = sum(
        (y - row) ** 2 + (x - column) ** 2 < radius**2 for row in (50, 150) for column in (50, 150)
    )
    assert 1 / 1.5 < guess_diameter(100 + 900 * image) / (2 * radius) < 1.5

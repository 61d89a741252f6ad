"""The network that comes with the program."""

import numpy as np
import pytest
import tifffile

from data_prep import segment
from data_prep.segment import SegmenterConfig, pipeline
from data_prep.segment.nuclei import Nuclei
from data_prep.simulate import layout
from data_prep.simulate.cells import draw_site
from perturbjax.core.errors import InputError
from perturbjax.segmentation import average_precision as precision
from perturbjax.segmentation import weight_files as names
from perturbjax.segmentation.diameter_estimation import guessed_diameter


@pytest.fixture(scope="module")
def engine() -> Nuclei:
    return Nuclei()


def test_simulated_nuclei_are_found(engine):
    traits = {name: trait.typical for name, trait in layout.TRAITS.items()}
    drawn = draw_site(traits, 128, np.random.default_rng(3))
    found = engine.segment(drawn.image[..., :1])
    assert (precision.match(drawn.nuclei, found).average_precision >= [0.95, 0.95, 0.4]).all()


def test_nuclei_of_any_size_are_found_without_a_diameter(engine):
    traits = {name: trait.typical for name, trait in layout.TRAITS.items()}
    drawn = draw_site(traits, 96, np.random.default_rng(5))
    larger = np.kron(drawn.image[..., :1], np.ones((4, 4, 1), np.uint16))
    found = engine.segment(larger)
    truth = np.kron(drawn.nuclei, np.ones((4, 4), np.uint16))
    assert precision.match(truth, found, [0.5]).average_precision[0] > 0.9


@pytest.mark.slow
@pytest.mark.shared
def test_real_nuclei_are_found_better_than_by_the_watershed(shared, engine):
    """The first eight of the test images; the watershed reaches 0.742, 0.524 and 0.175 on all 40."""
    masks = sorted((shared / "data/dsb2018_nuclei/test").glob("*_labels.tif"))[:8]
    images = [tifffile.imread(str(mask).replace("_labels", ""))[..., None] for mask in masks]
    scores = [
        precision.match(tifffile.imread(mask), found)
        for mask, found in zip(masks, engine.segment_all(images), strict=True)
    ]
    assert (precision.mean(scores) > [0.8, 0.62, 0.2]).all()


def test_an_empty_site_has_no_nuclei(engine):
    assert not engine.segment(np.zeros((40, 50, 1), np.uint8)).any()


def test_provenance_names_the_weights_and_their_digest(engine):
    described = engine.describe()
    assert described["engine"] == "nuclei" and described["weights"] == "nuclei_small.safetensors"
    assert (
        len(described["sha256"]) == 64
        and described["parameters"]["diameter"] == "found in each site"
    )
    assert Nuclei(diameter=30).describe()["parameters"]["diameter"] == 30


def test_it_takes_no_other_weights():
    with pytest.raises(InputError, match="--weights cyto: --segmenter nuclei has its own"):
        segment.create(SegmenterConfig("nuclei", "cyto"))


def test_a_build_that_names_no_engine_takes_the_one_that_suits():
    assert pipeline.suited(("DNA",), ()) == "nuclei"
    assert pipeline.suited(("DNA", "Actin"), ("DNA",)) == "nuclei"
    assert pipeline.suited(("DNA", "Actin"), ()) == "watershed"


def test_shipped_weights_go_by_name_and_are_small():
    path = names.find("nuclei_small")
    assert path.stat().st_size < 4e6 and path.with_suffix(".md").is_file()
    with pytest.raises(InputError, match="nuclei_small"):
        names.find("nuclei_smal")


@pytest.mark.parametrize("radius", [6, 12, 25])
def test_the_first_guess_is_near_the_diameter_of_disks(radius):
    y, x = np.mgrid[:200, :200]
    image = sum(
        (y - row) ** 2 + (x - column) ** 2 < radius**2 for row in (50, 150) for column in (50, 150)
    )
    assert (
        1 / 1.5 < guessed_diameter(100 + 900 * image) / (2 * radius) < 1.5
    )  # what a second look mends

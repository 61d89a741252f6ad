"""Nuclei are extended to whole cells in a second stain."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.draw import disk

from data_prep.segment.propagation import propagate
from data_prep.simulate.cells import draw_site
from data_prep.simulate.layout import TRAITS


@pytest.fixture(scope="module")
def site():
    """A simulated site with the true nuclei and cells."""
    traits = {name: trait.typical for name, trait in TRAITS.items()}
    return draw_site(traits, 256, np.random.default_rng(1))


def overlap(cells, truth) -> np.ndarray:
    """Intersection over union of each true cell and the cell of the same label."""
    return np.array(
        [
            ((cells == label) & (truth == label)).sum()
            / ((cells == label) | (truth == label)).sum()
            for label in np.unique(truth[truth > 0])
        ]
    )


def test_cells_match_the_truth_and_contain_their_nuclei(site):
    cells = propagate(site.nuclei, site.image[..., 1])
    assert set(np.unique(cells)) == set(np.unique(site.nuclei))
    assert (cells == site.nuclei)[site.nuclei > 0].all()
    assert (
        np.median(overlap(cells, site.cells)) > 0.75 > np.median(overlap(site.nuclei, site.cells))
    )


@pytest.mark.parametrize("membrane", [9000, 200], ids=["bright", "dark"])
def test_boundary_moves_to_a_membrane(membrane):
    stain = np.full((120, 120), 100, np.uint16)
    stain[10:50, 5:95] = 2000
    nuclei = np.zeros(stain.shape, np.uint16)
    nuclei[disk((30, 18), 6)], nuclei[disk((30, 70), 6)] = 4, 9
    plain = propagate(nuclei, stain, diameter=30)
    stain[10:50, 40:43] = (
        membrane  # nearer to the first nucleus than column 44, the equidistant one
    )
    cells = propagate(nuclei, stain, diameter=30)
    assert (plain[30, 18:44] == 4).all() and (plain[30, 45:70] == 9).all()
    assert (cells[30, 18:39] == 4).all() and (cells[30, 43:70] == 9).all()


def test_dim_cells_keep_their_cytoplasm():
    rng = np.random.default_rng(0)
    light = np.full((80, 120), 200.0)
    light[disk((40, 25), 20)], light[disk((40, 90), 20)] = 6000, 900
    nuclei = np.zeros(light.shape, np.uint16)
    nuclei[disk((40, 25), 8)], nuclei[disk((40, 90), 8)] = 1, 2
    cells = propagate(nuclei, rng.poisson(light).astype(np.uint16))
    areas = np.bincount(cells.ravel())[1:]
    np.testing.assert_allclose(areas, np.pi * 20**2, rtol=0.15)


def test_confluent_cells_fill_the_field():
    rng = np.random.default_rng(0)
    stain = rng.poisson(2000, (120, 120)).astype(np.uint16)
    stain[:, 58:62] //= 2
    nuclei = np.zeros(stain.shape, np.uint16)
    nuclei[disk((60, 30), 20)], nuclei[disk((60, 90), 20)] = 1, 2
    stain[nuclei > 0] += 800
    cells = propagate(nuclei, stain)
    assert (cells > 0).mean() > 0.95


def test_fields_without_nuclei_or_stain_have_no_cytoplasm(site):
    empty = np.random.default_rng(0).poisson(300, site.nuclei.shape).astype(np.uint16)
    np.testing.assert_array_equal(propagate(site.nuclei, empty), site.nuclei)
    np.testing.assert_array_equal(propagate(site.nuclei, np.zeros_like(empty)), site.nuclei)
    assert not propagate(np.zeros_like(empty), site.image[..., 1]).any()
    full = np.ones_like(site.nuclei)
    np.testing.assert_array_equal(propagate(full, site.image[..., 1]), full)

"""Windows of native resolution inside jit: positions, weights, sites without cells."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from perturbjax.data.cells import list_cells
from perturbjax.models.windows import choose_windows, cut_windows, pad_to


def labels_at(centers, shape=(90, 120)) -> np.ndarray:
    mask = np.zeros(shape, np.uint16)
    for number, (row, column) in enumerate(centers, 2):
        mask[max(row - 3, 0) : row + 4, max(column - 4, 0) : column + 5] = number
    return mask


def choose(mask, size=32, count=4) -> tuple[np.ndarray, np.ndarray]:
    choice = jax.jit(choose_windows, static_argnums=(1, 2))(jnp.asarray(mask), size, count)
    return tuple(map(np.asarray, choice))


def test_windows_are_centered_on_cells_within_the_site():
    mask = labels_at([(45, 60), (8, 20), (1, 90), (70, 100)])
    corners, weight = choose(mask)
    cells = list_cells(mask)
    inner = cells.take(~cells.at_border).centroids
    expected = np.clip(np.rint(inner - 16), 0, (58, 88))
    np.testing.assert_array_equal(corners[:3], expected)  # the cell at the border is left out
    assert weight.tolist() == [1, 1, 1, 0]


def test_many_cells_are_chosen_at_equal_distances():
    centers = [(row, column) for row in range(10, 80, 10) for column in range(10, 110, 12)]
    corners, weight = choose(labels_at(centers), size=16, count=5)
    chosen = [centers[len(centers) * k // 5] for k in range(5)]
    np.testing.assert_array_equal(corners, np.array(chosen) - 8)
    assert weight.all()


def test_sites_without_cells_have_a_grid():
    corners, weight = choose(np.zeros((90, 120), np.uint16))
    assert corners.tolist() == [[0, 0], [0, 88], [58, 0], [58, 88]] and weight.all()
    large_labels, _ = choose(np.full((90, 120), 60_000, np.uint16))
    np.testing.assert_array_equal(large_labels, corners)


def test_cut_windows_copies_pixels_and_pad_extends_small_sites():
    site = jnp.arange(6 * 5 * 2, dtype=jnp.float32).reshape(6, 5, 2)
    (window,) = cut_windows(site, jnp.array([[2, 1]]), 3)
    np.testing.assert_array_equal(window, site[2:5, 1:4])
    assert pad_to(site, 4, "constant") is site
    padded = pad_to(site, 8, "symmetric")
    assert padded.shape == (8, 8, 2) and (padded[6] == padded[5]).all()

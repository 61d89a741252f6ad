"""Gallery: choice of sites, confused pairs, and the limit of the page size."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.report import gallery
from perturbjax.report.class_section import Confusion, read_confusion, similarity_order
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.run_page import run_page
from perturbjax.report.run_results import TestPredictions, read_run_results

from .screens import Page, make_run


def make_predictions(confidence: list[float], right: list[bool]) -> TestPredictions:
    """Sites of class 0 of two."""
    p = np.array([c if r else 1 - c for c, r in zip(confidence, right, strict=True)])
    return TestPredictions(
        pd.DataFrame(), ["a", "b"], np.zeros(len(p), int), np.stack([p, 1 - p], axis=1)
    )


def test_choose_takes_confident_and_central_sites():
    test = make_predictions([0.6, 0.9, 0.8, 0.7, 0.95], [True, True, True, False, False])
    features = np.array([[0.0], [9], [9], [9], [4.9]])
    choice = gallery.choose(test, np.arange(5), features, 0, 2)
    assert choice.right == [1, 2] and choice.wrong == [4, 3]
    assert choice.typical[0] == 4, "nearest to the mean, 6.4, whatever the prediction"


def test_choose_prefers_sites_of_different_wells():
    test = make_predictions([0.9, 0.8, 0.7, 0.6], [True] * 4)
    assert gallery.choose(test, np.array([0, 0, 0, 1]), None, 0, 2).right == [0, 3]


def test_confusion_pairs_are_ordered_by_sites_then_fraction():
    confusion = Confusion(["a", "b", "c"], np.array([[5, 2, 0], [0, 0, 2], [3, 0, 9]]))
    assert confusion.pairs() == [(2, 0, 3), (1, 2, 2), (0, 1, 2)]


def test_pairs_are_limited_per_predicted_class(monkeypatch):
    names = [f"class {at}" for at in range(7)]
    album = gallery.Gallery.__new__(gallery.Gallery)
    album.test, album.bytes, album.remaining = (
        TestPredictions(pd.DataFrame(), names, np.zeros(1, int), np.ones((1, 7))),
        0,
        9,
    )
    monkeypatch.setattr(
        gallery.Gallery, "pair_details", lambda self, true, other, sites: f"{true}>{other} "
    )
    matrix = np.zeros((7, 7), int)
    matrix[1:, 0], matrix[1, 2] = 9, 1
    text = gallery.pairs(album, Confusion(names, matrix))
    assert text.endswith("</p>2>0 3>0 4>0 1>2 ") and "at most 3 pairs" in text


def test_similarity_order_puts_confused_classes_side_by_side():
    matrix = np.diag([9] * 6)
    matrix[0, 4] = matrix[4, 0] = 8
    order = list(similarity_order(matrix))
    assert sorted(order) == list(range(6)) and abs(order.index(0) - order.index(4)) == 1


def test_classes_beyond_the_budget_are_left_out_with_a_note(tmp_path, monkeypatch):
    make_run(tmp_path, images=True)
    results = read_run_results(tmp_path)
    album = gallery.Gallery(results, results.test, pictures.make_renderer(results.dataset))
    gallery.pairs(album, read_confusion(results))
    bytes_of_pairs = album.bytes
    gallery.classes(album)
    monkeypatch.setattr(gallery, "BUDGET", (bytes_of_pairs + album.bytes) // 2)
    page = Page(run_page(results))
    left = 8 - len(page.all("details", "class"))
    assert 0 < left < 8 and f"{left} classes with fewer errors are left out" in page.text
    assert len(page.all("h3")) == 12, "the most confused pairs come first"


@pytest.mark.parametrize(("classes", "each"), [(8, 3), (40, 2), (300, 1)])
def test_many_classes_have_fewer_pictures_each(classes, each):
    assert gallery.pictures_each(classes) == each

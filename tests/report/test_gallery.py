"""Which cells are shown of a class: the surest right and wrong, the typical, of different wells, within a budget."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.report import gallery
from perturbjax.report.class_section import Confusion, alike, read_confusion
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.run_page import run_page
from perturbjax.report.run_results import Answers, read_evidence

from .screens import Page, make_run


def answers_of(confidence: list[float], right: list[bool]) -> Answers:
    """Sites of class 0 of two."""
    p = np.array([c if r else 1 - c for c, r in zip(confidence, right, strict=True)])
    return Answers(pd.DataFrame(), ["a", "b"], np.zeros(len(p), int), np.stack([p, 1 - p], axis=1))


def test_the_surest_right_and_wrong_and_the_middle_of_the_class_are_chosen():
    answers = answers_of([0.6, 0.9, 0.8, 0.7, 0.95], [True, True, True, False, False])
    features = np.array([[0.0], [9], [9], [9], [4.9]])
    choice = gallery.choose(answers, np.arange(5), features, 0, 2)
    assert choice.right == [1, 2] and choice.wrong == [4, 3]
    assert choice.typical[0] == 4, "nearest to the mean, 6.4, whatever was said of it"


def test_sites_of_other_wells_are_shown_before_more_of_one():
    answers = answers_of([0.9, 0.8, 0.7, 0.6], [True] * 4)
    assert gallery.choose(answers, np.array([0, 0, 0, 1]), None, 0, 2).right == [0, 3]


def test_pairs_come_by_sites_then_by_share():
    confusion = Confusion(["a", "b", "c"], np.array([[5, 2, 0], [0, 0, 2], [3, 0, 9]]))
    assert confusion.pairs() == [(2, 0, 3), (1, 2, 2), (0, 1, 2)]


def test_a_class_that_takes_all_has_three_pairs_and_leaves_room_for_others(monkeypatch):
    names = [f"class {at}" for at in range(7)]
    album = gallery.Gallery.__new__(gallery.Gallery)
    album.answers, album.weight, album.left = (
        Answers(pd.DataFrame(), names, np.zeros(1, int), np.ones((1, 7))),
        0,
        9,
    )
    monkeypatch.setattr(
        gallery.Gallery, "of_pair", lambda self, true, told, sites: f"{true}>{told} "
    )
    matrix = np.zeros((7, 7), int)
    matrix[1:, 0], matrix[1, 2] = 9, 1
    said = gallery.pairs(album, Confusion(names, matrix))
    assert said.endswith("</p>2>0 3>0 4>0 1>2 ") and "at most 3 pairs" in said


def test_classes_taken_for_each_other_stand_side_by_side():
    matrix = np.diag([9] * 6)
    matrix[0, 4] = matrix[4, 0] = 8
    order = list(alike(matrix))
    assert sorted(order) == list(range(6)) and abs(order.index(0) - order.index(4)) == 1


def test_what_does_not_fit_the_budget_is_left_out_and_said(tmp_path, monkeypatch):
    make_run(tmp_path, images=True)
    found = read_evidence(tmp_path)
    album = gallery.Gallery(found, found.answers, pictures.renderer(found.dataset))
    gallery.pairs(album, read_confusion(found))
    of_pairs = album.weight
    gallery.classes(album)
    monkeypatch.setattr(gallery, "BUDGET", (of_pairs + album.weight) // 2)
    page = Page(run_page(found))
    left = 8 - len(page.all("details", "class"))
    assert 0 < left < 8 and f"{left} with fewer errors are left out" in page.text
    assert len(page.all("h3")) == 12, "the most confused pairs come first"


@pytest.mark.parametrize(("classes", "each"), [(8, 3), (40, 2), (300, 1)])
def test_many_classes_get_fewer_pictures_each(classes, each):
    assert gallery.pictures_each(classes) == each

"""The preview of a dataset: counts, plate maps, montages and unusual wells."""

from __future__ import annotations

import numpy as np
import pytest

from perturbjax.dataset import open_dataset
from perturbjax.report.pages import preview
from report.screens import Page, check_page, make_index, write_images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preview") / "data"
    write_images(path, make_index())
    return open_dataset(path)


@pytest.fixture(scope="module")
def page(dataset):
    return Page(preview.write_preview(dataset).read_text())


def test_preview_counts_cells_sites_and_wells(dataset, page):
    assert (dataset.path / "preview.html").is_file()
    assert "216 cells in 216 sites of 72 wells on 3 plates; 0 unusual wells." in page.text
    assert len(open_dataset(dataset.path)) == 216, "the dataset opens as before"


def test_preview_follows_the_rules_of_all_pages(dataset, page):
    check_page(page, (dataset.path / "preview.html").read_text())


def test_plate_map_has_every_well_and_measure(page):
    wells = page.data("wells")
    assert len(wells["well"]) == 72 and set(wells["plate"]) == {"P0", "P1", "P2"}
    assert {"cells", "cell area", "DNA intensity", "Mito contrast"} <= set(wells)
    assert set(wells["cells"]) == {1.0}


def test_every_plate_has_a_montage(page):
    assert len(page.all("figure", "shot")) == 72
    assert {"plate-P0", "plate-P1", "plate-P2"} <= {one.get("id") for one in page.all("section")}


def test_many_plates_share_one_section(tmp_path):
    write_images(tmp_path / "data", make_index(plates=9, rows=1, columns=8, sites=1))
    page = Page(preview.write_preview(open_dataset(tmp_path / "data")).read_text())
    assert [one.get("id") for one in page.all("section")] == ["plates", "outliers", "cells"]
    assert len(page.all("div", "strip")) == 9 and "P8: 8 of 8 wells" in page.text


def test_unusual_wells_are_listed_and_linked(dataset, tmp_path):
    changed = open_dataset(dataset.path)
    empty = (changed.index["Metadata_Plate"] == "P1") & (changed.index["Metadata_Well"] == "B02")
    blurred = (changed.index["Metadata_Plate"] == "P2") & (changed.index["Metadata_Well"] == "C03")
    changed.index.loc[empty, ["n_cells", "mask_area"]] = 0
    changed.index.loc[blurred, "std_DNA"] /= 10
    wells = preview.well_table(changed)
    far = preview.outliers(wells)
    assert set(zip(far["Metadata_Well"], far["measure"], strict=True)) == {
        ("B02", "cells"),
        ("C03", "DNA contrast"),
    }
    page = Page(preview.write_preview(changed).read_text())
    assert "2 unusual wells" in page.text
    links = {one["href"] for one in page.all("a")}
    assert "#well-P1-B02" in links and "well-P1-B02" in {
        one.get("id") for one in page.all("figure")
    }
    assert sum(page.data("wells")["flagged"]) == 2


def test_robust_deviations_ignore_the_outlier():
    deviations = preview.robust(np.array([1.0, 1.1, 0.9, 1.05, 50]))
    assert deviations[-1] > 100 and np.abs(deviations[:-1]).max() < 3


def test_unusual_well_names_give_no_plate_map(tmp_path):
    index = make_index(plates=1).assign(
        Metadata_Well=lambda table: "well " + table["Metadata_Well"]
    )
    write_images(tmp_path / "data", index)
    page = Page(preview.write_preview(open_dataset(tmp_path / "data")).read_text())
    assert "not named like A01" in page.text and page.all("img")


def test_dataset_without_labels_has_a_preview(tmp_path):
    write_images(tmp_path / "data", make_index(plates=1), label_column="")
    page = Page(preview.write_preview(open_dataset(tmp_path / "data")).read_text())
    assert len(page.all("figure", "shot")) == 24 and set(page.data("wells")["label"]) == {""}

"""Layouts: their numbers mean what they say, and picture and page hold what they should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from report.screens import Page, make_index, write_images
from tiny_profiles import make_table, write

from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset
from perturbjax.profiles.embedding import (
    Picture,
    choose_highlighted,
    embed,
    lay_out_tsne,
    lay_out_umap,
    measure,
)
from perturbjax.profiles.profile_options import (
    EmbedConfig,
    Preparation,
    ProfileConfig,
    SourceConfig,
)
from perturbjax.profiles.profile_table import Profiles, aggregate_to_wells
from perturbjax.report.embedding_page import write_page


def config_for(table: pd.DataFrame, folder: Path, **changes) -> EmbedConfig:
    path = write(table, folder / "screen.parquet")
    return EmbedConfig(
        **{
            "profiles": ProfileConfig((path,)),
            "out": folder / "picture.png",
            "method": "tsne",
            "preparation": Preparation(),
            "neighbors": 5,
            **changes,
        }
    )


def blobs(apart: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.array(list("abcd")), 25)
    return rng.normal(size=(100, 5)) + apart * np.repeat(
        rng.normal(size=(4, 5)), 25, axis=0
    ), labels


def test_purity_is_one_for_separate_classes_and_chance_for_mixed_ones() -> None:
    features, labels = blobs(apart=50)
    quality = measure(features, features[:, :2], labels, k=10)
    assert quality.purity == 1 and quality.silhouette > 0.9
    assert quality.chance == pytest.approx(24 / 99)
    mixed = measure(blobs(apart=0)[0], features[:, :2], labels, k=10)
    assert mixed.purity == pytest.approx(quality.chance, abs=0.08)
    assert abs(mixed.silhouette) < 0.1
    assert mixed.purity_2d > 0.9


def test_a_class_of_one_row_has_no_silhouette_and_does_no_harm() -> None:
    features, labels = blobs(apart=50)
    alone = labels.astype(object)
    alone[0] = "alone"
    assert measure(features, features[:, :2], alone, k=5).silhouette > 0.9
    assert np.isnan(measure(features, features[:, :2], np.arange(100), k=5).silhouette)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lay_out",
    [lambda x: lay_out_tsne(x, 10, 0), lambda x: lay_out_umap(x, 10, 0.1, 0)],
    ids=["tsne", "umap"],
)
def test_layouts_keep_classes_together_and_repeat_with_their_seed(lay_out) -> None:
    features, labels = blobs(apart=20)
    points = lay_out(features)
    assert points.shape == (100, 2) and np.isfinite(points).all()
    assert measure(features, points, labels, k=10).purity_2d > 0.95
    np.testing.assert_array_equal(points, lay_out(features))


def test_the_classes_that_hold_together_best_get_the_colours() -> None:
    features, labels = blobs(apart=0)
    features[labels == "c"] += 100
    none = np.zeros(100, bool)
    assert choose_highlighted(features, labels, none, 1, k=10) == ["c"]
    assert choose_highlighted(features, labels, none, 4, k=10) == ["a", "b", "c", "d"]


def test_many_classes_leave_most_grey_and_every_row_is_drawn_once() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([f"compound {i // 2}" for i in range(600)], dtype=object)
    negcon = np.arange(600) < 60
    labels[negcon] = "DMSO"
    chosen = choose_highlighted(rng.normal(size=(600, 3)), labels, negcon, 12, k=5)
    config = EmbedConfig(ProfileConfig((Path("a"),)), Path("a.png"))
    quality = measure(rng.normal(size=(600, 3)), rng.normal(size=(600, 2)), labels, k=5)
    groups = Picture(
        rng.normal(size=(600, 2)), labels, negcon, chosen, config, quality, "Metadata_moa"
    ).groups()
    assert [legend for legend, *_ in groups][:2] == ["258 other classes", "negative control (DMSO)"]
    assert len(groups) == 14
    assert (np.sum([rows for _, rows, _, _ in groups], axis=0) == 1).all()


def test_controls_of_several_classes_are_crossed_on_top_of_their_class() -> None:
    features, labels = blobs(apart=1)
    negcon = np.arange(100) % 5 == 0
    config = EmbedConfig(ProfileConfig((Path("a"),)), Path("a.png"))
    picture = Picture(
        features[:, :2],
        labels,
        negcon,
        list("abcd"),
        config,
        measure(features, features, labels, k=5),
        "Metadata_moa",
    )
    *classes, controls = picture.groups()
    assert controls[0] == "negative controls" and controls[3] == "x"
    assert np.sum([rows for _, rows, _, _ in classes], axis=0).min() == 1


def test_picture_page_and_coordinates_are_written(tmp_path: Path) -> None:
    table = make_table().assign(Metadata_smiles="CC(=O)<b>")
    table.loc[0, "Metadata_smiles"] = "C#N & more"
    path = embed(config_for(table, tmp_path, join=True))
    image = imread(path)
    assert image.shape[0] > 500 and image.std() > 0.05
    text = path.with_suffix(".html").read_text()
    page = Page(text)
    assert "Of the 5 rows nearest to a row, " in page.text and len(text) < 200_000
    assert all(link["href"].startswith("#") for link in page.all("a")), "the page needs the network"
    assert "<b>" not in text.split("CC(=O)")[1][:10], "metadata are not markup"
    shown = page.data("layout")
    assert len(shown["x"]) == 96 and "taxol" in shown["class"] and "C#N & more" in shown["smiles"]
    (drawn,) = (one for one in page.all("div") if one.get("data-widget") == "scatter")
    assert (
        "taxol" in json.loads(drawn["data-palette"])
        and json.loads(drawn["data-colours"])[0] == "class"
    )
    points = pd.read_csv(path.with_suffix(".csv"))
    assert len(points) == 96 and np.isfinite(points[["x", "y"]]).all(axis=None)


def test_what_a_network_was_trained_on_is_hollow(tmp_path: Path) -> None:
    table = make_table()
    table["Metadata_part"] = np.where(table["Metadata_Plate"] == "P0", "test", "train")
    path = embed(config_for(table, tmp_path))
    page = path.with_suffix(".html").read_text()
    assert "Hollow: the 72 rows that its network was trained on" in page
    assert Page(page).data("layout")["part"].count("train") == 72
    plain = embed(config_for(make_table(), tmp_path, out=tmp_path / "plain.png"))
    assert "trained on" not in plain.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"out": Path("picture.pdf")}, r"--out picture\.pdf: must be a name that ends in \.png"),
        ({"highlight": 0}, "--highlight 0: must be from 1 to 16"),
        ({"profiles": ProfileConfig((Path("none.csv"),))}, r"none\.csv: no such features file"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        embed(config_for(make_table(), tmp_path, **changes))


def test_features_of_a_dataset_show_their_cells(tmp_path: Path) -> None:
    index = make_index(plates=1)
    write_images(tmp_path / "data", index)
    table = open_dataset(tmp_path / "data").index
    values = np.random.default_rng(0).normal(size=(len(table), 4)).astype(np.float32)
    for aggregate, rows in (("none", 72), ("median", 24)):
        profiles = Profiles(
            table[["site_id", *(c for c in table if c.startswith("Metadata_"))]],
            values,
            tuple("abcd"),
        )
        profiles = profiles if aggregate == "none" else aggregate_to_wells(profiles)
        config = EmbedConfig(
            ProfileConfig(source=SourceConfig((tmp_path / "data",)), aggregate=aggregate),
            tmp_path / "a.png",
        )
        labels = profiles.metadata["Metadata_pert_iname"].to_numpy()
        points = profiles.values[:, :2].astype(float)
        quality = measure(profiles.values.astype(float), points, labels, k=5)
        picture = Picture(
            points, labels, labels == "DMSO", ["compound A"], config, quality, "Metadata_pert_iname"
        )
        page = Page(write_page(picture, profiles, tmp_path / "a.html").read_text())
        shown = page.data("layout")
        assert len(shown["picture"]) == rows and max(shown["picture"]) == rows - 1
        assert sum(shown["control"]) == (labels == "DMSO").sum()
        (drawn,) = (one for one in page.all("div") if one.get("data-widget") == "scatter")
        assert drawn["data-atlas"].startswith("data:image/")
        assert json.loads(drawn["data-palette"]).keys() == {"DMSO", "compound A"}


def test_a_library_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("perturbjax.profiles.embedding.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"openTSNE is not installed; run `pip install 'perturbjax\[features\]'`"
    ):
        embed(config_for(make_table(), tmp_path))


def test_three_rows_are_too_few(tmp_path: Path) -> None:
    config = config_for(make_table(plates=1, wells=3), tmp_path)
    with pytest.raises(InputError, match="3 rows; a layout needs four or more"):
        embed(replace(config, preparation=Preparation(normalize="none")))

"""Layouts: their numbers mean what they say, and picture and page hold what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from tiny_profiles import make_table, write

from perturbjax.console import InputError
from perturbjax.features.embed import Picture, choose_highlighted, embed, lay_out_tsne, lay_out_umap, measure
from perturbjax.features.settings import EmbedConfig, Preparation, ProfileConfig


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
    return rng.normal(size=(100, 5)) + apart * np.repeat(rng.normal(size=(4, 5)), 25, axis=0), labels


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


@pytest.mark.parametrize("lay_out", [lambda x: lay_out_tsne(x, 10, 0), lambda x: lay_out_umap(x, 10, 0.1, 0)])
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
    groups = Picture(rng.normal(size=(600, 2)), labels, negcon, chosen, config, quality, "Metadata_moa").groups()
    assert [legend for legend, *_ in groups][:2] == ["258 other classes", "negative control (DMSO)"]
    assert len(groups) == 14
    assert (np.sum([rows for _, rows, _, _ in groups], axis=0) == 1).all()


def test_controls_of_several_classes_are_crossed_on_top_of_their_class() -> None:
    features, labels = blobs(apart=1)
    negcon = np.arange(100) % 5 == 0
    config = EmbedConfig(ProfileConfig((Path("a"),)), Path("a.png"))
    picture = Picture(
        features[:, :2], labels, negcon, list("abcd"), config, measure(features, features, labels, k=5), "Metadata_moa"
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
    page = path.with_suffix(".html").read_text()
    assert "nearest-neighbour purity" in page and "taxol" in page
    assert 'src="http' not in page, "the page needs the network"
    assert "<b>" not in page.split("CC(=O)")[1][:10], "metadata are not markup"
    points = pd.read_csv(path.with_suffix(".csv"))
    assert len(points) == 96 and np.isfinite(points[["x", "y"]]).all(axis=None)


def test_what_a_network_was_trained_on_is_hollow(tmp_path: Path) -> None:
    table = make_table()
    table["Metadata_part"] = np.where(table["Metadata_Plate"] == "P0", "test", "train")
    path = embed(config_for(table, tmp_path))
    page = path.with_suffix(".html").read_text()
    assert "Hollow: the 72 rows that its network was trained on" in page
    assert "circle-open" in page and "taxol, trained on" in page
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


def test_three_rows_are_too_few(tmp_path: Path) -> None:
    config = config_for(make_table(plates=1, wells=3), tmp_path)
    with pytest.raises(InputError, match="3 rows; a layout needs four or more"):
        embed(replace(config, preparation=Preparation(normalize="none")))

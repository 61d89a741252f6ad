"""2-D embeddings: quality scores, figure, page and coordinates."""

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

from perturbjax.core.colours import CLASS_COLORS
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset
from perturbjax.profiles.embedding import (
    Embedding,
    choose_highlighted,
    compute_tsne,
    compute_umap,
    embed,
    measure_quality,
)
from perturbjax.profiles.profile_options import (
    MAX_COLORS,
    EmbedConfig,
    Preparation,
    ProfileConfig,
    SourceConfig,
)
from perturbjax.profiles.profile_table import Profiles, aggregate_to_wells
from perturbjax.report.embedding_page import write_page

pytestmark = pytest.mark.full

NO_PROFILES = Profiles(pd.DataFrame(), np.zeros((0, 0), np.float32), ())


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


def write_all(config: EmbedConfig) -> Path:
    """Write figure, coordinates and page as `perturbjax embed` does."""
    embedding = embed(config)
    write_page(embedding, embedding.profiles, config.out.with_suffix(".html"))
    return config.out


def blobs(distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.array(list("abcd")), 25)
    return rng.normal(size=(100, 5)) + distance * np.repeat(
        rng.normal(size=(4, 5)), 25, axis=0
    ), labels


def test_quality_is_one_for_separate_classes_and_chance_for_mixed_classes() -> None:
    features, labels = blobs(distance=50)
    quality = measure_quality(features, features[:, :2], labels, k=10)
    assert quality.purity == 1 and quality.silhouette > 0.9
    assert quality.chance == pytest.approx(24 / 99)
    mixed = measure_quality(blobs(distance=0)[0], features[:, :2], labels, k=10)
    assert mixed.purity == pytest.approx(quality.chance, abs=0.08)
    assert abs(mixed.silhouette) < 0.1
    assert mixed.purity_2d > 0.9


def test_quality_ignores_class_of_one_row_in_silhouette() -> None:
    features, labels = blobs(distance=50)
    changed = labels.astype(object)
    changed[0] = "single"
    assert measure_quality(features, features[:, :2], changed, k=5).silhouette > 0.9
    assert np.isnan(measure_quality(features, features[:, :2], np.arange(100), k=5).silhouette)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compute",
    [lambda x: compute_tsne(x, 10, 0), lambda x: compute_umap(x, 10, 0.1, 0)],
    ids=["tsne", "umap"],
)
def test_embedding_separates_classes_and_is_reproducible(compute) -> None:
    features, labels = blobs(distance=20)
    points = compute(features)
    assert points.shape == (100, 2) and np.isfinite(points).all()
    assert measure_quality(features, points, labels, k=10).purity_2d > 0.95
    np.testing.assert_array_equal(points, compute(features))


def test_choose_highlighted_prefers_pure_classes() -> None:
    features, labels = blobs(distance=0)
    features[labels == "c"] += 100
    none = np.zeros(100, bool)
    assert choose_highlighted(features, labels, none, 1, k=10) == ["c"]
    assert choose_highlighted(features, labels, none, 4, k=10) == ["a", "b", "c", "d"]


def test_embedding_groups_contain_every_row_once() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([f"compound {i // 2}" for i in range(600)], dtype=object)
    negcon = np.arange(600) < 60
    labels[negcon] = "DMSO"
    highlighted = choose_highlighted(rng.normal(size=(600, 3)), labels, negcon, 12, k=5)
    config = EmbedConfig(ProfileConfig((Path("a"),)), Path("a.png"))
    quality = measure_quality(rng.normal(size=(600, 3)), rng.normal(size=(600, 2)), labels, k=5)
    points = rng.normal(size=(600, 2))
    groups = Embedding(
        points, labels, negcon, highlighted, config, quality, "Metadata_moa", NO_PROFILES
    ).groups()
    assert [legend for legend, *_ in groups][:2] == ["258 other classes", "negative control (DMSO)"]
    assert len(groups) == 14
    assert (np.sum([rows for _, rows, _, _ in groups], axis=0) == 1).all()


def test_embedding_groups_draw_crosses_over_controls_of_several_classes() -> None:
    features, labels = blobs(distance=1)
    negcon = np.arange(100) % 5 == 0
    config = EmbedConfig(ProfileConfig((Path("a"),)), Path("a.png"))
    picture = Embedding(
        features[:, :2],
        labels,
        negcon,
        list("abcd"),
        config,
        measure_quality(features, features, labels, k=5),
        "Metadata_moa",
        NO_PROFILES,
    )
    *classes, controls = picture.groups()
    assert controls[0] == "negative controls" and controls[3] == "x"
    assert np.sum([rows for _, rows, _, _ in classes], axis=0).min() == 1


def test_embed_writes_figure_page_and_coordinates(tmp_path: Path) -> None:
    table = make_table().assign(Metadata_smiles="CC(=O)<b>")
    table.loc[0, "Metadata_smiles"] = "C#N & more"
    path = write_all(config_for(table, tmp_path, join=True))
    image = imread(path)
    assert image.shape[0] > 500 and image.std() > 0.05
    text = path.with_suffix(".html").read_text()
    page = Page(text)
    assert "Of the 5 nearest neighbors of a row, " in page.text and len(text) < 200_000
    assert all(link["href"].startswith("#") for link in page.all("a")), "the page needs the network"
    assert "<b>" not in text.split("CC(=O)")[1][:10], "metadata are not markup"
    points = page.data("layout")
    assert (
        len(points["x"]) == 96 and "taxol" in points["class"] and "C#N & more" in points["smiles"]
    )
    (scatter,) = (one for one in page.all("div") if one.get("data-widget") == "scatter")
    assert (
        "taxol" in json.loads(scatter["data-palette"])
        and json.loads(scatter["data-colors"])[0] == "class"
    )
    points = pd.read_csv(path.with_suffix(".csv"))
    assert len(points) == 96 and np.isfinite(points[["x", "y"]]).all(axis=None)


def test_embed_marks_training_rows_as_hollow(tmp_path: Path) -> None:
    table = make_table()
    table["Metadata_part"] = np.where(table["Metadata_Plate"] == "P0", "test", "train")
    path = write_all(config_for(table, tmp_path))
    page = path.with_suffix(".html").read_text()
    assert "Hollow: 72 training rows of the network" in page
    assert Page(page).data("layout")["part"].count("train") == 72
    plain = write_all(config_for(make_table(), tmp_path, out=tmp_path / "plain.png"))
    assert "trained on" not in plain.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("picture.pdf")}, r"--out picture\.pdf: must be a name that ends in \.png"),
        ({"highlight": 0}, "--highlight 0: must be 1 to 16"),
        ({"profiles": ProfileConfig((Path("none.csv"),))}, r"none\.csv: file not found"),
    ],
)
def test_embed_refuses_bad_input(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        embed(config_for(make_table(), tmp_path, **changes))


def test_page_shows_cells_of_dataset(tmp_path: Path) -> None:
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
        quality = measure_quality(profiles.values.astype(float), points, labels, k=5)
        picture = Embedding(
            points,
            labels,
            labels == "DMSO",
            ["compound A"],
            config,
            quality,
            "Metadata_pert_iname",
            profiles,
        )
        page = Page(write_page(picture, profiles, tmp_path / "a.html").read_text())
        points_data = page.data("layout")
        assert len(points_data["picture"]) == rows and max(points_data["picture"]) == rows - 1
        assert sum(points_data["control"]) == (labels == "DMSO").sum()
        (scatter,) = (one for one in page.all("div") if one.get("data-widget") == "scatter")
        assert scatter["data-atlas"].startswith("data:image/")
        assert json.loads(scatter["data-palette"]).keys() == {"DMSO", "compound A"}


def test_embed_names_missing_library(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("perturbjax.profiles.embedding.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"openTSNE is not installed. Run `pip install 'perturbjax\[features\]'`"
    ):
        embed(config_for(make_table(), tmp_path))


def test_embed_needs_four_rows(tmp_path: Path) -> None:
    config = config_for(make_table(plates=1, wells=3), tmp_path)
    with pytest.raises(InputError, match="3 rows, but an embedding needs at least four"):
        embed(replace(config, preparation=Preparation(normalize="none")))


def test_every_highlighted_class_has_a_color() -> None:
    assert len(CLASS_COLORS) == MAX_COLORS

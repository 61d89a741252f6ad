"""Pages of the screening commands: conclusions, figures with data, and pictures of wells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from screening.simulated_wells import simulate_wells

from perturbjax import dataset
from perturbjax.cli import main

from .screens import HOSTILE, Page, check_page

DOSES = [0.1, 0.3, 1.0, 3.0, 10.0]


@pytest.fixture(scope="module")
def screen(tmp_path_factory) -> tuple[str, str]:
    """A table of profiles with a hostile name, and a dataset with the images of its wells."""
    folder = tmp_path_factory.mktemp("screen")
    effects = {HOSTILE: 4.0, "inactive": 0.0}
    wells = simulate_wells(treatments=effects, plates=2, replicates=5, controls=12)
    metadata = wells.metadata.assign(
        Metadata_dose_uM=np.where(wells.control, np.nan, np.resize(DOSES, len(wells.control))),
        Metadata_moa=wells.treatment.map({HOSTILE: "m", "inactive": "m"}).fillna(""),
        n_cells=wells.cell_count,
    )
    values = wells.values.copy()
    # The strong treatment follows its dose.
    treated = (wells.treatment == HOSTILE).to_numpy()
    values[treated, 2] = 10 + 10 * np.log10(metadata["Metadata_dose_uM"][treated])
    features = pd.DataFrame(values, columns=list(wells.features))
    pd.concat([metadata, features], axis=1).to_csv(folder / "profiles.csv", index=False)
    rng = np.random.default_rng(0)
    mask = np.zeros((24, 24), np.uint16)
    mask[8:16, 8:16] = 1
    index = metadata.drop(columns="n_cells").astype(str)
    index.insert(0, "site_id", metadata["Metadata_Plate"] + metadata["Metadata_Well"])
    sites = (
        dataset.SitePixels(rng.integers(100, 9000, (24, 24, 2)).astype(np.uint16), mask)
        for _ in range(len(index))
    )
    dataset.write_dataset(
        folder / "data", index, sites, channel_names=["DNA", "ER"], image_dtype=np.uint16,
        label_column="Metadata_pert_iname", facts={"channels": ["DNA", "ER"]},
    )  # fmt: skip
    return str(folder / "profiles.csv"), str(folder / "data")


def page_of(screen, tmp_path, command, *words, data=True) -> tuple[Page, str]:
    table, images = screen
    given = ["--features", table, *(["--data", images] if data else [])]
    with pytest.raises(SystemExit) as end:
        main([command, *given, *words, "--out", str(tmp_path / "out")])
    assert not end.value.code
    text = (tmp_path / "out" / f"{command}.html").read_text()
    assert HOSTILE not in text
    check_page(Page(text), text)
    return Page(text), text


def test_hits_page_has_table_volcano_maps_and_pictures(screen, tmp_path):
    page, text = page_of(screen, tmp_path, "hits", "--permutations", "999")
    assert "1 of 2 treatments are active" in page.text
    for name in ("volcano", "plates"):
        assert page.data(name)
    links = [a["href"] for a in page.all("a") if (a["href"] or "").startswith("#treatment")]
    targets = {d["id"] for d in page.all("details", "class")}
    assert links and {link[1:] for link in links} == targets
    assert text.count('src="data:image/webp') >= 8


def test_hits_page_needs_no_images(screen, tmp_path):
    page, text = page_of(screen, tmp_path, "hits", "--permutations", "999", data=False)
    assert "data:image/webp" not in text and page.data("volcano")


def test_doses_page_has_curves_and_pictures_along_the_doses(screen, tmp_path):
    words = ("--dose-column", "Metadata_dose_uM", "--response", "feature_2")
    page, text = page_of(screen, tmp_path, "doses", *words)
    assert "1 of 2 treatments respond" in page.text
    assert text.count('role="img" aria-label="') == 2 and "EC50" in page.text
    assert all(f"{dose:g} µM" in page.text for dose in DOSES)


def test_similar_page_has_heat_map_neighbors_and_mechanisms(screen, tmp_path):
    page, text = page_of(screen, tmp_path, "similar", data=False)
    assert "data:image/png" in text and "nearest neighbor with the same mechanism" in page.text
    assert {t["id"] for t in page.all("table")} == {"neighbors", "enrichment"}


def test_differences_page_has_bars_and_pictures(screen, tmp_path):
    page, text = page_of(screen, tmp_path, "differences")
    assert "of 2 treatments change at least one feature" in page.text
    assert text.count('role="img" aria-label="') == 2 and "data:image/webp" in text

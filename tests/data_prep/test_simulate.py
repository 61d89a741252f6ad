"""Simulated plates: ground truth, images, reproducibility."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from data_prep.output import work_folder
from data_prep.simulate import SimulateConfig, simulate
from data_prep.simulate.cells import draw_site
from data_prep.simulate.layout import ASPECTS, ORGANIZATION, TRAITS, trait_values
from data_prep.simulate.plate import plan
from data_prep.simulate.screen import SCREEN
from perturbjax.core.errors import InputError

SMALL = {"plates": 1, "wells": 6, "sites": 1, "compounds": 2, "size": 64}


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_seed_determines_all_files(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        simulate(SimulateConfig(tmp_path / name, seed=seed, **SMALL))
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a if name.startswith("images"))


def test_additional_plates_do_not_change_the_first_ones():
    one, two = (plan(SimulateConfig(Path("unused"), plates=plates, wells=24)) for plates in (1, 2))
    pd.testing.assert_frame_equal(one, two.iloc[: len(one)])


def test_every_site_has_channels_masks_and_parameters(simulated):
    table = pd.read_csv(simulated / "load_data.csv", dtype=str)
    truth = pd.read_parquet(simulated / "truth/parameters.parquet")
    assert len(table) == len(truth) == 24
    for name in table["FileName_OrigDNA"]:
        stem = name.removesuffix("_DNA.tiff")
        nuclei = tifffile.imread(simulated / f"truth/{stem}_nuclei_mask.tiff")
        cells = tifffile.imread(simulated / f"truth/{stem}_cells_mask.tiff")
        dna = tifffile.imread(simulated / "images" / name[:6] / name)
        assert dna.dtype == np.uint16 and dna.shape == (64, 64)
        assert (cells[nuclei > 0] == nuclei[nuclei > 0]).all(), "nuclei must be inside their cells"
        assert dna[nuclei > 0].mean() > 2 * dna[cells == 0].mean()


def test_simulated_cells_touch(simulated):
    touching = 0
    for path in (simulated / "truth").glob("*_cells_mask.tiff"):
        mask = tifffile.imread(path)
        left, right = mask[:, :-1], mask[:, 1:]
        touching += ((left > 0) & (right > 0) & (left != right)).any()
    assert touching >= 18


def test_compounds_shift_three_aspects_by_the_effect():
    """The mean over many wells, in between-well standard deviations, equals the effect."""
    options = SimulateConfig(Path("unused"), plates=1, wells=384, sites=2, compounds=3, effect=2.0)
    truth = plan(options)
    deviation = np.log(truth[list(TRAITS)].to_numpy() / trait_values(np.zeros(len(TRAITS))))
    deviation = pd.DataFrame(
        deviation / np.log1p([trait.deviation for trait in TRAITS.values()]), columns=list(TRAITS)
    )
    wells = deviation.groupby(truth["Metadata_pert_iname"]).mean()
    wells = wells - wells.loc["DMSO"]
    shifts = truth.groupby("Metadata_pert_iname")[[f"shift_{name}" for name in TRAITS]].first()
    for compound in ("compound-01", "compound-02", "compound-03"):
        expected = shifts.loc[compound].to_numpy()
        shifted = {
            aspect
            for aspect, traits in ASPECTS.items()
            if shifts.loc[compound, f"shift_{traits[0]}"] != 0
        }
        assert len(shifted) == 3 and set(np.abs(expected)) == {0.0, 2.0}
        np.testing.assert_allclose(wells.loc[compound], expected, atol=0.75)
    assert (shifts.loc["DMSO"] == 0).all()


@pytest.mark.parametrize("compounds", [1, 5, 8])
def test_aspects_shift_all_their_traits_by_different_amounts(
    compounds,
):
    aspects = ("count", "texture")
    truth = plan(SimulateConfig(Path("unused"), compounds=compounds, effect=3.0, aspects=aspects))
    shifts = (
        truth.groupby("Metadata_pert_iname")[[f"shift_{name}" for name in TRAITS]]
        .first()
        .drop(index="DMSO")
    )
    shifted = [f"shift_{trait}" for aspect in aspects for trait in ASPECTS[aspect]]
    assert (shifts.drop(columns=shifted) == 0).all().all()
    spacing = 12 / (2 * -(-compounds // 2) - 1)  # from -6 to 6, two compounds a mechanism
    for trait in shifted:
        levels = shifts[trait].to_numpy()
        assert np.abs(levels).max() <= 6 + 1e-9
        assert (np.diff(np.sort(levels)) >= spacing - 1e-9).all()
        np.testing.assert_allclose(
            np.abs(np.diff(levels)[::2]), spacing
        )  # a mechanism's are neighbours


def test_screen_has_named_effects_an_inactive_treatment_and_empty_wells():
    options = SimulateConfig(Path("unused"), plates=2, wells=48, effect=3.0, design="screen")
    truth = plan(options)
    wells = truth.drop_duplicates(["Metadata_Plate", "Metadata_Well"])
    counts = wells["Metadata_pert_iname"].value_counts()
    assert set(counts.index) == {"DMSO", *SCREEN, "empty"}
    assert counts["DMSO"] == 16 and counts["empty"] == 4
    rows = truth.groupby("Metadata_pert_iname")
    shifts = rows[[f"shift_{name}" for name in (*TRAITS, *ORGANIZATION)]].first()
    assert (shifts.loc[["DMSO", "inactive"]] == 0).all(axis=None)
    # Only the toxic treatment changes the count, and no treatment changes the brightness.
    assert (shifts["shift_count"] < 0).to_dict() == {name: name == "toxic" for name in shifts.index}
    assert (shifts[["shift_dna", "shift_actin", "shift_tubulin"]] == 0).all(axis=None)
    assert rows["polarity"].mean()["polarize"] == pytest.approx(3.9 * 0.1)
    assert (truth["count"] == 0).equals(truth["Metadata_pert_iname"] == "empty")


@pytest.mark.parametrize("trait", [{"polarity": 0.4}, {"strands": 4.0}, {"grain": 2.0}])
def test_organization_changes_the_image_and_not_its_brightness(trait):
    typical = dict(zip(TRAITS, trait_values(np.zeros(len(TRAITS))), strict=True))
    before = [draw_site(typical, 96, np.random.default_rng(k)) for k in range(4)]
    after = [draw_site(typical | trait, 96, np.random.default_rng(k)) for k in range(4)]
    assert all((a.image != b.image).any() for a, b in zip(after, before, strict=True))
    means = [np.mean([drawn.image.mean() for drawn in drawings]) for drawings in (before, after)]
    assert means[1] == pytest.approx(means[0], rel=0.05)


def test_site_without_cells_is_background():
    typical = dict(zip(TRAITS, trait_values(np.zeros(len(TRAITS))), strict=True))
    drawn = draw_site(typical | {"count": 0.0}, 48, np.random.default_rng(0))
    assert drawn.cells.max() == drawn.nuclei.max() == 0 and 300 < drawn.image.mean() < 600


def test_position_gradient_is_independent_of_treatments():
    options = SimulateConfig(
        Path("unused"), plates=1, wells=96, sites=1, effect=0.0, position_gradient=8.0
    )
    truth = plan(options)
    assert (truth[[column for column in truth if column.startswith("shift_")]] == 0).all().all()
    row = truth["Metadata_Well"].str[0].map(ord)
    assert abs(np.corrcoef(row, np.log(truth["dna"]))[0, 1]) > 0.6
    flat = plan(SimulateConfig(Path("unused"), plates=1, wells=96, sites=1, effect=0.0))
    assert abs(np.corrcoef(row, np.log(flat["dna"]))[0, 1]) < 0.4


def test_shared_layout_uses_one_layout_on_all_plates():
    def layouts(shared: bool) -> list[tuple]:
        truth = plan(
            SimulateConfig(Path("unused"), plates=2, wells=24, sites=1, shared_layout=shared)
        )
        return [tuple(rows["Metadata_pert_iname"]) for _, rows in truth.groupby("Metadata_Plate")]

    first, second = layouts(shared=True)
    assert first == second
    first, second = layouts(shared=False)
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize(
    ("trait", "factor", "measure"),
    [
        ("count", 2.0, lambda drawn: drawn.nuclei.max()),
        ("nucleus_radius", 1.3, lambda drawn: (drawn.nuclei > 0).sum() / drawn.nuclei.max()),
        ("dna", 1.5, lambda drawn: drawn.image[..., 0][drawn.nuclei > 0].mean()),
        ("actin", 1.5, lambda drawn: drawn.image[..., 1][drawn.cells > 0].mean()),
        ("tubulin", 1.5, lambda drawn: drawn.image[..., 2][drawn.cells > 0].mean()),
        ("granularity", 2.0, lambda drawn: drawn.image[..., 0][drawn.nuclei > 0].std()),
    ],
)
def test_traits_change_the_image(trait, factor, measure):
    typical = dict(zip(TRAITS, trait_values(np.zeros(len(TRAITS))), strict=True))
    changed = {**typical, trait: typical[trait] * factor}
    pairs = [
        (
            measure(draw_site(typical, 96, np.random.default_rng(k))),
            measure(draw_site(changed, 96, np.random.default_rng(k))),
        )
        for k in range(6)
    ]
    low, high = np.mean(pairs, axis=0)
    assert high > 1.15 * low


def test_simulate_refuses_invalid_numbers_and_existing_output(refused, tmp_path):
    assert "--wells 1: must be from 2 to 1536" in refused(
        "simulate", "--out", tmp_path / "x", "--wells", 1
    )
    assert "--wells 12" in refused(
        "simulate", "--out", tmp_path / "x", "--design", "screen", "--wells", 12
    )
    assert "colour" in refused("simulate", "--out", tmp_path / "x", "--aspects", "colour")
    assert "--compounds 96" in refused("simulate", "--out", tmp_path / "x", "--compounds", 96)
    (tmp_path / "y").mkdir()
    assert "already exists" in refused("simulate", "--out", tmp_path / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_simulate_is_idempotent(refused, tmp_path, capsys):
    options = SimulateConfig(
        out=tmp_path / "x", plates=1, wells=2, sites=1, compounds=1, size=32, aspects=("shape",)
    )
    simulate(options)
    (tmp_path / ".x.simulating").mkdir()  # left by a kill after the last rename
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    simulate(options)
    assert "already contains this simulation" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(InputError, match="already exists"):
        simulate(replace(options, seed=1))


def test_two_simulations_of_one_output_exclude_each_other(refused, tmp_path):
    with work_folder(tmp_path / "x", "simulating"):
        assert "another process is simulating this output" in refused(
            "simulate", "--out", tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()

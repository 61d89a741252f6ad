"""The experiments on classical models run whole, small, and their controls of position mean what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import cpjump1_profiles, paper_embeddings
from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.profiles.image_inputs import AdaptConfig


def write_screen(folder: Path, *, place: float, treatment: float, seed: int = 0) -> Path:
    """Four plates of one layout: 8 controls, 4 compounds in two wells, 8 in one; features of place and treatment."""
    rng = np.random.default_rng(seed)
    names = ["DMSO"] * 8 + [f"twice {i}" for i in range(4)] * 2 + [f"once {i}" for i in range(8)]
    of_place = place * rng.normal(size=(24, 10))
    centres = {name: treatment * rng.normal(size=10) for name in names}
    folder.mkdir()
    for plate in range(4):
        values = of_place + np.array([centres[name] for name in names]) + rng.normal(size=(24, 10))
        table = pd.DataFrame(values, columns=[f"Cells_{i}" for i in range(10)])
        table.insert(0, "Metadata_Plate", f"P{plate}")
        table.insert(1, "Metadata_Well", [f"{'ABCD'[i // 6]}{i % 6 + 1:02d}" for i in range(24)])
        table.insert(2, "Metadata_pert_iname", names)
        table.insert(
            3, "Metadata_control_type", ["negcon" if name == "DMSO" else "" for name in names]
        )
        table.to_csv(folder / f"P{plate}.csv.gz", index=False)
    return folder


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = (*cpjump1_profiles.UNTUNED, "robust, plda")
    monkeypatch.setattr(
        cpjump1_profiles, "CANDIDATES", {k: cpjump1_profiles.CANDIDATES[k] for k in keep}
    )


@pytest.mark.slow
def test_every_plate_is_held_out_and_a_candidate_chosen(
    tmp_path: Path, few_candidates: None
) -> None:
    data = write_screen(tmp_path / "data", place=0.0, treatment=4.0)
    cpjump1_profiles.main(cpjump1_profiles.Config(data, tmp_path / "out"))
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index(["level", "model"])
    chosen = table.loc[("site", cpjump1_profiles.CHOSEN)]
    assert chosen["n"] == 96 and chosen["accuracy"] > 0.7
    assert chosen["accuracy"] == table.loc[("site", "robust, plda"), "accuracy"], (
        "the only one that competes"
    )
    assert table.loc[("site", "position"), "accuracy"] == 1
    position = pd.read_csv(tmp_path / "out" / "position.csv").set_index("subject")["accuracy"]
    assert position["trained on the other well"] > 0.7
    assert position["plda"] < 0.5


def test_position_controls_find_what_only_the_place_says(tmp_path: Path) -> None:
    data = write_screen(tmp_path / "data", place=4.0, treatment=0.0)
    (tmp_path / "out").mkdir()
    files = tuple(sorted(data.glob("*.csv.gz")))
    controls = {
        row["subject"]: row["accuracy"]
        for row in cpjump1_profiles.well_from_controls(files, tmp_path / "out")
    }
    assert controls["plda"] > 0.7 > 0.3 > controls["chance"]
    wells = {
        row["subject"]: row["accuracy"]
        for row in cpjump1_profiles.other_well(files, tmp_path / "out")
    }
    assert wells["trained on the same well"] > 0.7 and wells["trained on the other well"] < 0.3


def test_a_folder_without_plates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 profile files"):
        cpjump1_profiles.main(cpjump1_profiles.Config(tmp_path, tmp_path / "out"))


def test_a_backbone_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--backbones resnet50: write BACKBONE=WEIGHTS"):
        paper_embeddings.main(paper_embeddings.Config(tmp_path, tmp_path / "out", ("resnet50",)))


@pytest.mark.slow
def test_the_originals_table_and_figures_are_made_from_a_dataset(tmp_path: Path) -> None:
    from published import write_resnet18
    from tiny_dataset import write_dataset

    data = write_dataset(tmp_path / "data", sites=26, size=40, channels=["DNA"])
    weights = write_resnet18(tmp_path / "resnet18.safetensors")
    options = paper_embeddings.Config(
        data,
        tmp_path / "out",
        (f"resnet18={weights}",),
        split=SplitConfig("site", folds=2),
        adapt=AdaptConfig(size=32),
    )
    paper_embeddings.main(options)
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert set(paper_embeddings.MODELS) < set(table["model"])
    for name in ("umap_resnet18.png", "tsne_resnet18.html", "resnet18.parquet"):
        assert (tmp_path / "out" / name).stat().st_size > 0

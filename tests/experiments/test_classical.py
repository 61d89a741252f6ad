"""Experiments with classical models, complete on small data, and their position controls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import cpjump1_profiles, paper_embeddings
from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.profiles.image_inputs import AdaptConfig

pytestmark = pytest.mark.full


def write_screen(folder: Path, *, position: float, treatment: float, seed: int = 0) -> Path:
    """Write four plates of one layout with effects of position and treatment on the features.

    Each plate has 8 controls, 4 compounds in two wells and 8 compounds in one well.
    """
    rng = np.random.default_rng(seed)
    names = ["DMSO"] * 8 + [f"twice {i}" for i in range(4)] * 2 + [f"once {i}" for i in range(8)]
    offsets = position * rng.normal(size=(24, 10))
    centers = {name: treatment * rng.normal(size=10) for name in names}
    folder.mkdir()
    for plate in range(4):
        values = offsets + np.array([centers[name] for name in names]) + rng.normal(size=(24, 10))
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
def test_cpjump1_tests_every_plate_and_chooses_a_candidate(
    tmp_path: Path, few_candidates: None
) -> None:
    data = write_screen(tmp_path / "data", position=0.0, treatment=4.0)
    cpjump1_profiles.main(cpjump1_profiles.Config(data, tmp_path / "out"))
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index(["level", "model"])
    chosen = table.loc[("site", cpjump1_profiles.CHOSEN)]
    assert chosen["n"] == 96 and chosen["accuracy"] > 0.7
    # The only candidate with tuning.
    assert chosen["accuracy"] == table.loc[("site", "robust, plda"), "accuracy"]
    assert table.loc[("site", "position"), "accuracy"] == 1
    position = pd.read_csv(tmp_path / "out" / "position.csv").set_index("model")["accuracy"]
    assert position["trained on the other well"] > 0.7
    assert position["plda"] < 0.5


def test_position_controls_detect_effects_of_position(tmp_path: Path) -> None:
    data = write_screen(tmp_path / "data", position=4.0, treatment=0.0)
    (tmp_path / "out").mkdir()
    files = tuple(sorted(data.glob("*.csv.gz")))
    rows = cpjump1_profiles.classify_positions(files, tmp_path / "out")
    controls = {row["model"]: row["accuracy"] for row in rows}
    assert controls["plda"] > 0.7 > 0.3 > controls["chance"]
    rows = cpjump1_profiles.compare_wells(files, tmp_path / "out")
    wells = {row["model"]: row["accuracy"] for row in rows}
    assert wells["trained on the same well"] > 0.7 and wells["trained on the other well"] < 0.3


def test_cpjump1_refuses_a_folder_without_plates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 0 profile files"):
        cpjump1_profiles.main(cpjump1_profiles.Config(tmp_path, tmp_path / "out"))


def test_paper_embeddings_refuses_a_backbone_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--backbones resnet50: has no weights"):
        paper_embeddings.main(paper_embeddings.Config(tmp_path, tmp_path / "out", ("resnet50",)))


@pytest.mark.slow
def test_paper_embeddings_writes_table_and_figures(tmp_path: Path) -> None:
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

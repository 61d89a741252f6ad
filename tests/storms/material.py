"""What the storms spoil: a small plate, its dataset, a run, tables and weights, made once by the real commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.storms.arena import Arena, Order

SIMULATED = (*("--plates", 2, "--wells", 6, "--sites", 2), *("--compounds", 2, "--size", 48, "--effect", 3))
TRAINED = (*("--crop", 16, "--batch-size", 8, "--epochs", 4, "--folds", 2), *("--split", "well", "--evaluate-every", 2))
BUILT = ("--workers", 1, "--segmenter", "watershed", "--segment-channels", "DNA")


@dataclass(frozen=True)
class Material:
    """Folders and files that are whole; never written to again."""

    plates: Path
    dataset: Path
    run: Path
    split: Path
    features: Path
    weights: Path
    safetensors: Path


def make_material(arena: Arena, root: Path) -> Material:
    """Simulate, build, train, judge, split and export, each of which must succeed."""
    made = Material(
        plates=root / "plates",
        dataset=root / "dataset",
        run=root / "run",
        split=root / "split.parquet",
        features=root / "run" / "evaluation" / "features.parquet",
        weights=root / "weights.pth",
        safetensors=root / "weights.safetensors",
    )
    plates = ("--load-data", made.plates / "load_data.csv", "--images", made.plates)
    for command in (
        ("data_prep", "simulate", "--out", made.plates, *SIMULATED),
        ("data_prep", "build", *plates, "--out", made.dataset, *BUILT),
        ("perturbjax", "train", "--data", made.dataset, "--out", made.run, *TRAINED),
        ("perturbjax", "evaluate", "--run", made.run, "--replicates", 50),
        ("perturbjax", "split", "--data", made.dataset, "--out", made.split, "--folds", 2),
        ("perturbjax", "export-torch", "--run", made.run, "--out", made.weights),
        ("perturbjax", "export-torch", "--run", made.run, "--out", made.safetensors),
    ):
        ended = arena.run(Order(command, root))
        assert ended.status == 0, f"{command}: {ended.stderr}"
    return made

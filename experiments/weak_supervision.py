"""Fine-tune a pretrained backbone with compounds as labels; match compounds without training.

    python -m experiments.weak_supervision --data DATASET --out runs/weak_supervision

The compounds of each mechanism are divided into three folds. Each fold is left out once: a network
with pretrained weights is fine-tuned on the cells of the remaining compounds, with the compound as
label (weak supervision, as in DeepProfiler, doi:10.1038/s41467-024-45999-1). Its features of all
wells and those of the frozen backbone are then compared: a treatment is matched if its nearest
neighbor among the treatments of other compounds has the same mechanism (NSC, see
`experiments.bbbc021_mechanisms`). Only treatments of left-out compounds are counted.
`share` is the fraction of the remaining compounds that are used for training. Intervals (95 %)
resample compounds.

Cost: 2 to 10 minutes per fold and share on BBBC021, and 20 minutes for the frozen features (two
cores, next to other jobs). Result: docs/presets.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.bbbc021_mechanisms import (
    COMPOUND,
    MOA,
    VEHICLE,
    interval,
    match,
    read_table,
    z_score_to_all_wells,
)
from experiments.runs import command
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.options import require, require_output, require_sound
from perturbjax.dataset import Dataset, open_dataset

FOLDS, REPLICATES = 3, 2000
BACKBONE = ("--backbone", "efficientnet_lite0", "--weights", "package:efficientnet_lite0")
#: Frozen features: those of preset linear, and those of the layer that fine-tuning changes most.
FROZEN = {
    "frozen, stages": ("--pool", "stages", "--size", 128, "--augmentations", 4),
    "frozen, last layer": ("--pool", "last", "--size", 128, "--augmentations", 4),
}
TRAIN = (
    *("--preset", "cells", "--model", "efficientnet_lite0"),
    *("--weights", "package:efficientnet_lite0", "--head", "dense", "--normalize", "plate"),
    *("--freeze-epochs", 3, "--learning-rate", 0.003, "--crop", 64),
    *("--label-column", COMPOUND, "--split", "site", "--folds", 10),
)


@dataclass(frozen=True)
class Config:
    """Measure fine-tuning with treatments as labels."""

    data: Path
    """Dataset with compound, concentration and mechanism."""
    out: Path
    """Folder for runs, features and weak_supervision.csv."""
    shares: tuple[float, ...] = (0.5, 1.0)
    """Fractions of the remaining compounds that are used for training."""
    epochs: int = 20
    """Epochs of each training."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        sound = all(0 < share <= 1 for share in self.shares)
        require("shares", self.shares, sound, "fractions above 0 and up to 1")


def main(options: Config) -> None:
    """Train, extract features, match; write and print the table."""
    dataset = open_dataset(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    folds = divide_compounds(dataset)
    # Matches of the treatments of all folds, by representation and share.
    matches: dict[tuple[str, float], list[pd.DataFrame]] = {}
    for name, flags in FROZEN.items():
        path = options.out / f"{name.replace(', ', '_').replace(' ', '_')}.parquet"
        extract(options.data, path, *BACKBONE, *flags)
        matches[name, 0.0] = [match_compounds(path, left_out) for left_out in folds]
    for share in options.shares:
        for fold, left_out in enumerate(folds):
            folder = options.out / f"share_{share}_fold_{fold}"
            folder.mkdir(exist_ok=True)
            train(options, folder, left_out, share, fold)
            path = folder / "features.parquet"
            extract(options.data, path, "--run", folder / "run")
            matches.setdefault(("fine-tuned", share), []).append(match_compounds(path, left_out))
    rows = [summarize(*key, pd.concat(parts)) for key, parts in matches.items()]
    table = pd.DataFrame(rows)
    table.to_csv(options.out / "weak_supervision.csv", index=False)
    print(table.round(3).to_string(index=False))


def divide_compounds(dataset: Dataset) -> list[list[str]]:
    """Divide the compounds of each mechanism into folds."""
    index = dataset.index.loc[dataset.index[COMPOUND] != VEHICLE, [MOA, COMPOUND]]
    compounds = index.drop_duplicates().sort_values([MOA, COMPOUND])
    number = compounds.groupby(MOA).cumcount() % FOLDS
    return [compounds.loc[number == fold, COMPOUND].tolist() for fold in range(FOLDS)]


def train(options: Config, folder: Path, left_out: list[str], share: float, fold: int) -> None:
    """Fine-tune the backbone on cells of a share of the remaining compounds."""
    index = open_dataset(options.data).index
    remaining = sorted(set(index[COMPOUND]) - {VEHICLE, *left_out})
    order = np.random.default_rng(fold).permutation(len(remaining))
    unused = [remaining[number] for number in order[round(share * len(remaining)) :]]
    rules = folder / "exclude.txt"
    rules.write_text("".join(f"{COMPOUND}=={name}\n" for name in [*left_out, *unused]))
    flags = ("--epochs", options.epochs, "--exclude", rules, "--out", folder / "run")
    command("perturbjax.cli", "train", "--data", options.data, *TRAIN, *flags)


def extract(data: Path, path: Path, *flags: object) -> None:
    """Extract features of wells, unless the table exists."""
    if not path.exists():
        words = ("features", "--data", data, "--level", "well", "--out", path)
        command("perturbjax.cli", *words, *flags)


def match_compounds(path: Path, compounds: list[str]) -> pd.DataFrame:
    """Match the treatments with these compounds to all treatments of other compounds."""
    treatments, values = z_score_to_all_wells(read_table(path))
    matches = match(treatments, values, other_week=False)
    return matches[matches[COMPOUND].isin(compounds) & (matches["chance"] > 0)]


def summarize(name: str, share: float, matches: pd.DataFrame) -> dict[str, object]:
    """Return a row of the table."""
    low, high = interval(matches, REPLICATES)
    return {
        "features": name,
        "share": share,
        "treatments": len(matches),
        "NSC": matches["right"].mean(),
        "low": low,
        "high": high,
        "chance": matches["chance"].mean(),
    }


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__)))

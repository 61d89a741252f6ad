"""Options of `perturbjax audit` and `perturbjax compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perturbjax.core.config import SplitPolicy
from perturbjax.core.options import (
    positional,
    python_only,
    require,
    require_output,
    require_seed,
    require_sound,
)
from perturbjax.profiles.profile_options import Preparation, SourceConfig, prepare_option


@dataclass(frozen=True)
class AuditConfig:
    """Measure the signal beyond technical covariates: one model under every split, next to its
    controls."""

    out: Path
    """Folder for audit.json, audit.csv and audit.html."""
    features: tuple[Path, ...] = ()
    """Feature tables (.parquet or .csv); tables of the same sites are joined. With --data, its cell
    counts and intensities serve as controls."""
    run: Path | None = None
    """Evaluated run: audit its network on its own split."""
    train: bool = False
    """With --run: retrain its recipe on every fold of every split; runs are stored in OUT/runs."""
    label_column: str = ""
    """Metadata column of the classes; by default that of the dataset, else Metadata_pert_iname."""
    model: str = "lda"
    """Classifier, one of `perturbjax classify --models`."""
    preparation: Preparation = prepare_option("training-pca")
    """Preparation of the profiles."""
    source: SourceConfig = SourceConfig()
    untrained: bool = False
    """Add the features of the untrained network as a control, with --data or --run; extracts
    features again."""
    splits: tuple[SplitPolicy, ...] = ()
    """Splits to test; by default all that the data allow."""
    folds: int = 5
    """Number of folds; fewer if there are fewer groups."""
    resample: Literal["well", "plate"] = "well"
    """Unit of the bootstrap. plate: wider intervals; needs many plates."""
    replicates: int = 1000
    """Bootstrap resamples of each interval and label permutations of each p-value."""
    seed: int = python_only(0)
    """Random seed of folds, bootstrap and permutations."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        run, features, data = self.run is not None, bool(self.features), bool(self.source.data)
        require("features", "(none)", features or data or run, "set, or --data, or --run")
        require("run", self.run, not (run and features), "used without --features")
        require("train", self.train, run or not self.train, "used with --run")
        untrained = not (self.untrained and features)
        require("untrained", self.untrained, untrained, "used without --features")
        splits = not self.splits or not run or self.train
        require("splits", self.splits, splits, "left out with --run, unless with --train")
        require("folds", self.folds, self.folds >= 2, "2 or more")
        require("replicates", self.replicates, self.replicates >= 100, "100 or more")
        require_seed(self.seed)


@dataclass(frozen=True)
class CompareConfig:
    """Compare models that were evaluated on the same sites."""

    out: Path
    """Folder for compare.json, compare.csv and compare.html."""
    runs: tuple[Path, ...] = positional()
    """Two or more evaluated runs or prediction tables; the first is the reference."""
    resample: Literal["well", "plate"] = "well"
    """Unit of the bootstrap."""
    replicates: int = python_only(2000)
    """Bootstrap resamples of each interval."""
    seed: int = python_only(0)
    """Random seed of the bootstrap."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("replicates", self.replicates, self.replicates >= 100, "100 or more")
        require_seed(self.seed)

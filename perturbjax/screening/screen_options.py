"""Options of the screening commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from perturbjax.core.errors import InputError
from perturbjax.core.options import require, require_output, require_seed, require_sound
from perturbjax.profiles.profile_options import ProfileConfig, SourceConfig

Restriction = Literal["none", "plate", "position", "layout"]


@dataclass(frozen=True)
class ScreenConfig:
    """Profiles and controls"""

    features: tuple[Path, ...] = ()
    """Tables of profiles (.parquet, .csv, .tsv or .h5ad), per well, site or cell."""
    data: tuple[Path, ...] = ()
    """Dataset directories, in place of --features; ImageNet features are extracted."""
    run: Path | None = None
    """Evaluated run directory, in place of --features: the features of its network."""
    label_column: str = ""
    """Column with the treatment; by default that of --data, else Metadata_pert_iname."""
    negcon: str = ""
    """Negative controls as COLUMN=VALUE; by default Metadata_control_type=negcon, else wells named
    like a vehicle (DMSO, untreated)."""

    def __post_init__(self) -> None:
        require_sound(self)
        given = sum(map(bool, (self.features, self.data, self.run)))
        if given != 1:
            raise InputError("--features, --data, --run: pass exactly one of the three")
        column, _, value = self.negcon.partition("=")
        is_pair = not self.negcon or bool(column and value)
        require("negcon", self.negcon, is_pair, "COLUMN=VALUE")

    def profile_config(self) -> ProfileConfig:
        """The same input in the form that `perturbjax.profiles` reads."""
        features = self.features
        if self.run is not None:
            features = (self.run / "evaluation" / "features.parquet",)
        # The same features as in `classify --preset linear`.
        source = SourceConfig(data=self.data, pool="stages", augmentations=4, statistics=True)
        return ProfileConfig(
            features=features,
            source=source if self.data else SourceConfig(),
            label_column=self.label_column,
            aggregate="median",
        )


@dataclass(frozen=True)
class HitsConfig:
    """Find the treatments that differ from the negative controls."""

    screen: ScreenConfig
    out: Path
    """Folder for hits.csv, hits.parquet and summary.json."""
    dose_column: str = ""
    """Column with the dose; each dose is then tested as a treatment of its own."""
    fdr: float = 0.05
    """False discovery rate of each method, greater than 0 and less than 1."""
    permutations: int = 20_000
    """Maximum number of permutations per test, 999 or more."""
    seed: int = 0
    """Seed of the permutations."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("fdr", self.fdr, 0 < self.fdr < 1, "greater than 0 and less than 1")
        require("permutations", self.permutations, self.permutations >= 999, "999 or more")
        require_seed(self.seed)


@dataclass(frozen=True)
class DosesConfig:
    """Fit dose-response curves and find the lowest effective doses."""

    screen: ScreenConfig
    out: Path
    """Folder for doses.csv and wells.csv."""
    dose_column: str
    """Column with the concentration, such as Metadata_concentration_uM."""
    response: str = "distance"
    """distance: from the negative controls, in standard deviations. cell_count, or the name of a
    feature."""
    baseline: Path | None = None
    """Table of the same wells before treatment; the response is then the ratio to it."""
    seed: int = 0
    """Seed of permutations and resamples."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require_seed(self.seed)


@dataclass(frozen=True)
class SimilarConfig:
    """Find similar treatments and clusters of treatments."""

    screen: ScreenConfig
    out: Path
    """Folder for neighbors.csv, similarity.csv and enrichment.csv."""
    restriction: Restriction = "none"
    """Compare only wells that do not share this."""
    neighbors: int = 5
    """Neighbors per treatment, 1 or more."""
    mechanism_column: str = "Metadata_moa"
    """Column with the mechanism, tested for enrichment among the neighbors if it exists."""
    seed: int = 0
    """Seed of the random control profiles."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("neighbors", self.neighbors, self.neighbors >= 1, "1 or more")
        require_seed(self.seed)


@dataclass(frozen=True)
class DifferencesConfig:
    """Describe which features of the cells a treatment changes."""

    screen: ScreenConfig
    out: Path
    """Folder for differences.csv, groups.csv and summary.csv."""
    treatments: tuple[str, ...] = ()
    """Names of treatments; by default all."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)

"""Options of the screening commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.core.options import (
    python_only,
    require,
    require_output,
    require_seed,
    require_sound,
)
from perturbjax.profiles.profile_options import LINEAR_SOURCE, ProfileConfig, SourceConfig

#: Ending of an output file in place of a folder.
H5AD = ".h5ad"
#: Properties that two compared wells may not share; a metadata column is possible too.
RESTRICTIONS = ("none", "plate", "position", "layout")


@dataclass(frozen=True)
class ScreenConfig:
    """Profiles and controls"""

    features: tuple[Path, ...] = ()
    """Tables of profiles (.parquet, .csv, .tsv or .h5ad), per well, site or cell."""
    data: tuple[Path, ...] = ()
    """Dataset directories. With --features they give the pictures; without, ImageNet features of
    each channel are extracted."""
    run: Path | None = None
    """Evaluated run directory: the features of its network."""
    label_column: str = ""
    """Column with the treatment; by default that of --data, else Metadata_pert_iname."""
    negcon: str = ""
    """Negative controls as COLUMN=VALUE; by default Metadata_control_type=negcon, else wells named
    like a vehicle (DMSO, untreated)."""

    feature_cache: str = python_only("", env="PERTURBJAX_FEATURE_CACHE")
    """Folder of cached features; empty: a folder in the user cache."""

    def __post_init__(self) -> None:
        require_sound(self)
        if bool(self.features or self.data) == (self.run is not None):
            raise InputError(
                "--features, --data, --run: pass --run, or the other two or one of them"
            )
        _require_pair("negcon", self.negcon)

    def profile_config(self) -> ProfileConfig:
        """The same input in the form that `perturbjax.profiles` reads."""
        features = self.features
        if self.run is not None:
            features = (self.run / "evaluation" / "features.parquet",)
        # The same features as in `classify --preset linear`.
        source = SourceConfig(data=self.data, feature_cache=self.feature_cache, **LINEAR_SOURCE)
        return ProfileConfig(
            features=features,
            source=SourceConfig() if features else source,
            label_column=self.label_column,
            aggregate="median",
        )


def _require_pair(flag: str, text: str) -> None:
    column, _, value = text.partition("=")
    require(flag, text, not text or bool(column and value), "COLUMN=VALUE")


def _require_tables(out: Path) -> None:
    require_output(out, *([H5AD] if out.suffix == H5AD else []))


@dataclass(frozen=True)
class HitsConfig:
    """Find the treatments that differ from the negative controls."""

    screen: ScreenConfig
    out: Path
    """Folder for hits.html, hits.csv, hits.parquet and summary.json; or an .h5ad file."""
    poscon: str = ""
    """Positive controls as COLUMN=VALUE; by default Metadata_control_type=poscon."""
    dose_column: str = ""
    """Column with the dose; each dose is then tested as a treatment of its own."""
    fdr: float = 0.05
    """False discovery rate of each method, greater than 0 and less than 1."""
    permutations: int = 20_000
    """Maximum number of permutations per test, 999 or more."""
    seed: int = python_only(0)
    """Seed of the permutations."""

    def __post_init__(self) -> None:
        require_sound(self)
        _require_tables(self.out)
        _require_pair("poscon", self.poscon)
        require("fdr", self.fdr, 0 < self.fdr < 1, "greater than 0 and less than 1")
        require("permutations", self.permutations, self.permutations >= 999, "999 or more")
        require_seed(self.seed)


@dataclass(frozen=True)
class DosesConfig:
    """Fit dose-response curves and find the lowest effective doses."""

    screen: ScreenConfig
    out: Path
    """Folder for doses.html, doses.csv and wells.csv; or an .h5ad file."""
    dose_column: str
    """Column with the concentration, such as Metadata_concentration_uM."""
    response: str = "distance"
    """distance: from the negative controls, in standard deviations. cell_count, or the name of a
    feature."""
    baseline: Path | None = None
    """Table of the same wells before treatment; the response is then the ratio to it."""
    seed: int = python_only(0)
    """Seed of permutations and resamples."""

    def __post_init__(self) -> None:
        require_sound(self)
        _require_tables(self.out)
        require_seed(self.seed)


@dataclass(frozen=True)
class SimilarConfig:
    """Find similar treatments and clusters of treatments."""

    screen: ScreenConfig
    out: Path
    """Folder for similar.html, neighbors.csv, similarity.csv and enrichment.csv; or an .h5ad
    file."""
    restriction: str = "none"
    """Compare only wells that do not share this: none, plate, position, layout, or a metadata
    column such as Metadata_Batch, which is then the batch of NSCB."""
    reference: tuple[Path, ...] = ()
    """Tables of other profiles with the same features, in which neighbors are searched."""
    dose_column: str = ""
    """Column with the dose. Each dose is then a treatment, and neighbors are other compounds."""
    neighbors: int = 5
    """Neighbors per treatment, 1 or more."""
    mechanism_column: str = "Metadata_moa"
    """Column with the mechanism, if there is one: enrichment among the neighbors, NSC and NSCB."""
    seed: int = python_only(0)
    """Seed of the random control profiles."""

    def __post_init__(self) -> None:
        require_sound(self)
        _require_tables(self.out)
        is_valid = self.restriction in RESTRICTIONS or self.restriction.startswith("Metadata_")
        choices = f"one of {', '.join(RESTRICTIONS)}, or a column Metadata_..."
        require("restriction", self.restriction, is_valid, choices)
        require("neighbors", self.neighbors, self.neighbors >= 1, "1 or more")
        require_seed(self.seed)


@dataclass(frozen=True)
class DifferencesConfig:
    """Describe which features of the cells a treatment changes."""

    screen: ScreenConfig
    out: Path
    """Folder for differences.html, differences.csv, groups.csv and summary.csv; or an .h5ad
    file."""
    treatments: tuple[str, ...] = ()
    """Names of treatments; by default all."""

    def __post_init__(self) -> None:
        require_sound(self)
        _require_tables(self.out)

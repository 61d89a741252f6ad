"""Options of classical classifiers and embeddings, and the named preparations of profiles."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perturbjax.core.choices import Choice
from perturbjax.core.config import (
    DEFAULT_SUMMARY,
    LINEAR_COMPONENTS,
    LINEAR_VARIANCE,
    Pool,
    SplitConfig,
    Summary,
)
from perturbjax.core.errors import InputError
from perturbjax.core.options import (
    only_flags,
    parsed_by,
    python_only,
    read_toml,
    replace_fields,
    require,
    require_output,
    require_seed,
    require_sound,
)

Scale = Literal["none", "standardize", "robustize"]
Reference = Literal["all", "negcon"]
ScaleBy = Literal["plate", "training"]
Outliers = Literal["none", "clip", "arcsinh"]
Relative = Literal["none", "auto", "negcon", "plate"]
Alignment = Literal["none", "coral", "combat"]
Whitening = Literal["zca", "zca_cor", "pca_cor"]
Aggregation = Literal["none", "median", "mean"]
EmbedMethod = Literal["umap", "tsne"]
Criterion = Literal["accuracy", "balanced_accuracy"]
SourceUnit = Literal["auto", "site", "tile", "cell"]
#: `--hold-out` value: each plate in turn.
EACH = "each"
#: Number of distinct colors of an embedding (`core.colours.CLASS_COLORS`).
MAX_COLORS = 16


@dataclass(frozen=True)
class Preparation:
    """Preparation of profiles before a classifier or an embedding; the steps run in the order of
    the fields."""

    normalize: Scale = "standardize"
    """Center and scale. standardize: mean and standard deviation. robustize: median and MAD."""
    normalize_by: ScaleBy = "plate"
    """plate: statistics of each plate. training: one set of statistics of all training rows."""
    normalize_to: Reference = "all"
    """Rows of the statistics: all, or the negative controls (each plate must have some)."""
    outliers: Outliers = "clip"
    """Extreme values. clip: limit to ±10 standard deviations. arcsinh: compress. none: keep."""
    select: bool = False
    """Drop features whose correlation with another feature exceeds `correlation`."""
    correlation: float = 0.9
    """Maximum absolute correlation between two features, in (0, 1]."""
    sphere: Literal["none", "train", "negcon"] = "none"
    """Sphere (whiten) with the covariance of all training rows or of their negative controls."""
    sphere_method: Whitening = "zca_cor"
    """Whitening method; pca_cor replaces features by components."""
    sphere_regularization: float = 1.0
    """Added to the eigenvalues of sphering and of CORAL, in units of their mean, > 0."""
    align: Alignment = "none"
    """Batch correction to the training plates. coral: match covariances (after sphering to negative
    controls this is TVN). combat: match mean and scale of each feature with empirical Bayes."""
    align_to: Reference = "negcon"
    """Rows of the batch correction: negative controls, or all if every plate has the same
    treatments."""
    pca: int = 0
    """Number of principal components of the features; 0 keeps all features."""
    pca_variance: float = 0.0
    """Total variance that the components, and the site statistics, are each scaled to; 0 does not
    scale."""
    relative: Relative = "none"
    """Append features relative to their plate. negcon: minus the mean of its negative controls.
    plate: minus the mean of its rows. auto: choose by the number of controls and by
    cross-validation on training plates."""
    unit_length: bool = False
    """Scale every profile to length 1."""
    max_missing: float = 0.05
    """Maximum fraction of missing values of a feature in the training rows, in [0, 1]."""

    def __post_init__(self) -> None:
        require_sound(self)
        regularization = self.sphere_regularization
        require("correlation", self.correlation, 0 < self.correlation <= 1, "above 0 and at most 1")
        require("sphere-regularization", regularization, regularization > 0, "above 0")
        require("pca", self.pca, self.pca >= 0, "0 (keep all) or a number of components")
        require("pca-variance", self.pca_variance, self.pca_variance >= 0, "0 (no scaling) or more")
        require("max-missing", self.max_missing, 0 <= self.max_missing <= 1, "from 0 to 1")


@dataclass(frozen=True)
class NamedPreparation(Choice):
    """One value of `--prepare`.

    Attributes:
        steps: settings of the preparation.
    """

    steps: Preparation


_SPHERING = Preparation(normalize="robustize", normalize_to="negcon", sphere="negcon")

#: `--prepare` name -> preparation. This table is the source of the help and of docs/commands.md.
PREPARATIONS: dict[str, NamedPreparation] = {
    "none": NamedPreparation("features unchanged", Preparation(normalize="none", outliers="none")),
    "standard": NamedPreparation("standardize each plate", Preparation()),
    "standard-pca": NamedPreparation(
        "standardize each plate, 50 principal components", Preparation(pca=50)
    ),
    "training-pca": NamedPreparation(
        "standardize by the training rows, 256 principal components",
        Preparation(normalize_by="training", pca=256),
    ),
    "plate-mad": NamedPreparation(
        "median and MAD of each plate, arcsinh of extreme values",
        Preparation(normalize="robustize", outliers="arcsinh"),
    ),
    "negcon-mad": NamedPreparation(
        "median and MAD of the negative controls of each plate",
        Preparation(normalize="robustize", normalize_to="negcon"),
    ),
    "sphering": NamedPreparation("negcon-mad, then sphere by the negative controls", _SPHERING),
    "tvn": NamedPreparation(
        "typical variation normalization: sphering, then CORAL between plates",
        dataclasses.replace(_SPHERING, align="coral"),
    ),
    "coral": NamedPreparation(
        "standard, then CORAL by the negative controls", Preparation(align="coral")
    ),
    "combat": NamedPreparation(
        "standard, then ComBat by the negative controls", Preparation(align="combat")
    ),
    "linear": NamedPreparation(
        "preparation of --preset linear",
        Preparation(
            normalize_by="training",
            pca=LINEAR_COMPONENTS,
            pca_variance=LINEAR_VARIANCE,
            relative="auto",
        ),
    ),
}


def read_preparation(value: str) -> Preparation:
    """Return a named preparation, or read one from a .toml file with the fields of `Preparation`.

    Raises:
        InputError: the name is unknown, the file cannot be read, or a field is unknown or not
            valid.
    """
    if value in PREPARATIONS:
        return PREPARATIONS[value].steps
    if not value.endswith(".toml"):
        names = ", ".join(PREPARATIONS)
        raise InputError(f"--prepare {value}: must be one of {names}, or a .toml file")
    return replace_fields(Preparation(), read_toml(Path(value)), f"--prepare {value}")


def preparation_name(steps: Preparation) -> str:
    """The name of a preparation in `PREPARATIONS`, or "custom"."""
    return next((name for name, one in PREPARATIONS.items() if one.steps == steps), "custom")


def prepare_option(name: str) -> Any:
    """Declare the option `--prepare` with a default."""
    default = PREPARATIONS[name].steps
    show = {"metavar": "NAME|FILE.toml", "show": preparation_name, "table": PREPARATIONS}
    return parsed_by("prepare", read_preparation, default, **show)


@dataclass(frozen=True)
class SourceConfig:
    """Features from a dataset"""

    data: tuple[Path, ...] = ()
    """Dataset directories, in place of --features. ImageNet features of each channel are
    extracted."""
    backbone: str = python_only("efficientnet_lite0")
    """Network of the features, one of `perturbjax features`."""
    weights: str = python_only("")
    """Pretrained weights: a file, hf:OWNER/REPOSITORY[@REVISION] or package:NAME; empty: those of
    the backbone."""
    size: int | None = python_only(None)
    """Height and width in pixels of the network input; by default those of the weights, or 128 for
    small sites with pool="stages"."""
    pool: Pool = python_only("last")
    """last: output of the backbone. stages: statistics of the feature maps of its stages."""
    augmentations: int = python_only(1)
    """Number of flips and rotations that features are averaged over, 1 to 8."""
    unit: SourceUnit = python_only("site")
    """site: whole sites, resized. cell, tile: native resolution, see `perturbjax features --unit`.
    auto: sites of up to 128 pixels whole, larger ones by cells or, without masks, by tiles."""
    max_cells: int = python_only(0)
    """Maximum number of cells of a site, chosen at random; 0 for all."""
    summary: Summary = python_only(DEFAULT_SUMMARY)
    """Summary of the cells or tiles of a site: mean, median, or mean-std."""
    statistics: bool = python_only(False)
    """Append logarithms of the intensity statistics, cell number and cell area of the dataset
    index."""
    feature_cache: str = python_only("", env="PERTURBJAX_FEATURE_CACHE")
    """Folder of cached features, at most 4 GB; empty: a folder in the user cache."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("size", self.size, self.size is None or self.size >= 8, "at least 8 pixels")
        require("augmentations", self.augmentations, 1 <= self.augmentations <= 8, "1 to 8")
        require("max-cells", self.max_cells, self.max_cells >= 0, "0 (all) or more")


@dataclass(frozen=True)
class ProfileConfig:
    """Profiles and their metadata."""

    features: tuple[Path, ...] = ()
    """Feature tables (.parquet or .csv): one for each plate, or several networks to join by
    site."""
    source: SourceConfig = SourceConfig()
    label_column: str = ""
    """Metadata column of the classes; by default that of --data, else Metadata_pert_iname. Rows
    without a value are ignored."""
    aggregate: Aggregation = "none"
    """Aggregate the rows of each well first."""
    negcon: str = ""
    """Negative controls as COLUMN=VALUE; by default Metadata_control_type=negcon, else rows named
    DMSO or untreated."""

    def __post_init__(self) -> None:
        require_sound(self)
        column, _, value = self.negcon.partition("=")
        if bool(self.features) == bool(self.source.data):
            raise InputError(
                "--features, --data: pass one of the two, feature tables or a dataset directory"
            )
        is_pair = not self.negcon or bool(column and value)
        require("negcon", self.negcon, is_pair, "COLUMN=VALUE")

    @property
    def where(self) -> Path:
        """The first table or dataset, for messages."""
        return (self.features or self.source.data)[0]


@dataclass(frozen=True)
class ClassifyConfig:
    """Fit classical classifiers on profiles and evaluate them on held-out rows."""

    profiles: ProfileConfig
    out: Path
    """Output folder: table.csv, scores.png, predictions/, evaluation/, split.parquet,
    config.json."""
    models: str = "all"
    """Classifiers, separated by commas, or all."""
    split: SplitConfig = only_flags(
        SplitConfig(), "split", "folds", "fold", "split_file", "exclude"
    )
    hold_out: str = ""
    """Test plate, in place of --split; each: every plate in turn."""
    all_folds: bool = False
    """Evaluate every fold in turn and pool the predictions."""
    preparation: Preparation = prepare_option("standard")
    """Preparation of the profiles."""
    tune: bool = False
    """Tune hyperparameters by cross-validation on the training rows."""
    tune_by: Criterion = python_only("balanced_accuracy")
    """Score that tuning maximizes."""
    replicates: int = python_only(2000)
    """Bootstrap resamples of each confidence interval."""
    seed: int = 0
    """Random seed of split, classifiers and bootstrap."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        is_alone = not (self.hold_out and (self.all_folds or self.split.split_file))
        require("hold-out", self.hold_out, is_alone, "used without --all-folds and --split-file")
        require("replicates", self.replicates, self.replicates >= 1, "at least 1")
        require_seed(self.seed)


#: Features of `--preset linear`, also used by the screening commands: fields of `SourceConfig`.
LINEAR_SOURCE: dict[str, Any] = {
    "statistics": True,
    "pool": "stages",
    "augmentations": 4,
    "unit": "auto",
    "max_cells": 64,
}
#: `classify --preset` name -> field values that replace the defaults. linear is the baseline for
#: every network; linear-resized shrinks fields to the input size of the network.
CLASSIFY_PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "source": source,
        "models": "logistic_balanced",
        "preparation": PREPARATIONS["linear"].steps,
    }
    for name, source in (
        ("linear", LINEAR_SOURCE),
        ("linear-resized", LINEAR_SOURCE | {"unit": "site"}),
    )
}


@dataclass(frozen=True)
class EmbedConfig:
    """Draw profiles as points in 2-D, as a picture and an interactive page."""

    profiles: ProfileConfig
    out: Path
    """Picture to write (.png); the page (.html) and the coordinates (.csv) have the same name."""
    method: EmbedMethod = "umap"
    """umap (package umap-learn) or tsne (package openTSNE)."""
    neighbors: int = 15
    """UMAP neighbors or t-SNE perplexity, and k of the k-nearest-neighbor purity."""
    min_dist: float = python_only(0.1)
    """Minimum distance between points in UMAP, in [0, 1]."""
    highlight: int = 12
    """Number of classes with a color; those with the highest purity are chosen, others are grey."""
    join: bool = python_only(False)
    """Connect replicates to the centroid of their class with thin lines (colored classes of at most
    30 rows)."""
    preparation: Preparation = prepare_option("standard-pca")
    """Preparation of the profiles, fitted on all rows."""
    seed: int = python_only(0)
    """Random seed."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".png")
        highlight = self.highlight
        require("neighbors", self.neighbors, self.neighbors >= 2, "2 or more")
        require("min-dist", self.min_dist, 0 <= self.min_dist <= 1, "from 0 to 1")
        require("highlight", highlight, 1 <= highlight <= MAX_COLORS, f"1 to {MAX_COLORS}")
        require_seed(self.seed)

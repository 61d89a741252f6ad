"""What may be chosen for classical models and embeddings, as frozen dataclasses; flags are made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from perturbjax.core.config import LINEAR_COMPONENTS, LINEAR_VARIANCE, Pool, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.core.options import require, require_output, require_sound

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
#: `--hold-out` value: every plate in turn.
EACH = "each"
#: As many classes can have a colour of their own in an embedding (`embed.COLOURS`).
MOST_COLOURS = 16


@dataclass(frozen=True)
class Preparation:
    """What happens to features before a classifier or an embedding sees them, in this order."""

    normalize: Scale = "standardize"
    """Centre and scale. standardize: mean, standard deviation. robustize: median, MAD."""
    normalize_by: ScaleBy = "plate"
    """plate: each plate by itself. training: one scale from all training rows, for plates of few rows."""
    normalize_to: Reference = "all"
    """Rows that give the scale: all, or the negative controls (these must then be known on every plate)."""
    outliers: Outliers = "clip"
    """Extreme values: cut off at ±10 deviations, made logarithmic (arcsinh), or left."""
    select: bool = False
    """Drop features that correlate with a kept one beyond --correlation."""
    correlation: float = 0.9
    """Greatest absolute correlation between kept features, in (0, 1]."""
    sphere: Literal["none", "train", "negcon"] = "none"
    """Whiten by the covariance of all training rows, or of their negative controls."""
    sphere_method: Whitening = "zca_cor"
    """How to whiten; pca_cor leaves components in place of features."""
    sphere_regularization: float = 1.0
    """Added to the eigenvalues, in units of their mean, > 0; of --align coral too."""
    align: Alignment = "none"
    """Move every plate onto the training plates by its own --align-to rows. coral: their covariance (after --sphere
    negcon this is TVN). combat: shift and spread of each feature, shrunk towards those of the others."""
    align_to: Reference = "negcon"
    """Rows that plates are aligned by: negative controls, or all, where every plate holds the same treatments."""
    pca: int = 0
    """Principal components to keep of the features, beside the index's statistics; 0 keeps all features."""
    pca_variance: float = 0.0
    """Scale the components, and the statistics, to this total variance; 0 leaves them."""
    relative: Relative = "none"
    """Add what is left so far once more, relative to its plate. negcon: minus the mean of the plate's negative
    controls. plate: minus the mean of all its rows. auto: negcon where plates hold enough of them; else plate, where
    that helps on training plates held out, and else none; the choice and its reason are printed."""
    unit_length: bool = False
    """Scale every profile to the same length, so that only its direction counts."""
    max_missing: float = 0.05
    """Features missing in more than this share of training rows are dropped, in [0, 1]."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("correlation", self.correlation, 0 < self.correlation <= 1, "above 0 and at most 1")
        require(
            "sphere-regularization",
            self.sphere_regularization,
            self.sphere_regularization > 0,
            "above 0",
        )
        require("pca", self.pca, self.pca >= 0, "0 (keep all) or a number of components")
        require(
            "pca-variance",
            self.pca_variance,
            self.pca_variance >= 0,
            "0 (as they are) or a total variance",
        )
        require("max-missing", self.max_missing, 0 <= self.max_missing <= 1, "from 0 to 1")


@dataclass(frozen=True)
class SourceConfig:
    """A dataset whose features are extracted, in place of tables of features."""

    data: tuple[Path, ...] = ()
    """Dataset directory, in place of --features: a backbone sees every channel of every site by itself. Several, whose
    channels agree, are taken together."""
    backbone: str = "efficientnet_lite0"
    """Network for --data, one of those of `perturbjax features`."""
    weights: str = ""
    """Its weights: a file, hf:OWNER/REPOSITORY[@REVISION] or package:NAME; empty takes those known for the backbone."""
    size: int | None = None
    """Side in pixels at which the backbone sees sites; by default what its weights are usually applied at, or with
    --pool stages 128 for sites that are no larger."""
    pool: Pool = "last"
    """What is kept of its maps: its last features, or those of its stages, as in `perturbjax features`."""
    augmentations: int = 1
    """How many of the square's eight symmetries the features are averaged over."""
    statistics: bool = False
    """Add what the index of --data knows: logarithms of each channel's mean, deviation and percentiles, of the number
    of cells and of their area."""
    feature_cache: str = ""
    """Folder of extracted features, kept below 4 GB; empty takes one in the user's cache."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("size", self.size, self.size is None or self.size >= 8, "at least 8 pixels")
        require(
            "augmentations",
            self.augmentations,
            1 <= self.augmentations <= 8,
            "1 to 8: a square has 8 symmetries",
        )


@dataclass(frozen=True)
class ProfileConfig:
    """Which profiles, and what is known of their wells."""

    features: tuple[Path, ...] = ()
    """Tables of features (parquet or CSV), one or several: one a plate, or those of several networks, which are joined
    by site; or else --data."""
    source: SourceConfig = field(default_factory=SourceConfig)
    label_column: str = ""
    """Metadata column to predict or to colour by; rows where it is empty are left out. By default the one that --data
    was built with, and Metadata_pert_iname of tables."""
    aggregate: Aggregation = "none"
    """Take the median or mean of the rows of each well first."""
    negcon: str = "Metadata_control_type=negcon"
    """COLUMN=VALUE that marks negative controls."""

    def __post_init__(self) -> None:
        require_sound(self)
        column, _, marked = self.negcon.partition("=")
        if bool(self.features) == bool(self.source.data):
            raise InputError(
                "--features, --data: give one of the two, tables of features or a dataset directory"
            )
        require(
            "negcon",
            self.negcon,
            bool(column and marked),
            "COLUMN=VALUE, such as Metadata_control_type=negcon",
        )

    @property
    def where(self) -> Path:
        """The first table or dataset: what a message names."""
        return (self.features or self.source.data)[0]


@dataclass(frozen=True)
class ClassifyConfig:
    """Fit classical classifiers on profiles and judge them on rows kept apart."""

    profiles: ProfileConfig
    out: Path
    """Folder to write to: table.csv, scores.png, predictions/, evaluation/, split.parquet, config.json."""
    models: str = "all"
    """Names, separated by commas, or all: ridge, random_forest, bernoulli_nb, gaussian_nb, knn, logistic,
    logistic_balanced, lda, plda, gradient_boosting."""
    split: SplitConfig = field(default_factory=SplitConfig)
    hold_out: str = ""
    """Plate to judge on, in place of the split policy; "each": every plate in turn."""
    all_folds: bool = False
    """Every fold of the split in turn, judged together."""
    preparation: Preparation = field(default_factory=Preparation)
    tune: bool = False
    """Choose each model's setting by cross-validation over the training rows' own groups."""
    tune_by: Criterion = "balanced_accuracy"
    """What tuning maximises."""
    replicates: int = 2000
    """Bootstrap resamples behind each interval."""
    seed: int = 0
    """Decides split, forests and bootstrap."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        alone = not (self.hold_out and (self.all_folds or self.split.split_file))
        require(
            "hold-out", self.hold_out, alone, "without --all-folds and --split-file; choose one"
        )
        require("replicates", self.replicates, self.replicates >= 1, "at least one")
        require("seed", self.seed, self.seed >= 0, "from 0 to 2^32 - 1")


#: What `perturbjax classify --preset NAME` changes of the defaults. linear is the baseline that a network has to beat;
#: this is the one place where its recipe stands.
CLASSIFY_PRESETS: dict[str, dict[str, Any]] = {
    "linear": {
        "source": {"statistics": True, "pool": "stages", "augmentations": 4},
        "models": "logistic_balanced",
        "preparation": Preparation(
            normalize_by="training",
            pca=LINEAR_COMPONENTS,
            pca_variance=LINEAR_VARIANCE,
            relative="auto",
        ),
    },
}


@dataclass(frozen=True)
class EmbedConfig:
    """Lay profiles out in the plane, as a picture and as an interactive page."""

    profiles: ProfileConfig
    out: Path
    """Picture to write (.png); the interactive page (.html) and the coordinates (.csv) go beside it."""
    method: EmbedMethod = "umap"
    """umap (umap-learn) or tsne (openTSNE)."""
    neighbors: int = 15
    """UMAP's number of neighbours, and t-SNE's perplexity; also the k of the k-nearest-neighbour purity."""
    min_dist: float = 0.1
    """UMAP's least distance between points, in [0, 1]."""
    highlight: int = 12
    """Classes with a colour of their own, best held together first; the others are grey."""
    join: bool = False
    """Thin lines from every replicate to the middle of its class; not for negative controls, grey classes, and classes
    of more than 30 rows."""
    preparation: Preparation = field(default_factory=lambda: Preparation(pca=50))
    """Fitted on all rows: a picture holds nothing out."""
    seed: int = 0
    """Decides the layout."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".png")
        require("neighbors", self.neighbors, self.neighbors >= 2, "2 or more")
        require("min-dist", self.min_dist, 0 <= self.min_dist <= 1, "from 0 to 1")
        require(
            "highlight",
            self.highlight,
            1 <= self.highlight <= MOST_COLOURS,
            f"from 1 to {MOST_COLOURS}",
        )
        require("seed", self.seed, self.seed >= 0, "from 0 to 2^32 - 1")

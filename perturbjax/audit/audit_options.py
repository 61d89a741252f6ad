"""What may be asked of an audit and of a comparison, as frozen dataclasses; flags are made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from perturbjax.core.config import SplitPolicy
from perturbjax.core.options import require, require_output, require_sound
from perturbjax.profiles.profile_options import Preparation, SourceConfig


@dataclass(frozen=True)
class AuditConfig:
    """How much of a score is biology: one model on the same features under every split, beside controls."""

    out: Path
    """Folder for audit.json, audit.csv and audit.html."""
    features: tuple[Path, ...] = ()
    """Tables of features (parquet or CSV), as `perturbjax features`, CellProfiler or pycytominer write them; tables of
    other features of the same sites are joined. --data beside them adds the cell counts and the brightness of their
    sites."""
    run: Path | None = None
    """A run that was evaluated: its network answers for the split that it was trained on."""
    train: bool = False
    """With --run: train its recipe anew on every fold of every split that the data allows (or of --splits), so that the
    network itself stands under all of them; takes as many trainings. The runs are kept in OUT/runs."""
    label_column: str = ""
    """Metadata column to predict; by default the dataset's, else Metadata_pert_iname."""
    model: str = "lda"
    """The classifier on the features: a name of `perturbjax classify --models`."""
    preparation: Preparation = field(
        default_factory=lambda: Preparation(normalize_by="training", pca=256)
    )
    source: SourceConfig = field(default_factory=SourceConfig)
    untrained: bool = False
    """Judge the features of the same network untrained too, with --data alone or --run: a strong control, at the cost
    of extracting features once more."""
    splits: tuple[SplitPolicy, ...] = ()
    """Which splits, such as plate layout; by default all that the data allows."""
    folds: int = 5
    """Parts that wells, plates or layouts are dealt into; fewer where there are fewer."""
    resample: Literal["well", "plate"] = "well"
    """What intervals draw whole. plate: wider and more cautious; takes many plates."""
    replicates: int = 1000
    """Resamples behind each interval, and deals of the labels behind each p."""
    seed: int = 0
    """Decides folds, resamples and deals."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        some = bool(self.features) or bool(self.source.data) or self.run is not None
        require(
            "features", "(none)", some, "given, or else --data or --run: there is nothing to audit"
        )
        require(
            "run",
            self.run,
            self.run is None or not self.features,
            "without --features; audit one at a time",
        )
        require(
            "train",
            self.train,
            not self.train or self.run is not None,
            "given with --run, whose recipe it trains",
        )
        require("untrained", self.untrained, not (self.untrained and self.features),
                "without --features: a table does not say which network made it")  # fmt: skip
        own = self.run is not None and not self.train
        require(
            "splits",
            self.splits,
            not (self.splits and own),
            "left out with --run, which has one, or given --train",
        )
        require("folds", self.folds, self.folds >= 2, "2 or more")
        require("replicates", self.replicates, self.replicates >= 100, "100 or more")
        require("seed", self.seed, self.seed >= 0, "from 0 to 2^32 - 1")


@dataclass(frozen=True)
class CompareConfig:
    """Runs that judged the same sites, side by side."""

    runs: Positional[tuple[Path, ...]]
    """Runs that were evaluated, or files of predictions, two or more; the others are compared with the first."""
    out: Path
    """Folder for compare.json, compare.csv and compare.html."""
    resample: Literal["well", "plate"] = "well"
    """What intervals draw whole."""
    replicates: int = 2000
    """Resamples behind each interval."""
    seed: int = 0
    """Of the resamples."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("replicates", self.replicates, self.replicates >= 100, "100 or more")
        require("seed", self.seed, self.seed >= 0, "from 0 to 2^32 - 1")

"""Reproduce the original report's tables and figures of pretrained features on any dataset.

    python -m experiments.paper_embeddings --data DATASET --out runs/paper_embeddings \\
        --backbones resnet50=hf:timm/resnet50.tv_in1k \\
        efficientnet_b0=hf:timm/efficientnet_b0.ra_in1k

Extracts features with each backbone, fits ridge, random forest and Bernoulli naive Bayes to the
unscaled features, and draws UMAP and t-SNE figures. `ORIGINAL` has the reported accuracies for
plate BR00116991. In the original notebooks the test features came from the training loader, and
sites of one well were in both sets, so its test scores do not apply to new wells. Here every site
has its features, and `--split well` groups by well. The default `site` is the original protocol.

Cost: dominated by extraction (docs/performance.md). Result on BBBC021: docs/results.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from perturbjax.cli import parse_options
from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import atomic, make_folder
from perturbjax.core.options import require, require_sound
from perturbjax.dataset import open_dataset
from perturbjax.evaluation.score_tables import print_evaluation, ranking_table
from perturbjax.profiles.classify import classify
from perturbjax.profiles.embedding import embed
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.profiles.image_inputs import AdaptConfig
from perturbjax.profiles.profile_options import (
    ClassifyConfig,
    EmbedConfig,
    Preparation,
    ProfileConfig,
)

#: (backbone, model) -> reported accuracy in training and in test.
ORIGINAL = {
    ("resnet50", "ridge"): (0.8248, 0.2838),
    ("efficientnet_b0", "random_forest"): (1.0, 0.1815),
    ("efficientnet_b0", "bernoulli_nb"): (0.3056, 0.1640),
}
MODELS = ("ridge", "random_forest", "bernoulli_nb")
#: Preparation that leaves the features unchanged.
NO_SCALING = Preparation(normalize="none", outliers="none")


@dataclass(frozen=True)
class Config:
    """Reproduce tables and figures of pretrained features."""

    data: Path
    """Dataset directory."""
    out: Path
    """Folder for features, tables and figures. An interrupted extraction is resumed."""
    backbones: tuple[str, ...]
    """One or more BACKBONE=WEIGHTS, with weights as in `perturbjax features`."""
    label_column: str = ""
    """Metadata column to predict; by default the label column of the dataset."""
    negcon: str = ProfileConfig.negcon
    """COLUMN=VALUE that marks negative controls."""
    split: SplitConfig = field(default_factory=lambda: SplitConfig(split="site"))
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    seed: int = 0
    """Random seed of split, random forest, embeddings and intervals."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("backbones", self.backbones, bool(self.backbones), "at least one BACKBONE=WEIGHTS")
        require("seed", self.seed, self.seed >= 0, "from 0 to 2^32 - 1")


def main(options: Config) -> None:
    """Extract, classify and embed with every backbone; write one table with both accuracies."""
    pairs = [text.partition("=")[::2] for text in options.backbones]
    if bad := [name for name, weights in pairs if not weights]:
        raise InputError(
            f"--backbones {bad[0]}: has no weights. Pass BACKBONE=WEIGHTS, for example "
            "resnet50=hf:timm/resnet50.tv_in1k."
        )
    make_folder(options.out)
    label = options.label_column or open_dataset(options.data).label_column
    tables = [run_backbone(options, name, weights, label) for name, weights in pairs]
    table = pd.concat(tables, ignore_index=True)
    with atomic(options.out / "table.csv") as temporary:
        table.to_csv(temporary, index=False)
    print(table.round(4).to_string(index=False, na_rep=""))


def run_backbone(options: Config, backbone: str, weights: str, label: str) -> pd.DataFrame:
    """Extract, classify and embed with one backbone; return its and the reported accuracies."""
    features = options.out / f"{backbone}.parquet"
    if not features.exists():
        extract(
            FeaturesConfig(
                data=(options.data,),
                out=features,
                backbone=backbone,
                weights=weights,
                adapt=options.adapt,
            )
        )
    profiles = ProfileConfig((features,), label_column=label, negcon=options.negcon)
    evaluation = classify(
        ClassifyConfig(
            profiles=profiles,
            out=options.out / f"classify_{backbone}",
            models=",".join(MODELS),
            split=options.split,
            preparation=NO_SCALING,
            seed=options.seed,
        )
    )
    print_evaluation(evaluation)
    for method in ("umap", "tsne"):
        figure = options.out / f"{method}_{backbone}.png"
        scaled = Preparation(normalize_by="training", pca=50)
        embed(
            EmbedConfig(
                profiles=profiles, out=figure, method=method, preparation=scaled, seed=options.seed
            )
        )
    scores = ranking_table(evaluation)
    rows = scores[(scores["level"] == "site") & (scores["model"] != "chance")]
    table = rows[
        [
            "model",
            "train_accuracy",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "balanced_accuracy",
        ]
    ].copy()
    table.insert(0, "backbone", backbone)
    reported = [ORIGINAL.get((backbone, model), (None, None)) for model in table["model"]]
    original_train, original_test = zip(*reported, strict=True)
    return table.assign(original_train=original_train, original_test=original_test)


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__)))

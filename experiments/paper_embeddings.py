"""The original's tables and figures of pretrained features, re-made on any dataset directory.

    python -m experiments.paper_embeddings --data DATASET --out runs/paper_embeddings \\
        --backbones resnet50=hf:timm/resnet50.tv_in1k efficientnet_b0=hf:timm/efficientnet_b0.ra_in1k

Features of every site by each backbone, then Ridge, random forest and Bernoulli naive Bayes on the features as they are
(no scaling, as there), and UMAP and t-SNE figures. `ORIGINAL` holds what the original reported (accuracy, training and
test) for plate BR00116991. In its notebooks the test features came from the training loader, and sites of one well
stood on both sides, so those test scores say nothing of new wells; here features of a site belong to that site, and
`--split well` keeps wells whole (`site`, the default, is the original's protocol).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from perturbjax.cli import parse_options
from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.config import SplitConfig
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import atomic, make_folder
from perturbjax.core.messages import console
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

#: (backbone, model) → accuracy that the original reported in training and in test.
ORIGINAL = {
    ("resnet50", "ridge"): (0.8248, 0.2838),
    ("efficientnet_b0", "random_forest"): (1.0, 0.1815),
    ("efficientnet_b0", "bernoulli_nb"): (0.3056, 0.1640),
}
MODELS = ("ridge", "random_forest", "bernoulli_nb")
#: Features as the network gives them.
AS_THEY_ARE = Preparation(normalize="none", outliers="none")


@dataclass(frozen=True)
class Config:
    """Re-make the original's tables and figures of pretrained features."""

    data: Path
    """Dataset directory."""
    out: Path
    """Folder for features, tables and figures. Extraction that was interrupted goes on."""
    backbones: tuple[str, ...]
    """BACKBONE=WEIGHTS, one or several; weights as for `perturbjax features`."""
    label_column: str = ""
    """Metadata column to predict; empty takes the one the dataset was built with."""
    negcon: str = ProfileConfig.negcon
    """COLUMN=VALUE that marks negative controls."""
    split: SplitConfig = field(default_factory=lambda: SplitConfig(split="site"))
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    seed: int = 0
    """Decides split, forest, layouts and intervals."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("backbones", self.backbones, bool(self.backbones), "at least one BACKBONE=WEIGHTS")
        require("seed", self.seed, self.seed >= 0, "from 0 to 2^32 - 1")


def main(options: Config) -> None:
    """Extract, classify and embed with every backbone; write one table beside the original's numbers."""
    pairs = [text.partition("=")[::2] for text in options.backbones]
    if bad := [name for name, weights in pairs if not weights]:
        raise InputError(
            f"--backbones {bad[0]}: write BACKBONE=WEIGHTS, such as resnet50=hf:timm/resnet50.tv_in1k"
        )
    make_folder(options.out)
    label = options.label_column or open_dataset(options.data).label_column
    console.print(f"split by {options.split.split}: {SPLIT_POLICIES[options.split.split].meaning}")
    tables = [run_backbone(options, name, weights, label) for name, weights in pairs]
    table = pd.concat(tables, ignore_index=True)
    with atomic(options.out / "table.csv") as temporary:
        table.to_csv(temporary, index=False)
    print(table.round(4).to_string(index=False, na_rep=""))


def run_backbone(options: Config, backbone: str, weights: str, label: str) -> pd.DataFrame:
    """One backbone's features, classifiers and figures; accuracies beside the original's."""
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
            preparation=AS_THEY_ARE,
            seed=options.seed,
        )
    )
    print_evaluation(evaluation)
    for method in ("umap", "tsne"):
        picture = options.out / f"{method}_{backbone}.png"
        scaled = Preparation(normalize_by="training", pca=50)
        embed(
            EmbedConfig(
                profiles=profiles, out=picture, method=method, preparation=scaled, seed=options.seed
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
    reported = [ORIGINAL.get((backbone, subject), (None, None)) for subject in table["model"]]
    return table.assign(
        original_train=[a for a, _ in reported], original_test=[b for _, b in reported]
    )


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__)))

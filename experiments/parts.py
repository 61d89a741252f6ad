"""What each part of a network of `train --preset pretrained` answers alone, on the sites that its runs judge.

    python -m experiments.parts --runs runs/presets/bbbc021_cells/plate/fold*/pretrained_seed* --out runs/parts

Nothing is asked of images: the head answers to the features that `evaluate` wrote, and what the trained eyes said is
what remains of the whole answer. Writes `parts.csv`, a row a run and part, and their means over the runs as `parts.md`.
It takes seconds a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx
from jaxtyping import Float
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from experiments.runs import markdown
from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.files import make_folder, read_parquet, write_csv
from perturbjax.core.options import require_output, require_sound
from perturbjax.data.splits import TEST
from perturbjax.evaluation.apply import EVALUATION, FEATURES, PREDICTIONS
from perturbjax.evaluation.predictions import labels_and_probabilities, read_predictions
from perturbjax.inference import load_network
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import BRANCH_WEIGHT, EnsembleHead
from perturbjax.training.run_directory import open_run


@dataclass(frozen=True)
class Config:
    runs: tuple[Path, ...]
    """Runs of preset pretrained that were evaluated."""
    out: Path
    """Folder for the tables."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)


def main(options: Config) -> None:
    """Judge every part of every run; write the tables."""
    found = pd.concat([judged(path) for path in options.runs], ignore_index=True)
    write_csv(make_folder(options.out) / "parts.csv", found)
    means = found.groupby("part", sort=False)[["accuracy", "balanced accuracy"]].mean().round(3)
    means.insert(0, "runs", found.groupby("part", sort=False).size())
    text = markdown(means.reset_index())
    (options.out / "parts.md").write_text(text + "\n")
    print(text)


def judged(path: Path) -> pd.DataFrame:
    """A row a part of one run: its scores by site.

    Raises:
        InputError: the run was not evaluated, or its network has no such parts.
    """
    network = load_network(open_run(path))
    model = nnx.merge(network.graphdef, *network.state.values(), copy=True)
    if not isinstance(getattr(model, "head", None), EnsembleHead):
        raise InputError(
            f"--runs {path}: has no head of two parts; only those of --head channels have"
        )
    tables = [
        read_parquet(path / EVALUATION / FEATURES, "evaluate again"),
        read_predictions(path / EVALUATION / PREDICTIONS),
    ]
    features, predictions = (
        table[table[column] == TEST]
        for table, column in zip(tables, ("Metadata_part", "part"), strict=True)
    )
    truth, whole = labels_and_probabilities(predictions, network.class_names)
    numbers = features[
        [column for column in features.columns if not column.startswith("Metadata_")]
    ]
    rows = []
    for part, answers in apart(model.head, numbers.to_numpy(np.float32), whole).items():
        said = answers.argmax(1)
        scores = {
            "accuracy": accuracy_score(truth, said),
            "balanced accuracy": balanced_accuracy_score(truth, said),
        }
        rows.append({"run": str(path), "part": part, **scores})
    return pd.DataFrame(rows)


def apart(
    head: EnsembleHead, features: Float[np.ndarray, "n d"], whole: Float[np.ndarray, "n classes"]
) -> dict[str, Float[np.ndarray, "n classes"]]:
    """Log-probabilities of the parts, up to a constant a site; `whole` are probabilities."""
    x = jnp.asarray(features)
    mlp, linear = np.asarray(head.log_probabilities(x, Mode()))
    both, told = np.asarray(jax.nn.log_softmax(head(x, Mode()))), np.log(np.maximum(whole, 1e-30))
    trainable_branch = (told - (1 - BRANCH_WEIGHT) * both) / BRANCH_WEIGHT
    return {
        "whole": told,
        "head": both,
        "its perceptron": mlp,
        "its linear model": linear,
        "eyes": trainable_branch,
    }


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))

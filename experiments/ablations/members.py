"""Scores of each member of the ensemble of preset `pretrained`, from evaluated runs.

    python -m experiments.ablation --ablation members --runs "runs/presets/*/plate/fold*/p*_seed*" \
        --out runs/members

The head is applied to the features that `perturbjax evaluate` stored. The log-probabilities of the
attention branch follow from those of the ensemble, a weighted mean of head and branch:

    log p_branch = (log p - (1 - w) log p_head) / w + constant,    w = BRANCH_WEIGHT

Cost: seconds per run. Result on 15 runs on plates of BBBC021 (accuracy, balanced accuracy):
ensemble 0.775, 0.699; MLP and logistic regression 0.759, 0.672; attention branch 0.516, 0.541;
docs/presets.md.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from experiments.ablation import Config
from experiments.ablations.inner_folds import score
from perturbjax.core.errors import InputError
from perturbjax.core.files import read_parquet
from perturbjax.data.splits import TEST
from perturbjax.evaluation.apply import EVALUATION, FEATURES, PREDICTIONS
from perturbjax.evaluation.predictions import labels_and_probabilities, read_predictions
from perturbjax.inference import load_network
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import BRANCH_WEIGHT, EnsembleHead
from perturbjax.training.run_directory import open_run

REFERENCE = "ensemble"
VARIANTS: tuple[str, ...] = ()


def run(options: Config) -> Iterator[dict[str, object]]:
    """Score the members of every run on its test sites.

    Raises:
        InputError: a pattern matches no run, or a run was not evaluated or has no ensemble.
    """
    for pattern in options.runs:
        paths = sorted(map(Path, glob.glob(pattern)))
        if not paths:
            raise InputError(f"--runs {pattern}: no such directory")
        for path in paths:
            yield from _score_run(path)


def _score_run(path: Path) -> Iterator[dict[str, object]]:
    network = load_network(open_run(path))
    model = nnx.merge(network.graphdef, *network.state.values(), copy=True)
    if not isinstance(getattr(model, "head", None), EnsembleHead):
        raise InputError(f"--runs {path}: is not an ensemble. Pass runs of --preset pretrained.")
    features = read_parquet(path / EVALUATION / FEATURES, "evaluate again")
    features = features[features["Metadata_part"] == TEST]
    predictions = read_predictions(path / EVALUATION / PREDICTIONS)
    truth, probabilities = labels_and_probabilities(
        predictions[predictions["part"] == TEST], network.class_names
    )
    names = [column for column in features.columns if not column.startswith("Metadata_")]
    values = features[names].to_numpy(np.float32)
    for member, logits in separate_members(model.head, values, probabilities).items():
        yield {"variant": member, "fold": str(path), **score(truth, logits.argmax(1))}


def separate_members(
    head: EnsembleHead,
    features: Float[np.ndarray, "n d"],
    probabilities: Float[np.ndarray, "n classes"],
) -> dict[str, Float[np.ndarray, "n classes"]]:
    """Compute the log-probabilities of each member, up to a constant per site.

    Args:
        head: fitted MLP and logistic regression.
        features: (n, d) reduced features of the sites.
        probabilities: (n, classes) predictions of the ensemble.
    """
    x = jnp.asarray(features)
    mlp, logistic = np.asarray(head.log_probabilities(x, Mode()))
    both = np.asarray(jax.nn.log_softmax(head(x, Mode())))
    ensemble = np.log(np.maximum(probabilities, 1e-30))
    return {
        REFERENCE: ensemble,
        "MLP and logistic regression": both,
        "MLP": mlp,
        "logistic regression": logistic,
        "attention branch": (ensemble - (1 - BRANCH_WEIGHT) * both) / BRANCH_WEIGHT,
    }

"""The linear solution as the place where training starts: logistic regression on what the fresh network sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from perturbjax.config import LINEAR_C, LINEAR_COMPONENTS, LINEAR_VARIANCE
from perturbjax.console import console
from perturbjax.feed import Order, RawBatch
from perturbjax.training.experiment import Experiment
from perturbjax.training.predict import apply_to_sites
from perturbjax.training.step import PredictStep, TrainState, split_model

#: Bias of a class that no training site has.
_UNSEEN = -10.0


class Solution(NamedTuple):
    """A dense layer on standardised features: (x - mean) × gain, then kernel and bias."""

    mean: Float[np.ndarray, " d"]
    gain: Float[np.ndarray, " d"]
    kernel: Float[np.ndarray, "d classes"]
    bias: Float[np.ndarray, " classes"]


def start_at_linear(
    state: TrainState,
    experiment: Experiment,
    predict_step: PredictStep,
    batches: Callable[[Order], Iterable[RawBatch]],
    *,
    multiple: int = 1,
) -> TrainState:
    """The state with the dense layer of `models.channels` at the linear solution of the training sites, unaugmented.

    Features are computed once, by the network itself; the same sites give the same solution, whatever the feed.
    """
    _, features = apply_to_sites(
        predict_step,
        state.params,
        state.stats,
        batches,
        experiment.train,
        min(experiment.recipe.optim.batch_size, len(experiment.train)),
        multiple=multiple,
    )
    labels = experiment.sites.labels[experiment.train]
    model = nnx.merge(experiment.graphdef, state.params, state.stats, copy=True)
    found = solve(features, labels, len(experiment.class_names), model.seen)
    model.standardize.mean[...], model.standardize.gain[...] = found.mean, found.gain
    model.head.kernel[...], model.head.bias[...] = found.kernel, found.bias
    console.print(f"head started at the linear solution of {len(labels)} training sites")
    _, params, stats = split_model(model)
    return state._replace(params=params, stats=stats)


def solve(x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], classes: int, backbone: int) -> Solution:
    """Balanced logistic regression on the components of the first `backbone` features, and on the others as they are.

    The recipe of `perturbjax classify --preset linear`, without what is relative to the plate.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    x = x.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    gain = np.where(deviation > 1e-6 * np.abs(mean), 1 / np.where(deviation > 0, deviation, 1), 0)
    z = (x - mean) * gain
    pca = PCA(min(LINEAR_COMPONENTS, len(x), backbone), random_state=0).fit(z[:, :backbone])
    seen, known = pca.transform(z[:, :backbone]), z[:, backbone:]
    gains = [np.sqrt(LINEAR_VARIANCE / max(part.var(axis=0).sum(), 1e-12)) for part in (seen, known)]
    model = LogisticRegression(C=LINEAR_C, max_iter=300, class_weight="balanced")
    model.fit(np.concatenate([seen * gains[0], known * gains[1]], axis=1), labels)
    weights, bias = model.coef_, model.intercept_
    if len(weights) == 1:  # two classes: one row of logits stands for both
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    k = pca.n_components_
    kernel = np.zeros((x.shape[1], classes))
    of_seen, of_known = gains[0] * weights[:, :k].T, gains[1] * weights[:, k:].T
    kernel[:, model.classes_] = np.concatenate([pca.components_.T @ of_seen, of_known])
    full = np.full(classes, _UNSEEN)
    full[model.classes_] = bias - pca.mean_ @ kernel[:backbone, model.classes_]
    return Solution(*(one.astype(np.float32) for one in (mean, gain, kernel, full)))

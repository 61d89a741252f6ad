"""Fit the frozen members of the ensemble classifier before the first training step.

The frozen backbone computes the features of all training sites once, without augmentation. They are
reduced to principal components and site statistics. Two classifiers are fitted to them:

- an MLP, with mixup of pairs of sites (Zhang et al. 2017, arXiv 1710.09412): for random sites i, j
  and `a ~ Beta(0.4, 0.4)`, it is trained on `a * x_i + (1 - a) * x_j` with targets mixed in the
  same way;
- a logistic regression, the same as in the linear baseline.

The MLP is better with about a thousand sites or more, the logistic regression with a few hundred.
Their ensemble weights `w` come from stacking (Wolpert 1992, doi 10.1016/S0893-6080(05)80023-1): the
training groups are split into folds, both classifiers predict the groups of the fold that they were
not fitted to, and `w` maximizes the likelihood of `softmax(w_1 * log p_1 + w_2 * log p_2)`. The
constants were chosen on inner folds of training plates (docs/presets.md). The third member, the
trainable attention branch, is trained by the epochs that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from perturbjax.core.config import LINEAR_C, LINEAR_VARIANCE
from perturbjax.core.messages import console
from perturbjax.data.batches import BatchOrder, RawBatch
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import COMPONENTS, MLP, EnsembleHead
from perturbjax.models.layers import Dense
from perturbjax.training.devices import Placement
from perturbjax.training.setup import Experiment
from perturbjax.training.site_features import SiteFeatures, open_store
from perturbjax.training.step import TrainState, split_model

#: Training of the MLP: batch size, epochs, and minimum number of steps.
BATCH, EPOCHS, MIN_STEPS = 128, 60, 300
#: Initial learning rate (cosine decay) and decoupled weight decay of the MLP.
RATE, DECAY = 1e-3, 1e-2
#: Both parameters of the beta distribution of mixup.
MIX = 0.4
#: Number of folds of the training groups for the ensemble weights.
FOLDS = 3
#: Minimum ensemble weight. Positive, so that the most probable class stays the same if all held-out
#: predictions are at chance level.
MIN_ENSEMBLE_WEIGHT = 0.01
#: Logit of a class without training sites in the logistic regression.
ABSENT_CLASS_LOGIT = -30.0


def initialize_ensemble(
    state: TrainState,
    experiment: Experiment,
    placement: Placement,
    batches: Callable[[BatchOrder], Iterable[RawBatch]],
) -> TrainState:
    """Fit reduction, MLP, logistic regression and ensemble weights to the training sites.

    The result is bit-identical for resident and streamed batches.

    Args:
        state: state before the first step.
        experiment: data and network.
        placement: devices.
        batches: batch pipeline, a function from an order to placed batches.

    Returns:
        The state with fitted parameters and statistics.
    """
    recipe, train = experiment.recipe, experiment.train
    store = open_store(experiment.decoder, recipe, state.params)
    site_features = SiteFeatures(experiment.graphdef, recipe, placement)
    # Each process computes its rows of a batch, so no process may skip stored sites.
    store = store if placement.processes == 1 else None
    features = site_features.compute(state.params, state.stats, batches, train, store)
    # A copy, because the fitted values are written into its variables.
    model = nnx.merge(experiment.graphdef, state.params, state.stats, copy=True)
    mean, kernel = fit_reduction(features, model.backbone_feature_size)
    model.reduce.mean[...], model.reduce.kernel[...] = mean, kernel
    labels, class_weight = experiment.sites.labels[train], experiment.class_weight
    # (n,) weight of each site: the class weights of the training loss.
    weight = np.ones(len(labels)) if class_weight is None else np.asarray(class_weight)[labels]
    assign_groups = experiment.manifest.set_index("site_id")["group"]
    model.head = fit_ensemble(
        model.head,
        np.asarray(model.reduce(jnp.asarray(features))),
        labels,
        weight,
        assign_groups.loc[experiment.dataset.index["site_id"].iloc[train]].to_numpy(),
        smoothing=recipe.optim.label_smoothing,
        seed=recipe.seed,
    )
    mlp_weight, linear_weight = (float(value) for value in model.head.ensemble_weights[...])
    console.print(
        f"Fitted classifier head on {len(labels):,} training sites (ensemble weights: MLP "
        f"{mlp_weight:.2f}, logistic "
        f"regression {linear_weight:.2f})."
    )
    _, params, stats = split_model(model)
    # Hundreds of small programs that are not needed again occupy about a third of a gigabyte.
    jax.clear_caches()
    return state._replace(params=params, stats=stats)


def fit_reduction(
    x: Float[np.ndarray, "n d"], backbone_features: int
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d e"]]:
    """Fit the reduction `z = (x - mean) @ kernel` of site features.

    Backbone features are replaced by at most `COMPONENTS` principal components, site statistics are
    kept. All are standardized first. Components and statistics are then scaled to the same total
    variance (1 on average), because a dozen statistics would otherwise have no influence next to
    hundreds of components.

    Args:
        x: (sites, d) features: first those of the backbone, then the site statistics.
        backbone_features: number of backbone features.

    Returns:
        The mean (d,) and the kernel (d, e), float32. With fewer sites than components, the last
        components are 0.
    """
    from sklearn.decomposition import PCA

    # Means and variances over thousands of sites lose digits in float32.
    x = x.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0)
    # Features without variance (up to rounding) get the scale 0.
    scale = np.where(std > 1e-6 * np.abs(mean), 1 / np.where(std > 0, std, 1), 0)
    z = (x - mean) * scale
    width = min(COMPONENTS, backbone_features)
    # There are at most as many components as sites. The solver can be randomized, hence the seed.
    pca = PCA(min(width, len(x)), random_state=0).fit(z[:, :backbone_features])
    statistics = x.shape[1] - backbone_features
    # Block matrix (d, e): principal axes for backbone features, identity for site statistics.
    kernel = np.zeros((x.shape[1], width + statistics))
    kernel[:backbone_features, : pca.n_components_] = pca.components_.T
    kernel[backbone_features:, width:] = np.eye(statistics)
    variance = (z @ kernel).var(axis=0)
    # Each of the two parts gets half of the total variance, e / 2.
    for part in (slice(0, width), slice(width, None)):
        kernel[:, part] *= np.sqrt(kernel.shape[1] / 2 / max(variance[part].sum(), 1e-12))
    # The kernel includes the standardization: ((x - mean) * scale) @ kernel.
    return mean.astype(np.float32), (scale[:, None] * kernel).astype(np.float32)


def fit_ensemble(
    head: EnsembleHead,
    z: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    groups: np.ndarray,
    *,
    smoothing: float,
    seed: int,
    mix: float = MIX,
) -> EnsembleHead:
    """Fit MLP and logistic regression to all sites, and estimate their weights by stacking.

    With a single group the sites are split at random. Held-out sites of a class that the other
    folds do not contain are ignored; without any usable site both members get the same weight.

    Args:
        head: head with initial parameters.
        z: (n, e) reduced features.
        labels: (n,) class numbers.
        weight: (n,) weight of each site.
        groups: (n,) group of each site in the train/test split.
        smoothing: label smoothing of the MLP.
        seed: seed of the MLP and of the random split.
        mix: parameter of mixup; 0 disables it.
    """
    from sklearn.model_selection import GroupKFold

    fit = partial(fit_ensemble_members, head, smoothing=smoothing, seed=seed, mix=mix)
    if len(np.unique(groups)) < 2:
        # One group for each site, so that the folds are random.
        groups = np.random.default_rng(seed).permutation(len(z))
    folds: Iterable[tuple[np.ndarray, np.ndarray]] = ()
    if len(z) > 1:
        folds = GroupKFold(min(FOLDS, len(np.unique(groups)))).split(z, groups=groups)
    # (members, sites, classes). Each site is predicted by members fitted without its fold.
    log_probabilities = np.zeros((2, len(z), head.logistic_regression.bias.shape[0]))
    usable = np.zeros(len(z), bool)
    for inner, outer in folds:
        usable[outer] = np.isin(labels[outer], labels[inner])
        fitted = fit(z[inner], labels[inner], weight[inner])
        log_probabilities[:, outer] = fitted.log_probabilities(jnp.asarray(z[outer]), Mode())
    # The final members use all sites. The folds only serve to estimate the weights.
    result = fit(z, labels, weight)
    weights = estimate_ensemble_weights(log_probabilities[:, usable], labels[usable])
    result.ensemble_weights[...] = jnp.asarray(weights, jnp.float32)
    return result


def fit_ensemble_members(
    head: EnsembleHead,
    z: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    *,
    smoothing: float,
    seed: int,
    mix: float = MIX,
) -> EnsembleHead:
    """Fit MLP and logistic regression and keep the ensemble weights, see `fit_ensemble`."""
    result = nnx.clone(head)
    result.mlp = fit_mlp(head.mlp, z, labels, weight, smoothing, seed, mix=mix)
    result.logistic_regression = fit_logistic_regression(
        head.logistic_regression, z, labels, weight
    )
    return result


def estimate_ensemble_weights(
    log_probabilities: Float[np.ndarray, "k n classes"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " k"]:
    """Estimate the ensemble weights that maximize the likelihood of the labels.

    The negative log-likelihood of `softmax(sum_k w_k * log p_k)` is convex in the weights, so
    L-BFGS-B finds the global optimum.

    Args:
        log_probabilities: (members, n, classes) predictions for held-out sites.
        labels: (n,) class numbers; equal weights are returned if there are none.
    """
    from scipy.optimize import minimize

    start = np.full(len(log_probabilities), 1 / len(log_probabilities))
    if not len(labels):
        return start
    true_class = log_probabilities[:, np.arange(len(labels)), labels]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.tensordot(weights, log_probabilities, 1)
        # Softmax does not change with this shift, and `exp` cannot overflow.
        logits -= logits.max(axis=1, keepdims=True)
        total = np.exp(logits).sum(axis=1)
        probabilities = np.exp(logits) / total[:, None]
        own = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        # Gradient for w_k: mean of log p_k expected under the ensemble, minus its mean at the true
        # classes.
        expected = (log_probabilities * probabilities).sum(axis=2).mean(axis=1)
        return float((np.log(total) - own).mean()), expected - true_class.mean(axis=1)

    bounds = [(MIN_ENSEMBLE_WEIGHT, None)] * len(log_probabilities)
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x


def fit_logistic_regression(
    model: Dense,
    z: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
) -> Dense:
    """Fit the logistic regression of the linear baseline to reduced features.

    Args:
        model: dense layer (e, classes).
        z: (n, e) reduced features.
        labels: (n,) class numbers.
        weight: (n,) weight of each site.
    """
    from sklearn.linear_model import LogisticRegression

    kernel, bias = np.zeros(model.kernel.shape), np.full(model.bias.shape, ABSENT_CLASS_LOGIT)
    present = np.unique(labels)
    if len(present) > 1:
        # Scales both components and statistics to the total variance of the linear baseline.
        scale = np.sqrt(2 * LINEAR_VARIANCE / z.shape[1])
        fitted = LogisticRegression(C=LINEAR_C, max_iter=300).fit(
            z * scale, labels, weight / weight.mean()
        )
        coefficients, constants = fitted.coef_, fitted.intercept_
        if len(present) == 2:  # scikit-learn has one logit for two classes
            coefficients = np.concatenate([0 * coefficients, coefficients])
            constants = np.concatenate([0 * constants, constants])
        # The scale becomes part of the kernel, so that the layer accepts unscaled features.
        kernel[:, present], bias[present] = scale * coefficients.T, constants
    else:
        # A single class gets all of the probability.
        bias[present] = 0
    result = nnx.clone(model)
    result.kernel[...] = jnp.asarray(kernel, jnp.float32)
    result.bias[...] = jnp.asarray(bias, jnp.float32)
    return result


def fit_mlp(
    mlp: MLP,
    z: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    smoothing: float,
    seed: int,
    *,
    mix: float = MIX,
) -> MLP:
    """Train the MLP on reduced features, see `fit_ensemble`."""
    graphdef, params = nnx.split(mlp, nnx.Param)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, mlp.skip.shape[1]), smoothing)
    # Mean weight 1, so that class weights do not change the scale of the loss.
    data = (z.astype(np.float32), targets, (weight / weight.mean()).astype(np.float32))
    trained = _train_mlp(graphdef, params, jax.random.key(seed), *map(jnp.asarray, data), mix=mix)
    return nnx.merge(graphdef, jax.device_get(trained))


@partial(jax.jit, static_argnums=0, static_argnames="mix")
def _train_mlp(
    graphdef: nnx.GraphDef,
    params: Any,
    key: Array,
    z: Float[Array, "n e"],
    targets: Float[Array, "n classes"],
    weight: Float[Array, " n"],
    *,
    mix: float,
) -> Any:
    """Return the parameters after all steps. Folds of the same size share a compiled program."""
    size = min(BATCH, len(z))
    steps = max(MIN_STEPS, EPOCHS * len(z) // size)
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=DECAY)

    def loss(params: Any, key: Array) -> Float[Array, ""]:
        row_key, pair_key, mix_key, dropout_key = jax.random.split(key, 4)
        # Sampled with replacement: every batch has the same size for any number of sites.
        rows = jax.random.randint(row_key, (size,), 0, len(z))
        partners = jax.random.permutation(pair_key, rows)
        fraction = jax.random.beta(mix_key, mix, mix, (size,)) if mix else jnp.ones(size)
        # The site has the larger fraction, its partner the smaller one. The pair (i, j, a) equals
        # (j, i, 1 - a), so no mixture is lost.
        fraction = jnp.maximum(fraction, 1 - fraction)

        def mixed(values: Array) -> Array:
            # Shape (size, 1, ...), to broadcast over the axes of `values`.
            own = fraction.reshape(-1, *[1] * (values.ndim - 1))
            return own * values[rows] + (1 - own) * values[partners]

        # One dropout key for each row of the batch.
        mode = Mode(train=True, keys=jax.random.split(dropout_key, size))
        logits = nnx.merge(graphdef, params)(mixed(z), mode)
        return (mixed(weight) * optax.softmax_cross_entropy(logits, mixed(targets))).mean()

    def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    # All steps are one device call; only the final parameters are returned.
    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]

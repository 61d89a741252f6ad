"""The part of `models.channels` that stands still while the eyes are trained, set before the first step.

What the standing backbone sees of the training sites is computed once, without augmentation, reduced, and two models
are fitted to it: a perceptron, on mixed pairs of sites (mixup, Zhang et al. 2017, arXiv 1710.09412), and a logistic
regression, that of the linear baseline. On a thousand sites and more the first is the better, on a few hundred the
second: how much either has to say is what makes the labels of held-out training sites likeliest (stacking, Wolpert
1992, doi 10.1016/S0893-6080(05)80023-1). The constants were chosen by inner folds of the training plates
(docs/presets.md).
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
from perturbjax.core.memory import give_back_freed_memory
from perturbjax.core.messages import console
from perturbjax.core.progress import track
from perturbjax.data.batches import BatchOrder, RawBatch
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import COMPONENTS, MLP, EnsembleHead
from perturbjax.models.layers import Dense
from perturbjax.training.apply_network import apply_to_sites
from perturbjax.training.setup import Experiment
from perturbjax.training.step import TrainState, split_model

#: Sites a step; passes over the sites; steps that are taken where these are few.
BATCH, EPOCHS, LEAST_STEPS = 128, 60, 300
#: Learning rate at the start, and AdamW's decay.
RATE, DECAY = 1e-3, 1e-2
#: Both parameters of the beta distribution of mixup.
MIX = 0.4
#: Parts in which training sites are held out for the shares.
PARTS = 3
#: Least share of either: where held-out sites are told no better than by chance, the likeliest class is still said.
MIN_ENSEMBLE_WEIGHT = 0.01
#: Logit of a class that a linear model has seen no site of.
NEVER = -30.0


def fit_ensemble_head(
    state: TrainState,
    experiment: Experiment,
    describe_step: Callable[..., Any],
    batches: Callable[[BatchOrder], Iterable[RawBatch]],
    *,
    multiple: int = 1,
) -> TrainState:
    """The state with `reduce` and `head` of a `EnsembleClassifier` set by the training sites.

    The same sites give the same bits, whatever the feed.

    Args:
        describe_step: of `make_site_features_step`.
        batches: a feed's.
        multiple: of `apply_to_sites`.
    """

    def shown(order: BatchOrder) -> Iterable[RawBatch]:
        for batch in track(
            batches(order), total=len(order), label="features of the training sites", unit="batches"
        ):
            give_back_freed_memory()  # each takes seconds, and hundreds of megabytes anew once others have split them
            yield batch

    train, labels = experiment.train, experiment.sites.labels[experiment.train]
    size = min(experiment.recipe.optim.batch_size, len(train))
    (found,) = apply_to_sites(
        describe_step, state.params, state.stats, shown, train, size, multiple=multiple
    )
    give_back_freed_memory()
    model = nnx.merge(experiment.graphdef, state.params, state.stats, copy=True)
    mean, kernel = reduction(found, model.backbone_feature_size)
    model.reduce.mean[...], model.reduce.kernel[...] = mean, kernel
    optim, told = experiment.recipe.optim, experiment.class_weight
    weight = np.ones(len(experiment.class_names)) if told is None else np.asarray(told)
    z = np.asarray(model.reduce(jnp.asarray(found)))
    groups = experiment.manifest.set_index("site_id")["group"].loc[
        experiment.dataset.index["site_id"].iloc[train]
    ]
    fit = partial(
        fit_ensemble, model.head, smoothing=optim.label_smoothing, seed=experiment.recipe.seed
    )
    model.head = fit(z, labels, weight[labels], groups.to_numpy())
    of_perceptron, of_linear = (float(share) for share in model.head.ensemble_weights[...])
    console.print(
        f"head fitted to what the backbone sees of {len(labels)} training sites: log-probabilities of a perceptron "
        f"times {of_perceptron:.2f}, of a linear model times {of_linear:.2f}"
    )
    _, params, stats = split_model(model)
    jax.clear_caches()  # hundreds of programs, most of them small, that are not run again: a third of a gigabyte
    return state._replace(params=params, stats=stats)


def reduction(
    x: Float[np.ndarray, "n d"], seen: int
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d e"]]:
    """(mean, kernel) of what is (x - mean) @ kernel: components of the first `seen` features, the others as they are.

    All are standardised first, and both parts are scaled to one total variance, of a deviation of 1 on average: else
    a dozen statistics drown among hundreds of components. Where there are fewer sites than components, the last of
    these are 0.
    """
    from sklearn.decomposition import PCA

    x = x.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    gain = np.where(deviation > 1e-6 * np.abs(mean), 1 / np.where(deviation > 0, deviation, 1), 0)
    z = (x - mean) * gain
    width = min(COMPONENTS, seen)
    pca = PCA(min(width, len(x)), random_state=0).fit(z[:, :seen])
    known = x.shape[1] - seen
    kernel = np.zeros((x.shape[1], width + known))
    kernel[:seen, : pca.n_components_] = pca.components_.T
    kernel[seen:, width:] = np.eye(known)
    variance = (z @ kernel).var(axis=0)
    for part in (slice(0, width), slice(width, None)):
        kernel[:, part] *= np.sqrt(kernel.shape[1] / 2 / max(variance[part].sum(), 1e-12))
    return mean.astype(np.float32), (gain[:, None] * kernel).astype(np.float32)


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
    """The head with both its parts fitted to all sites, and the shares that sites held out by group speak for.

    Where there is one group, sites are held out at random. A site says nothing if its class has none outside its group;
    where no site says anything, both parts have the same share.
    """
    from sklearn.model_selection import GroupKFold

    parts = partial(fit_ensemble_members, head, smoothing=smoothing, seed=seed, mix=mix)
    if len(np.unique(groups)) < 2:
        groups = np.random.default_rng(seed).permutation(len(z))
    dealt = (
        GroupKFold(min(PARTS, len(np.unique(groups)))).split(z, groups=groups) if len(z) > 1 else ()
    )
    said, known = (
        np.zeros((2, len(z), head.logistic_regression.bias.shape[0])),
        np.zeros(len(z), bool),
    )
    for fit, held in dealt:
        known[held] = np.isin(labels[held], labels[fit])
        said[:, held] = parts(z[fit], labels[fit], weight[fit]).log_probabilities(
            jnp.asarray(z[held]), Mode()
        )
    made = parts(z, labels, weight)
    made.ensemble_weights[...] = jnp.asarray(
        estimate_ensemble_weights(said[:, known], labels[known]), jnp.float32
    )
    return made


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
    """The head with both its parts fitted, and the shares that it had."""
    made = nnx.clone(head)
    made.mlp = fit_mlp(head.mlp, z, labels, weight, smoothing, seed, mix=mix)
    made.logistic_regression = fit_logistic_regression(head.logistic_regression, z, labels, weight)
    return made


def estimate_ensemble_weights(
    said: Float[np.ndarray, "k n classes"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " k"]:
    """The shares under which the weighted sum of log-probabilities makes the labels likeliest."""
    from scipy.optimize import minimize

    start = np.full(len(said), 1 / len(said))
    if not len(labels):
        return start
    right = said[:, np.arange(len(labels)), labels]

    def loss(shares: np.ndarray) -> tuple[float, np.ndarray]:  # convex in the shares
        logits = np.tensordot(shares, said, 1)
        logits -= logits.max(axis=1, keepdims=True)
        total = np.exp(logits).sum(axis=1)
        chance = np.exp(logits) / total[:, None]
        own = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        gradient = (said * chance).sum(axis=2).mean(axis=1) - right.mean(axis=1)
        return float((np.log(total) - own).mean()), gradient

    return minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(MIN_ENSEMBLE_WEIGHT, None)] * len(said)
    ).x


def fit_logistic_regression(
    model: Dense,
    z: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
) -> Dense:
    """The linear baseline's logistic regression on reduced features, each site counting by its weight."""
    from sklearn.linear_model import LogisticRegression

    kernel, bias = np.zeros(model.kernel.shape), np.full(model.bias.shape, NEVER)
    present = np.unique(labels)
    if len(present) > 1:
        scale = np.sqrt(
            2 * LINEAR_VARIANCE / z.shape[1]
        )  # the baseline's, of components and of statistics
        found = LogisticRegression(C=LINEAR_C, max_iter=300).fit(
            z * scale, labels, weight / weight.mean()
        )
        coefficients, constants = found.coef_, found.intercept_
        if len(present) == 2:  # told by one logit
            coefficients, constants = (
                np.concatenate([0 * one, one]) for one in (coefficients, constants)
            )
        kernel[:, present], bias[present] = scale * coefficients.T, constants
    else:
        bias[present] = 0
    made = nnx.clone(model)
    made.kernel[...], made.bias[...] = (
        jnp.asarray(kernel, jnp.float32),
        jnp.asarray(bias, jnp.float32),
    )
    return made


def fit_mlp(
    head: MLP,
    z: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    smoothing: float,
    seed: int,
    *,
    mix: float = MIX,
) -> MLP:
    """Trained on reduced features, each site counting by its weight; `mix` is mixup's, 0 mixes nothing."""
    graphdef, params = nnx.split(head, nnx.Param)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, head.skip.shape[1]), smoothing)
    data = (z.astype(np.float32), targets, (weight / weight.mean()).astype(np.float32))
    trained = _train_perceptron(
        graphdef, params, jax.random.key(seed), *map(jnp.asarray, data), mix=mix
    )
    return nnx.merge(graphdef, jax.device_get(trained))


@partial(jax.jit, static_argnums=0, static_argnames="mix")
def _train_perceptron(
    graphdef: nnx.GraphDef,
    params: Any,
    key: Array,
    z: Float[Array, "n e"],
    targets: Float[Array, "n classes"],
    weight: Float[Array, " n"],
    *,
    mix: float,
) -> Any:
    """The parameters after all steps. Parts of one size share a program, most of whose cost is to compile it."""
    size = min(BATCH, len(z))
    steps = max(LEAST_STEPS, EPOCHS * len(z) // size)
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, steps), weight_decay=DECAY)

    def loss(params: Any, key: Array) -> Float[Array, ""]:
        pick, pair, much, drop = jax.random.split(key, 4)
        rows = jax.random.randint(pick, (size,), 0, len(z))
        others = jax.random.permutation(pair, rows)
        share = jax.random.beta(much, mix, mix, (size,)) if mix else jnp.ones(size)
        share = jnp.maximum(share, 1 - share)

        def mixed(of: Array) -> Array:
            own = share.reshape(-1, *[1] * (of.ndim - 1))
            return own * of[rows] + (1 - own) * of[others]

        logits = nnx.merge(graphdef, params)(
            mixed(z), Mode(train=True, keys=jax.random.split(drop, size))
        )
        return (mixed(weight) * optax.softmax_cross_entropy(logits, mixed(targets))).mean()

    def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]

"""The training step: one pure body, however many devices run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.data.augmentation import RawBatch, prepare, record_keys
from perturbjax.models import Mode, Outputs
from perturbjax.training.loss import cross_entropy

#: Added to the seed of the augmentation for dropout, so that the two never share a key.
DROPOUT_STREAM = 1

DTYPES = {"float32": jnp.float32, "bf16": jnp.bfloat16}


class TrainState(NamedTuple):
    """All that changes while training.

    Attributes:
        params: nnx.Param state, float32.
        stats: nnx.BatchStat state, float32.
        opt_state: the optimizer's.
        step: steps taken.
    """

    params: Any
    stats: Any
    opt_state: Any
    step: Int[Array, ""]


class Sums(NamedTuple):
    """What a step adds to its epoch's metrics: divide by `weight`."""

    loss: Float[Array, ""]
    loss_weight: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


TrainStep = Callable[[TrainState, RawBatch], tuple[TrainState, Sums]]
PredictStep = Callable[[Any, Any, RawBatch], tuple[Float[Array, "b classes"], Float[Array, "b d"]]]
AttentionStep = Callable[[Any, Any, RawBatch], tuple[Float[Array, "b h w"]]]
SiteFeaturesStep = Callable[[Any, Any, RawBatch], tuple[Float[Array, "b d"]]]


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """(graph definition, parameters, statistics): once, at the edge; all inside is pure functions of these."""
    graphdef, *state = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = state
    return graphdef, params, stats


def initial_state(params: Any, stats: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, stats, optimizer.init(params), jnp.zeros((), jnp.int32))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    *,
    steps_per_epoch: int,
    class_weight: Float[Array, " classes"] | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    """Build `train_step(state, batch) -> (state, sums)`: augment, forward, backward, update.

    The step is pure. With `axis_name` it runs on one device's share of a batch under `pmap`, and reduces loss,
    gradients and BatchNorm statistics over that axis; without, it runs on the whole batch, sharded or not.
    """

    def train_step(state: TrainState, batch: RawBatch) -> tuple[TrainState, Sums]:
        epoch = state.step // steps_per_epoch
        with jax.named_scope("augment"):  # scopes name the parts of the step in a profile
            inputs = prepare(
                batch,
                seed=recipe.seed,
                epoch=epoch,
                augment=recipe.augment,
                input=recipe.input,
                train=True,
            )
        mode = Mode(
            train=True,
            weight=batch.weight,
            keys=jax.vmap(lambda key: jax.random.fold_in(key, DROPOUT_STREAM))(
                record_keys(recipe.seed, epoch, batch.record)
            ),
            axis_name=axis_name,
            dtype=DTYPES[recipe.model.precision],
        )

        def loss_sum(params: Any) -> tuple[Float[Array, ""], Any]:
            model = nnx.merge(graphdef, params, state.stats, copy=True)
            logits = model(inputs, mode).logits
            loss, weight = cross_entropy(
                logits,
                batch.label,
                smoothing=recipe.optim.label_smoothing,
                weight=batch.weight,
                class_weight=class_weight,
            )
            return loss, (weight, logits, nnx.state(model, nnx.BatchStat))

        (loss, (loss_weight, logits, stats)), gradients = jax.value_and_grad(
            loss_sum, has_aux=True
        )(state.params)
        correct = jnp.sum((logits.argmax(-1) == batch.label) * batch.weight)
        sums = Sums(loss, loss_weight, correct, batch.weight.sum())
        if axis_name is not None:
            sums, gradients = jax.lax.psum((sums, gradients), axis_name)
        gradients = jax.tree.map(lambda g: g / sums.loss_weight, gradients)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, stats, opt_state, state.step + 1), sums

    return train_step


def make_predict_step(graphdef: nnx.GraphDef, recipe: Recipe) -> PredictStep:
    """Build `predict_step(params, stats, batch) -> (probabilities, features)`: no augmentation, running statistics."""

    def predict_step(params: Any, stats: Any, batch: RawBatch) -> tuple[Array, Array]:
        outputs = _evaluate(graphdef, recipe, params, stats, batch)
        return jax.nn.softmax(outputs.logits), outputs.features

    return predict_step


def make_attention_step(graphdef: nnx.GraphDef, recipe: Recipe) -> AttentionStep:
    """Build `attention_step(params, stats, batch) -> (attention,)`, of the same pass as `make_predict_step`'s.

    The step raises an `InputError` where the network has no attention.
    """

    def attention_step(params: Any, stats: Any, batch: RawBatch) -> tuple[Array]:
        attention = _evaluate(graphdef, recipe, params, stats, batch).attention
        if attention is None:
            raise InputError(
                f"attention: {recipe.model.model} has none; attention, attention_multiscale and --head attention have"
            )
        return (attention,)

    return attention_step


def make_site_features_step(graphdef: nnx.GraphDef, recipe: Recipe) -> SiteFeaturesStep:
    """Build `describe_step(params, stats, batch) -> (described,)` of a `EnsembleClassifier`, see its `compute_features`."""

    def describe_step(params: Any, stats: Any, batch: RawBatch) -> tuple[Array]:
        inputs, mode = evaluation_input(recipe, batch)
        return (nnx.merge(graphdef, params, stats, copy=True).compute_features(inputs, mode),)

    return describe_step


def _evaluate(
    graphdef: nnx.GraphDef, recipe: Recipe, params: Any, stats: Any, batch: RawBatch
) -> Outputs:
    inputs, mode = evaluation_input(recipe, batch)
    return nnx.merge(graphdef, params, stats, copy=True)(inputs, mode)


def evaluation_input(
    recipe: Recipe, batch: RawBatch
) -> tuple[Float[Array, "b crop crop planes"], Mode]:
    """The input without augmentation, and how it is looked at."""
    inputs = prepare(
        batch, seed=recipe.seed, epoch=0, augment=recipe.augment, input=recipe.input, train=False
    )
    return inputs, Mode(dtype=DTYPES[recipe.model.precision])

"""Training and prediction steps as pure functions of pytrees.

The same `train_step` runs under `jit` on one device, under `jit` with rows sharded over a mesh, and
under `pmap`.
All three give the same numbers up to float32 rounding: sums, not means, are reduced over devices,
    and the division by
the total weight comes last. Random numbers depend on (seed, epoch, record) only, not on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from perturbjax.core.choices import MASK_ENCODINGS
from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.data.augmentation import RawBatch, record_keys
from perturbjax.data.bags import prepare_input
from perturbjax.data.normalization import normalize
from perturbjax.models import Mode, Outputs
from perturbjax.models.bags import Bags
from perturbjax.models.ensemble_head import map_in_chunks
from perturbjax.training.loss import cross_entropy

#: Folded into each record's augmentation key to derive its dropout key, so that the two streams are
#: independent.
DROPOUT_STREAM = 1

DTYPES = {"float32": jnp.float32, "bf16": jnp.bfloat16}


class TrainState(NamedTuple):
    """Arrays that change during training.

    Attributes:
        params: trainable parameters (`nnx.Param` state), float32.
        stats: running statistics and fitted constants (`nnx.BatchStat` state), float32.
        opt_state: state of the optimizer.
        step: number of steps since the start of training.
    """

    params: Any
    stats: Any
    opt_state: Any
    step: Int[Array, ""]


class Sums(NamedTuple):
    """Contribution of one step to the metrics of its epoch; divide by the weights to get means."""

    loss: Float[Array, ""]
    loss_weight: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


TrainStep = Callable[[TrainState, RawBatch], tuple[TrainState, Sums]]
#: Function (params, stats, batch) -> outputs with one row per record.
EvaluationStep = Callable[[Any, Any, Any], tuple[Shaped[Array, " b *_"], ...]]


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """Split a network into (graph definition, parameters, statistics) for use in pure functions."""
    graphdef, *state = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = state
    return graphdef, params, stats


def initial_state(params: Any, stats: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
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
    """Build the step: augmentation, forward pass, backward pass, parameter update.

    Args:
        graphdef: network from `split_model`.
        optimizer: optax transformation.
        recipe: augmentation, input, loss and precision settings.
        steps_per_epoch: number of steps in an epoch; the epoch seeds the augmentation.
        class_weight: (classes,) weight of each class in the loss; None weights all equally.
        axis_name: device axis of `pmap`, over which loss, gradients and BatchNorm statistics are
            summed. None under `jit`, where the compiler inserts these sums.

    Returns:
        A pure function `train_step(state, batch) -> (state, sums)`.
    """

    def train_step(state: TrainState, batch: RawBatch) -> tuple[TrainState, Sums]:
        # A traced value, so that one compiled program serves all epochs.
        epoch = state.step // steps_per_epoch
        with jax.named_scope("augment"):  # scopes appear in the profile table
            inputs = prepare_input(
                batch,
                seed=recipe.seed,
                epoch=epoch,
                augment=recipe.augment,
                input=recipe.input,
                train=True,
            )
        mode = Mode(
            train=True,
            # Padded rows have weight 0 and do not enter the BatchNorm statistics.
            weight=batch.weight,
            keys=jax.vmap(lambda key: jax.random.fold_in(key, DROPOUT_STREAM))(
                record_keys(recipe.seed, epoch, batch.record)
            ),
            axis_name=axis_name,
            dtype=DTYPES[recipe.model.precision],
        )

        def loss_sum(params: Any) -> tuple[Float[Array, ""], Any]:
            # BatchNorm updates its statistics in place. The copy confines the update to this model,
            # so that the function stays pure.
            model = nnx.merge(graphdef, params, state.stats, copy=True)
            logits = model(inputs, mode).logits
            loss, weight = cross_entropy(
                logits,
                batch.label,
                smoothing=recipe.optim.label_smoothing,
                weight=batch.weight,
                class_weight=class_weight,
            )
            # Auxiliary outputs: total weight, logits (b, classes) and the updated statistics.
            return loss, (weight, logits, nnx.state(model, nnx.BatchStat))

        (loss, (loss_weight, logits, stats)), gradients = jax.value_and_grad(
            loss_sum, has_aux=True
        )(state.params)
        # Padded rows have weight 0 and do not count.
        correct = jnp.sum((logits.argmax(-1) == batch.label) * batch.weight)
        sums = Sums(loss, loss_weight, correct, batch.weight.sum())
        # Under `pmap` these are sums over the rows of one device. Under `jit` they already cover
        # the whole batch.
        if axis_name is not None:
            sums, gradients = jax.lax.psum((sums, gradients), axis_name)
        # Gradient of the mean: divided after the sum over devices, whose rows can have different
        # total weights.
        gradients = jax.tree.map(lambda g: g / sums.loss_weight, gradients)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        return TrainState(params, stats, opt_state, state.step + 1), sums

    return train_step


def make_predict_step(graphdef: nnx.GraphDef, recipe: Recipe) -> EvaluationStep:
    """Build `predict_step(params, stats, batch) -> (probabilities, features)`."""

    def predict_step(params: Any, stats: Any, batch: RawBatch) -> tuple[Array, Array]:
        outputs = _apply(graphdef, recipe, params, stats, batch)
        return jax.nn.softmax(outputs.logits), outputs.features

    return predict_step


def make_attention_step(graphdef: nnx.GraphDef, recipe: Recipe) -> EvaluationStep:
    """Build `attention_step(params, stats, batch) -> (attention,)`.

    The step raises an `InputError` if the network has no attention map.
    """

    def attention_step(params: Any, stats: Any, batch: RawBatch) -> tuple[Array]:
        if recipe.transfer.head == "channels":
            # The attention map needs no backbone, whose tracing takes a second.
            inputs, mode = evaluation_input(recipe, batch)
            model = nnx.merge(graphdef, params, stats, copy=True)
            attention = model.run_branch(inputs, mode).attention
        else:
            attention = _apply(graphdef, recipe, params, stats, batch).attention
        if attention is None:
            raise InputError(
                f"attention: model {recipe.model.model} has no attention map. Use a run with "
                "--model attention, "
                "--model attention_multiscale or --head attention."
            )
        return (attention,)

    return attention_step


def make_cell_attention_step(graphdef: nnx.GraphDef, recipe: Recipe) -> EvaluationStep:
    """Build `cell_attention_step(params, stats, batch) -> (weights,)` of a network on cells."""

    def cell_attention_step(params: Any, stats: Any, batch: RawBatch) -> tuple[Array]:
        weights = _apply(graphdef, recipe, params, stats, batch).cell_attention
        if weights is None:
            raise InputError(
                f"attention of cells: model {recipe.model.model} was trained on whole sites. Use a "
                "run of --preset wells."
            )
        return (weights,)

    return cell_attention_step


def make_site_features_step(graphdef: nnx.GraphDef, recipe: Recipe) -> EvaluationStep:
    """Build `site_features_step(params, stats, batch) -> (features,)` of an ensemble classifier.

    These are the features before reduction, see `EnsembleClassifier.compute_features`.
    """

    def site_features_step(params: Any, stats: Any, batch: RawBatch) -> tuple[Array]:
        inputs, mode = _frozen_input(recipe, batch)
        model = nnx.merge(graphdef, params, stats, copy=True)
        windows = window_features(model, recipe, batch, mode)
        return (model.compute_features(inputs, mode, windows),)

    return site_features_step


def make_masked_features_step(graphdef: nnx.GraphDef, recipe: Recipe) -> EvaluationStep:
    """Build a site features step for several masks of the same images.

    The step is `step(params, stats, batches) -> (features (b, m, d),)`. The m batches differ in
    their masks only.
    """

    site_features_step = make_site_features_step(graphdef, recipe)

    def masked_features_step(params: Any, stats: Any, batches: Sequence[RawBatch]) -> tuple[Array]:
        if uses_windows(recipe, batches[0]):
            # Masks determine the windows, too.
            each = [site_features_step(params, stats, batch)[0] for batch in batches]
            return (jnp.stack(each, axis=1),)
        inputs, mode = zip(*(_frozen_input(recipe, batch) for batch in batches), strict=True)
        masks = jnp.concatenate([one[..., :1] for one in inputs], axis=-1)
        model = nnx.merge(graphdef, params, stats, copy=True)
        return (model.compute_features_of_masks(masks, inputs[0][..., 1:], mode[0]),)

    return masked_features_step


def _frozen_input(recipe: Recipe, batch: RawBatch) -> tuple[Any, Mode]:
    """Return the input of `evaluation_input` and the mode of a frozen backbone."""
    inputs, mode = evaluation_input(recipe, batch)
    return inputs, dataclasses.replace(mode, use_onednn=True)


def make_head_step(graphdef: nnx.GraphDef, recipe: Recipe) -> EvaluationStep:
    """Build the prediction step of an ensemble classifier from given site features.

    The step is `head_step(params, stats, (batch, site_features)) -> (probabilities, features)`.
    """

    def head_step(
        params: Any, stats: Any, batch: tuple[RawBatch, Float[Array, "b d"]]
    ) -> tuple[Array, Array]:
        inputs, mode = evaluation_input(recipe, batch[0])
        model = nnx.merge(graphdef, params, stats, copy=True)
        outputs = model.classify(inputs, batch[1], mode)
        return jax.nn.softmax(outputs.logits), outputs.features

    return head_step


def _apply(
    graphdef: nnx.GraphDef, recipe: Recipe, params: Any, stats: Any, batch: RawBatch
) -> Outputs:
    inputs, mode = evaluation_input(recipe, batch)
    model = nnx.merge(graphdef, params, stats, copy=True)
    windows = window_features(model, recipe, batch, mode)
    if windows is None:
        return model(inputs, mode)
    return model.classify(inputs, model.compute_features(inputs, mode, windows), mode)


def uses_windows(recipe: Recipe, batch: RawBatch) -> bool:
    """Whether the backbone gets windows, because sites are larger than the network input."""
    return bool(recipe.transfer.window) and max(batch.image.shape[1:3]) > recipe.augment.crop


def window_features(
    model: Any, recipe: Recipe, batch: RawBatch, mode: Mode
) -> Float[Array, "b d"] | None:
    """Compute the backbone features of windows of native resolution.

    Returns:
        None if the recipe does not use windows for these sites.
    """
    if not uses_windows(recipe, batch):
        return None
    size = recipe.transfer.window

    def pool(raw: RawBatch) -> Float[Array, "b d"]:
        image = raw.image.astype(jnp.float32)
        image = normalize(image, raw.shift, raw.scale, recipe.input.normalize)
        mask = raw.mask.astype(jnp.float32) * MASK_ENCODINGS[recipe.input.mask_encoding].scale
        is_used = recipe.input.mask_use != "none"
        stored = jnp.concatenate([mask[..., None] * is_used, image[..., : model.channels]], axis=-1)
        # Only this encoding distinguishes the cells; without it, windows are on a grid.
        by_cell = is_used and recipe.input.mask_encoding == "instance"
        return model.pool_windows(stored, raw.mask if by_cell else 0 * raw.mask, size, mode)

    # In chunks, because sites of native resolution are large.
    return map_in_chunks(pool, batch)


def evaluation_input(
    recipe: Recipe, batch: RawBatch
) -> tuple[Float[Array, "b crop crop planes"] | Bags, Mode]:
    """Return the network input without augmentation, and the evaluation mode of the layers."""
    inputs = prepare_input(
        # A fixed epoch: with `legacy_augmentation`, evaluation draws random numbers, too.
        batch,
        seed=recipe.seed,
        epoch=0,
        augment=recipe.augment,
        input=recipe.input,
        train=False,
    )
    return inputs, Mode(dtype=DTYPES[recipe.model.precision])

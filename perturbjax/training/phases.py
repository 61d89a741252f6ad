"""The network of a recipe, and the phases in which it is trained: two where it starts from published weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optax
from flax import nnx

from perturbjax import models
from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.config import Recipe
from perturbjax.models import transfer
from perturbjax.training.optimizer import Schedule, make_optimizer, schedules
from perturbjax.training.step import split_model


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs with one optimizer, which begins afresh.

    Attributes:
        name: what moves.
        first, stop: epochs, counted from 0; `stop` is the first that is no longer of it.
        graphdef: of the network as it is trained here.
        learning_rate: of every step of the phase, counted from 0.
    """

    name: transfer.Phase
    first: int
    stop: int
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    learning_rate: Schedule


def create_network(
    recipe: Recipe,
    channels: int,
    class_names: Sequence[str],
    pretrained: dict[str, Any] | None = None,
) -> tuple[nnx.Module, dict[str, Any] | None]:
    """The recipe's network for the image channels that it sees, and where published weights in it came from.

    With `pretrained`, those facts of a run that was started, the network has no values where it would take published
    weights: a checkpoint is to fill it, and the weights need not be there any more.

    Raises:
        InputError: there is no such network, or its weights cannot be had.
    """
    shape: dict[str, Any] = {
        "classes": len(class_names),
        "channels": channels,
        "dropout": recipe.model.dropout,
    }
    copies = NORMALIZATIONS[recipe.input.normalize].copies
    if pretrained is not None:
        return transfer.abstract_classifier(
            pretrained, recipe.transfer, **shape, copies=copies
        ), pretrained
    if recipe.transfer.weights:
        return transfer.build(
            recipe.model.model, recipe.transfer, **shape, copies=copies, seed=recipe.seed
        )
    return models.create(
        recipe.model.model, **shape, seed=recipe.seed, image_size=recipe.augment.crop
    ), None


def plan_phases(
    recipe: Recipe, graphdef: nnx.GraphDef, params: Any, stats: Any, steps_per_epoch: int
) -> list[Phase]:
    """The phases of a run, in order; each has a one-cycle schedule of its own."""
    epochs, transferred = recipe.optim.epochs, recipe.transfer
    frozen = min(transferred.freeze_epochs, epochs) if transferred.weights else 0
    if transferred.head == "channels":  # its backbone always stands still
        frozen = epochs
    phases = []
    parts: list[tuple[transfer.Phase, int, int]] = [
        ("new layers", 0, frozen),
        ("all layers", frozen, epochs),
    ]
    for name, first, stop in parts:
        if first == stop:
            continue
        steps = (stop - first) * steps_per_epoch
        optimizer, graph = make_optimizer(recipe.optim, steps), graphdef
        if recipe.transfer.weights:
            scales = transfer.rate_scales(
                params, name, recipe.transfer, models.BACKBONES[recipe.model.model]
            )
            optimizer = transfer.scale_updates(optimizer, scales)
            graph, *_ = split_model(
                transfer.set_phase(nnx.merge(graphdef, params, stats, copy=True), name)
            )
        phases.append(Phase(name, first, stop, graph, optimizer, schedules(recipe.optim, steps)[0]))
    return phases

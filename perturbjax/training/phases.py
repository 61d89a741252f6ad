"""Network of a recipe, and its training phases."""

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
from perturbjax.models.bags import BagClassifier
from perturbjax.training.optimizer import Schedule, make_optimizer, one_cycle
from perturbjax.training.step import split_model


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs with one optimizer, which has a new state at the first epoch.

    Attributes:
        name: layers that are trained.
        first: first epoch, from 0.
        stop: epoch after the last one.
        graphdef: graph definition of the network in this phase.
        optimizer: optimizer with its schedule.
        learning_rate: learning rate of each step of the phase, from 0.
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
    *,
    abstract: bool = False,
) -> tuple[nnx.Module, dict[str, Any] | None]:
    """Create the network of a recipe.

    Args:
        recipe: architecture, input and transfer settings.
        channels: number of image channels of the network input.
        class_names: names of the classes.
        pretrained: provenance of the weights in an existing run. Pretrained layers are then created
            without values, because a checkpoint supplies them; the weight file is not needed.
        abstract: create the parameters without values. Dozens of small programs that draw random
            numbers would otherwise be compiled and run.

    Returns:
        The network, and the provenance of its pretrained weights (None if it has none).

    Raises:
        InputError: the architecture is unknown, or its weights are not available.
    """
    copies = NORMALIZATIONS[recipe.input.normalize].copies
    shape: dict[str, Any] = {
        "classes": len(class_names),
        "channels": channels,
        "dropout": recipe.model.dropout,
    }
    network: nnx.Module
    if pretrained is not None:
        network = transfer.abstract_classifier(pretrained, recipe.transfer, **shape, copies=copies)
        return _for_input(network, recipe), pretrained
    name, seed = recipe.model.model, recipe.seed
    if recipe.transfer.weights:
        network, facts = transfer.build(name, recipe.transfer, **shape, copies=copies, seed=seed)
        return _for_input(network, recipe), facts

    def create() -> nnx.Module:
        network = models.create(name, **shape, seed=seed, image_size=recipe.augment.crop)
        return _for_input(network, recipe)

    return (nnx.eval_shape(create) if abstract else create()), None


def _for_input(network: nnx.Module, recipe: Recipe) -> nnx.Module:
    """Add the attention over cells to a network whose input is a bag of cells."""
    return BagClassifier(network, seed=recipe.seed) if recipe.input.cells else network


def plan_phases(
    recipe: Recipe, graphdef: nnx.GraphDef, params: Any, stats: Any, steps_per_epoch: int
) -> list[Phase]:
    """Return the phases of a training in order, each with a one-cycle schedule.

    A network with pretrained weights is trained in two phases: first the new layers with a frozen
        backbone, then all
    layers. Other networks have the second phase only.
    """
    epochs, config = recipe.optim.epochs, recipe.transfer
    # Without pretrained weights there is no phase with a frozen backbone.
    frozen = min(config.freeze_epochs, epochs) if config.weights else 0
    if config.head == "channels":  # the backbone of the ensemble is always frozen
        frozen = epochs
    ranges: list[tuple[transfer.Phase, int, int]] = [
        ("new layers", 0, frozen),
        ("all layers", frozen, epochs),
    ]
    phases = []
    for name, first, stop in ranges:
        # A range without epochs is not a phase.
        if first == stop:
            continue
        # Each phase has a complete one-cycle schedule.
        steps = (stop - first) * steps_per_epoch
        optimizer, graph = make_optimizer(recipe.optim, steps), graphdef
        if config.weights:
            backbone = models.BACKBONES[recipe.model.model]
            scales = transfer.rate_scales(params, name, config, backbone)
            # Pretrained layers can have a smaller learning rate; frozen layers have none.
            optimizer = transfer.scale_updates(optimizer, scales)
            # The graph definition contains which layers are frozen, so each phase has another one.
            model = nnx.merge(graphdef, params, stats, copy=True)
            graph, *_ = split_model(transfer.set_phase(model, name))
        rate = one_cycle(recipe.optim.learning_rate, steps, recipe.optim.warmup)
        phases.append(Phase(name, first, stop, graph, optimizer, rate))
    return phases

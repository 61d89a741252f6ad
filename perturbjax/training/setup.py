"""All that is decided before training: the data, who trains and who judges, and the fresh network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float, Int

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console
from perturbjax.data.batches import BatchOrder, Decoder, Sites, describe_sites
from perturbjax.data.exclusion import read_rules
from perturbjax.data.normalization import count_input_channels
from perturbjax.data.splits import TEST, TRAIN, create_manifest
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.training.checkpoint import Checkpoints, state_to_tree, tree_to_state
from perturbjax.training.devices import Placement
from perturbjax.training.loss import class_weights
from perturbjax.training.phases import Phase, create_network
from perturbjax.training.run_directory import Run
from perturbjax.training.step import split_model


@dataclass(frozen=True)
class Experiment:
    """The recipe, who trains, who judges, and the fresh network."""

    recipe: Recipe
    dataset: Dataset
    manifest: pd.DataFrame
    label_column: str
    sites: Sites
    train: Int[np.ndarray, " n_train"]
    test: Int[np.ndarray, " n_test"]
    graphdef: Any
    params: Any
    stats: Any
    pretrained: dict[str, Any] | None
    """Where published weights in the network came from."""

    @property
    def class_names(self) -> list[str]:
        return list(self.sites.class_names)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def decoder(self) -> Decoder:
        """What is fed of every record."""
        return Decoder(self.dataset, self.sites, self.recipe.input, self.recipe.augment)

    @property
    def order(self) -> BatchOrder:
        """The order of all epochs."""
        optim = self.recipe.optim
        steps, least = optim.steps_per_epoch, -(-optim.least_steps // optim.epochs)
        if not steps and least * optim.batch_size > len(self.train):
            steps = least
        return BatchOrder.shuffled_epochs(
            self.recipe.seed, self.train, optim.batch_size, optim.epochs, steps
        )

    @property
    def class_weight(self) -> Float[Array, " classes"] | None:
        """What the loss multiplies a site of each class by; None where all count the same."""
        power = self.recipe.optim.balance
        if not power:
            return None
        counts = np.bincount(self.sites.labels[self.train], minlength=len(self.class_names))
        return jnp.asarray(class_weights(counts, power))


def prepare_experiment(
    recipe: Recipe,
    data: tuple[Path, ...],
    *,
    resumed: Run | None = None,
    init_from: Path | None = None,
) -> Experiment:
    """Open the data, deal the split and initialise the network; nothing is written.

    Args:
        data: dataset directories.
        resumed: the run whose recipe, data and split are taken, where one is gone on with by what it says.
        init_from: the run whose parameters are started from.

    Raises:
        InputError: the recipe, the data or the run cannot be used, or do not fit each other.
    """
    if resumed is not None:
        recipe, dataset, label_column = (
            resumed.recipe,
            resumed.open_data(data),
            resumed.label_column,
        )
        manifest = resumed.manifest(dataset.index)
    else:
        if not data:
            raise InputError(
                "--data: is required; give the dataset directory that `perturbjax build` wrote"
            )
        dataset = open_dataset(data)
        label_column = dataset.column(recipe.input.label_column or dataset.label_column).name
        # The rules themselves are part of the recipe, not the file they stood in: that may change.
        recipe = replace(
            recipe, split=replace(recipe.split, exclude=read_rules(recipe.split.exclude))
        )
        manifest = create_manifest(
            dataset.index, recipe.split, label=label_column, seed=recipe.seed
        )
    labels = dataset.index.set_index("site_id").loc[manifest["site_id"], label_column].astype(str)
    class_names = sorted(labels.unique())
    model, pretrained = create_network(
        recipe, count_input_channels(dataset, recipe.input), class_names
    )
    graphdef, params, stats = split_model(model)
    if init_from is not None:
        params, stats = _parameters_from(init_from, params, stats)
    train, test = (positions_of_part(dataset, manifest, part) for part in (TRAIN, TEST))
    return Experiment(
        recipe=recipe,
        dataset=dataset,
        manifest=manifest,
        label_column=label_column,
        sites=describe_sites(dataset, recipe.input, class_names, seed=recipe.seed),
        train=train,
        test=test,
        graphdef=graphdef,
        params=params,
        stats=stats,
        pretrained=pretrained,
    )


def positions_of_part(dataset: Dataset, manifest: pd.DataFrame, part: str) -> Int[np.ndarray, " n"]:
    """Positions in the dataset of the sites of one part of a split."""
    sites = set(manifest.loc[manifest["part"] == part, "site_id"])
    return np.flatnonzero(dataset.index["site_id"].isin(sites)).astype(np.int32)


def _parameters_from(path: Path, params: Any, stats: Any) -> tuple[Any, Any]:
    """Parameters and statistics of another run; what has another shape here keeps its fresh value."""
    template = {"params": params, "stats": stats}
    fresh = state_to_tree(template)
    tree, _ = Checkpoints(path).load()
    taken = {k: tree[k] if k in tree and tree[k].shape == v.shape else v for k, v in fresh.items()}
    anew = [k for k, v in fresh.items() if taken[k] is v]
    if len(anew) == len(fresh):
        raise InputError(f"--init-from {path}: shares no array with this model")
    console.print(f"started from {path}" + (f"; fresh: {', '.join(anew)}" if anew else ""))
    merged = tree_to_state(taken, template, path)
    return merged["params"], merged["stats"]


def print_training_summary(
    experiment: Experiment, placement: Placement, phases: list[Phase], done: int
) -> None:
    """What is about to be trained, on what, by which split, and how many steps of it are done."""
    recipe, policy = experiment.recipe, experiment.recipe.split
    device = placement.mesh.devices.flat[0]
    console.print(
        f"{recipe.model.model} on {placement.count} {device.platform} device(s), {recipe.model.precision}; "
        f"{len(experiment.train)} sites train, {len(experiment.test)} judge, {len(experiment.class_names)} classes "
        f"of {experiment.label_column}"
    )
    if experiment.pretrained is not None:
        moves = "; ".join(
            f"epochs {phase.first + 1} to {phase.stop}: {phase.name}" for phase in phases
        )
        console.print(
            f"weights from {experiment.pretrained['source']} (SHA-256 {experiment.pretrained['sha256'][:12]}…)"
        )
        console.print(f"{moves} move")
    if policy.split_file:
        console.print(f"split from {policy.split_file}")
    else:
        console.print(f"split by {policy.split}: {SPLIT_POLICIES[policy.split].meaning}")
    for sentence in experiment.manifest.attrs.get("excluded", ()):
        console.print(sentence)
    epochs, steps = divmod(done, experiment.steps_per_epoch)
    if done:
        within = f" and {steps} of {experiment.steps_per_epoch} steps" if steps else ""
        console.print(f"going on after epoch {epochs}{within} of {recipe.optim.epochs}")

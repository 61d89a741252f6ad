"""Inputs of a training: dataset, train/test split, class weights and the untrained network."""

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
from perturbjax.core.position import position_warnings
from perturbjax.data.batches import BatchOrder, Decoder, Sites, describe_sites
from perturbjax.data.cells import CROP_MULTIPLE, crop_pixels, estimate_crop_size
from perturbjax.data.exclusion import read_rules
from perturbjax.data.normalization import count_input_channels
from perturbjax.data.splits import TEST, TRAIN, VALIDATION, create_manifest
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.models.kernels import onednn
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.checkpoint_arrays import state_to_tree, tree_to_state
from perturbjax.training.devices import Placement
from perturbjax.training.loss import class_weights
from perturbjax.training.phases import Phase, create_network
from perturbjax.training.run_directory import Run
from perturbjax.training.step import split_model


@dataclass(frozen=True)
class Experiment:
    """Inputs of a training.

    Attributes:
        recipe: settings that determine the numbers.
        dataset: records of all sites.
        manifest: split, one row for each site.
        label_column: column that is predicted.
        sites: labels and normalization of all records.
        train: positions of the training sites in the dataset.
        validation: positions of the validation sites; empty without `--validation-fraction`.
        test: positions of the test sites.
        graphdef: graph definition of the network.
        params: initial parameters.
        stats: initial statistics.
        pretrained: provenance of pretrained weights, or None.
    """

    recipe: Recipe
    dataset: Dataset
    manifest: pd.DataFrame
    label_column: str
    sites: Sites
    train: Int[np.ndarray, " n_train"]
    validation: Int[np.ndarray, " n_validation"]
    test: Int[np.ndarray, " n_test"]
    graphdef: Any
    params: Any
    stats: Any
    pretrained: dict[str, Any] | None

    @property
    def class_names(self) -> list[str]:
        return list(self.sites.class_names)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def decoder(self) -> Decoder:
        """Decoder of the records for the batch pipeline."""
        return Decoder(self.dataset, self.sites, self.recipe.input, self.recipe.decoded_augment)

    @property
    def order(self) -> BatchOrder:
        """BatchOrder of the training sites in all epochs."""
        optim = self.recipe.optim
        # Steps of each epoch that reach `least_steps` over all epochs, rounded up.
        steps, minimum = optim.steps_per_epoch, -(-optim.least_steps // optim.epochs)
        # A small dataset gets longer epochs, in which each site occurs several times.
        if not steps and minimum * optim.batch_size > len(self.train):
            steps = minimum
        return BatchOrder.shuffled_epochs(
            self.recipe.seed, self.train, optim.batch_size, optim.epochs, steps
        )

    @property
    def class_weight(self) -> Float[Array, " classes"] | None:
        """Weight of each class in the loss; None if all classes have the same."""
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
    """Open the data, split the sites and initialize the network; no files are written.

    Args:
        recipe: settings of the training.
        data: dataset directories.
        resumed: run to resume; its recipe, data and split replace those of the other arguments.
        init_from: run that supplies the initial parameters.

    Raises:
        InputError: the recipe, the data or the run are not usable, or do not fit each other.
    """
    if resumed is not None:
        recipe, label_column = resumed.recipe, resumed.label_column
        dataset = resumed.open_data(data)
        # The stored split is used, so that later changes of a split file have no effect.
        manifest = resumed.manifest(dataset.index)
    else:
        if not data:
            raise InputError(
                "--data: is required; pass a dataset directory from `perturbjax build`"
            )
        dataset = open_dataset(data)
        label_column = dataset.column(recipe.input.label_column or dataset.label_column).name
        # The recipe stores the rules themselves, because a file of rules can change later.
        rules = read_rules(recipe.split.exclude)
        recipe = replace(recipe, split=replace(recipe.split, exclude=rules))
        manifest = create_manifest(
            dataset.index, recipe.split, label=label_column, seed=recipe.seed
        )
        recipe = _choose_cell_size(recipe, dataset)
        if not recipe.split.split_file:
            # The run stores the policy, not the request to choose one.
            recipe = replace(recipe, split=replace(recipe.split, split=manifest.attrs["policy"]))
    # Classes come from the sites of the split: a class with excluded sites only is left out.
    labels = dataset.index.set_index("site_id").loc[manifest["site_id"], label_column].astype(str)
    # Sorted: the order of the logits must not depend on the order of the sites.
    class_names = sorted(labels.unique())
    model, pretrained = create_network(
        recipe, count_input_channels(dataset, recipe.input), class_names
    )
    graphdef, params, stats = split_model(model)
    if init_from is not None:
        params, stats = _parameters_from(init_from, params, stats)
    return Experiment(
        recipe=recipe,
        dataset=dataset,
        manifest=manifest,
        label_column=label_column,
        sites=describe_sites(dataset, recipe.input, class_names, seed=recipe.seed),
        train=positions_of_part(dataset, manifest, TRAIN),
        validation=positions_of_part(dataset, manifest, VALIDATION),
        test=positions_of_part(dataset, manifest, TEST),
        graphdef=graphdef,
        params=params,
        stats=stats,
        pretrained=pretrained,
    )


def _choose_cell_size(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Set the window of a cell in pixels, so that other datasets are read at the same scale."""
    if not recipe.input.cells:
        return recipe
    size = crop_pixels(recipe.input.cell_size, dataset, "cell-size") or estimate_crop_size(dataset)
    # A length in micrometers is rounded up to the same multiple as the estimate.
    size = -(-size // CROP_MULTIPLE) * CROP_MULTIPLE
    if size != recipe.input.cell_size:
        console.print(f"info: windows of {size} x {size} pixels around each cell")
    return replace(recipe, input=replace(recipe.input, cell_size=size))


def positions_of_part(dataset: Dataset, manifest: pd.DataFrame, part: str) -> Int[np.ndarray, " n"]:
    """Return the positions in the dataset of the sites of one part of a split."""
    # Positions refer to the dataset, which can have more sites than the split.
    sites = set(manifest.loc[manifest["part"] == part, "site_id"])
    return np.flatnonzero(dataset.index["site_id"].isin(sites)).astype(np.int32)


def _parameters_from(path: Path, params: Any, stats: Any) -> tuple[Any, Any]:
    """Load parameters and statistics of another run, as far as the shapes agree."""
    template = {"params": params, "stats": stats}
    initial = state_to_tree(template)
    with Checkpoints(path) as checkpoints:
        tree, _ = checkpoints.load()
    loaded = {
        name: tree[name]
        for name, value in initial.items()
        # Layers of another shape, such as the head for other classes, remain initialized at random.
        if name in tree and tree[name].shape == value.shape
    }
    if not loaded:
        raise InputError(f"--init-from {path}: has no array in common with this model")
    new = [name for name in initial if name not in loaded]
    note = f"; newly initialized: {', '.join(new)}" if new else ""
    console.print(f"info: initial parameters from {path}{note}")
    # Later entries replace earlier ones: loaded arrays replace initial ones.
    merged = tree_to_state({**initial, **loaded}, template, path)
    return merged["params"], merged["stats"]


def warn_about_positions(index: pd.DataFrame, manifest: pd.DataFrame, label_column: str) -> None:
    """Print a warning if the well position predicts the label of the sites of a split."""
    sites = index[index["site_id"].isin(manifest["site_id"])]
    for warning in position_warnings(sites, label_column):
        console.print(f"warning: {warning}")


def print_training_summary(
    experiment: Experiment, placement: Placement, phases: list[Phase], done: int
) -> None:
    """Print network, devices, split, phases, the number of completed steps and layout warnings."""
    recipe, split = experiment.recipe, experiment.recipe.split
    platform = placement.mesh.devices.flat[0].platform
    library = " with oneDNN" if onednn.is_usable() else ""
    validation = (
        f"{len(experiment.validation):,} validation, " if len(experiment.validation) else ""
    )
    console.print(
        f"info: model {recipe.model.model} on {placement.count} {platform} device(s){library}, "
        f"{recipe.model.precision}; "
        f"{len(experiment.train):,} training, {validation}{len(experiment.test):,} test sites; "
        f"{len(experiment.class_names)} classes of {experiment.label_column}"
    )
    if experiment.pretrained is not None:
        trained = "; ".join(
            f"epochs {phase.first + 1} to {phase.stop}: training {phase.name}" for phase in phases
        )
        source, checksum = experiment.pretrained["source"], experiment.pretrained["sha256"][:12]
        console.print(f"info: pretrained weights from {source} (SHA-256 {checksum}…); {trained}")
    if split.split_file:
        console.print(f"info: split from {split.split_file}")
    else:
        console.print(f"info: split by {split.split}: {SPLIT_POLICIES[split.split].meaning}")
    for sentence in experiment.manifest.attrs.get("notes", ()):
        console.print(sentence)
    warn_about_positions(experiment.dataset.index, experiment.manifest, experiment.label_column)
    # Complete epochs, and steps of the interrupted one.
    epochs, steps = divmod(done, experiment.steps_per_epoch)
    if done:
        within = f" and {steps}/{experiment.steps_per_epoch} steps" if steps else ""
        console.print(f"info: resuming after {epochs}/{recipe.optim.epochs} epochs{within}")

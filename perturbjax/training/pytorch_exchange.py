"""Import and export of PyTorch checkpoints of the original program."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pandas as pd
from flax import nnx

from perturbjax.core.config import AugmentConfig, Recipe, preset
from perturbjax.core.errors import InputError
from perturbjax.core.files import file_digest, read_json
from perturbjax.core.messages import console
from perturbjax.core.options import only_flags, require_output, require_sound
from perturbjax.data import normalization
from perturbjax.data.normalization import count_input_channels
from perturbjax.data.splits import create_manifest, fingerprint
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.models import BACKBONES, FIXED_SIZE_NETWORKS
from perturbjax.models import pytorch as exchange
from perturbjax.training.checkpoint import CheckpointConfig, Checkpoints
from perturbjax.training.checkpoint_arrays import (
    Tree,
    select_network_arrays,
    state_to_tree,
    tree_to_state,
)
from perturbjax.training.run_directory import (
    Run,
    dataset_facts,
    is_list_of_text,
    open_run,
    require_whole_sites,
    start_run,
)
from perturbjax.training.run_lock import lock_run
from perturbjax.training.step import TrainState
from perturbjax.training.weight_metadata import Description, read_description, write_weights

#: Facts about the training data, which are not exported with the weights.
NOT_EXPORTED = ("split_fingerprint", "index_sha256", "imported")
#: Suffixes of weight files.
WEIGHTS = (".safetensors", ".pth")
#: Default label column, if neither a dataset nor a flag names one.
LABEL_COLUMN = "Metadata_pert_iname"


def recipe_for_import(name: str = "original") -> Recipe:
    """Return a preset with the default augmentation, which only training uses.

    Raises:
        InputError: the preset is unknown.
    """
    return dataclasses.replace(preset(name), augment=AugmentConfig())


def original_networks() -> list[str]:
    """Return the names of the networks of the original PyTorch program."""
    return [name for name, network in BACKBONES.items() if network.original]


@dataclass(frozen=True)
class ImportConfig:
    """Convert a PyTorch state dict to a run for evaluate, predict and train --init-from."""

    checkpoint: Path
    """State dict (.pth or .safetensors), or a training checkpoint that contains it."""
    out: Path
    """Run directory to write."""
    labels: Path | None = None
    """JSON list of class names in the order of the logits; by default those of export-torch, else
    the sorted labels of --data."""
    data: Path | None = None
    """Dataset directory for the evaluation."""
    recipe: Recipe = only_flags(
        recipe_for_import(), "model", "label_column", "normalize", "mask_encoding", "crop"
    )

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)


@dataclass(frozen=True)
class ExportConfig:
    """Write the network of a run as a PyTorch state dict."""

    chosen: CheckpointConfig
    out: Path
    """File to write: .pth (for torch.load with weights_only=True) or .safetensors."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, *WEIGHTS)


def import_run(config: ImportConfig) -> Run:
    """Create a run from a PyTorch state dict.

    A state dict does not store the train/test split. The run gets the split of its recipe, so its
    scores are valid only if the network was trained with that split.

    Raises:
        InputError: the checkpoint, the labels or the dataset are not usable or do not fit each
            other, or `out` is not empty.
    """
    recipe, out = config.recipe, Path(config.out)
    require_whole_sites(recipe, config.checkpoint)
    description = read_description(config.checkpoint)
    imported = exchange.import_state_dict(config.checkpoint, recipe.model.model)
    # Networks with a fixed input size require crops of this size.
    if imported.image_size is not None:
        augment = dataclasses.replace(recipe.augment, crop=imported.image_size)
        recipe = dataclasses.replace(recipe, augment=augment)
    dataset = None if config.data is None else open_dataset(config.data)
    label_column = recipe.input.label_column or _default_label_column(description, dataset)
    recipe = dataclasses.replace(
        recipe, input=dataclasses.replace(recipe.input, label_column=label_column)
    )
    class_names = _class_names(config, description, imported.classes, dataset, label_column)
    # The split and the statistics need a dataset; without one they are unknown.
    facts, manifest = _facts(config.checkpoint, recipe, imported.channels, dataset, description)
    data = () if dataset is None else (dataset.path.absolute(),)
    run = Run(out, recipe, data, class_names, facts)
    with lock_run(out):
        start_run(run, manifest)
        with Checkpoints(out) as checkpoints:
            if not checkpoints.epochs():  # absent also if an earlier import was killed
                step = jnp.int32(imported.batches)
                # Without optimizer state: the run is a starting point, not a training to resume.
                state = TrainState(imported.params, imported.stats, opt_state=(), step=step)
                checkpoints.save(state, epoch=0, facts=run.identity)
    if description is None:
        _print_assumptions(config, recipe)
    console.print(f"Imported {out}. Evaluate it with `perturbjax evaluate --run {out} --data DIR`.")
    return run


def export_run(config: ExportConfig) -> Path:
    """Write parameters and statistics of a run under the names of the original program.

    Raises:
        InputError: the run is not readable, its network is not one of the original program, or
            `out` is not writable.
    """
    run = open_run(config.chosen.folder)
    require_whole_sites(run.recipe, run.path)
    model = run.recipe.model.model
    layers = exchange.layers_of(model)
    with Checkpoints(run.path) as checkpoints:
        tree, facts = checkpoints.load(config.chosen.which, config.chosen.epoch or None)
    run.require_matching_files(facts, checkpoints.path)
    # The shape of the first convolution gives the number of input channels.
    first = f"params/{layers[0][1].replace('.', '/')}/kernel/value"
    if first not in tree:
        raise InputError(f"{run.path}: checkpoint has no array {first}; it is of another model")
    # Networks with global pooling accept any input size; the remaining ones depend on the crop.
    size = run.recipe.augment.crop if model in FIXED_SIZE_NETWORKS else None
    # Only names and shapes; the arrays come from the checkpoint.
    network = exchange.abstract_network(model, len(run.class_names), tree[first].shape[2], size)
    template = {"params": nnx.state(network, nnx.Param), "stats": nnx.state(network, nnx.BatchStat)}
    state = tree_to_state(select_network_arrays(tree), template, run.path)
    nnx.update(network, state["params"], state["stats"])
    tensors = exchange.state_dict(model, network, batches=int(tree["step"]))
    exported = {name: value for name, value in run.facts.items() if name not in NOT_EXPORTED}
    write_weights(config.out, tensors, Description(run.recipe, run.class_names, exported))
    console.print(f"Written: {config.out}")
    return Path(config.out)


def open_weight_file(path: Path) -> tuple[Run, Tree]:
    """Open a weight file of `export-torch`.

    Returns:
        A run in memory, and its parameters and statistics.

    Raises:
        InputError: the file is not readable, or has no description of the network input.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    description = read_description(path)
    if description is None:
        raise InputError(
            f"{path}: has no description of its recipe. Create a run from it with `perturbjax "
            "import-torch`."
        )
    imported = exchange.import_state_dict(path, description.recipe.model.model)
    run = Run(path, description.recipe, (), description.class_names, description.facts)
    return run, state_to_tree({"params": imported.params, "stats": imported.stats})


def recipe_of_weight_file(checkpoint: Path) -> Recipe | None:
    """Return the recipe in the description of a weight file; None without one."""
    description = read_description(checkpoint) if checkpoint.is_file() else None
    return None if description is None else description.recipe


def _default_label_column(description: Description | None, dataset: Dataset | None) -> str:
    if description is not None:
        return description.facts.get("label_column", LABEL_COLUMN)
    return LABEL_COLUMN if dataset is None else dataset.label_column


def _print_assumptions(config: ImportConfig, recipe: Recipe) -> None:
    """Warn that a state dict without description does not store its input settings."""
    guessed = "" if config.labels else " The order of the labels is a guess; pass --labels."
    console.print(
        f"warning: {config.checkpoint} has no description of its recipe. Assumed --crop "
        f"{recipe.augment.crop} "
        f"--normalize {recipe.input.normalize} --mask-encoding {recipe.input.mask_encoding}; other "
        "settings give "
        f"other predictions.{guessed}"
    )


def _class_names(
    config: ImportConfig,
    description: Description | None,
    classes: int,
    dataset: Dataset | None,
    label_column: str,
) -> list[str]:
    """Return the class names from a file, the description, the dataset, or as numbers."""
    if config.labels is not None:
        names, source = read_json(config.labels), str(config.labels)
        if not is_list_of_text(names):
            raise InputError(f"{source}: is not a JSON list of class names")
    elif description is not None:
        names, source = description.class_names, f"{config.checkpoint}, description"
    elif dataset is not None:
        names = sorted(dataset.column(label_column).astype(str).unique())
        source = f"{dataset.path}, {label_column}"
    else:
        return [f"class_{number:03d}" for number in range(classes)]
    if len(names) != classes or len(set(names)) != classes:
        raise InputError(
            f"{source}: has {len(set(names))} different class names, {config.checkpoint} has "
            f"{classes} logits. Pass "
            "--labels FILE with the names in the order of the logits."
        )
    return names


def _facts(
    checkpoint: Path,
    recipe: Recipe,
    channels: int,
    dataset: Dataset | None,
    description: Description | None,
) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Return facts and split of the run, as far as they are known."""
    label_column = recipe.input.label_column
    facts: dict[str, Any] = {
        "label_column": label_column,
        "imported": {"file": Path(checkpoint).name, "sha256": file_digest(Path(checkpoint))},
    }
    stored = {} if description is None else description.facts
    if dataset is None:
        # Facts of the description replace unknown ones; those of this import replace both.
        unknown = dict.fromkeys(("split_fingerprint", "channels", "image_dtype", "image_size"))
        return {**unknown, **stored, **facts}, None
    available = count_input_channels(dataset, recipe.input)
    if available != channels:
        raise InputError(
            f"{dataset.path}: has {available} channels with --normalize {recipe.input.normalize}, "
            f"{checkpoint} "
            f"requires {channels}. Change --normalize, or build the dataset with other --aggregate "
            "or --channels."
        )
    manifest = create_manifest(dataset.index, recipe.split, label=label_column, seed=recipe.seed)
    # Statistics of the training data take precedence over those of this dataset.
    statistics = stored.get("normalization") or normalization.fit_statistics(dataset, recipe.input)
    split_facts = {"split_fingerprint": fingerprint(manifest), "normalization": statistics}
    return {**facts, **split_facts, **dataset_facts(dataset)}, manifest

"""Checkpoints of the original program as runs of this one, and runs of this one as PyTorch checkpoints."""

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
from perturbjax.models import FIXED_SIZE_NETWORKS
from perturbjax.models import pytorch as exchange
from perturbjax.training.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    Tree,
    state_to_tree,
    tree_to_state,
)
from perturbjax.training.run_directory import Run, dataset_facts, locked, open_run, start_run
from perturbjax.training.step import TrainState
from perturbjax.training.weight_metadata import Description, read_description, write_weights

#: What a run knows of the split and the dataset it was trained on, which do not travel with its weights.
NOT_EXPORTED = ("split_fingerprint", "index_sha256", "imported")
#: How the files that weights are exchanged in end.
WEIGHTS = (".safetensors", ".pth")
#: The column that compounds are named in, where neither a dataset nor a flag says otherwise.
LABEL_COLUMN = "Metadata_pert_iname"


def recipe_for_import(name: str = "original") -> Recipe:
    """A preset without what it says of augmentation, which only training needs.

    Raises:
        InputError: there is no preset of that name.
    """
    return dataclasses.replace(preset(name), augment=AugmentConfig())


@dataclass(frozen=True)
class ImportConfig:
    """Convert a PyTorch state dict to a run for evaluate, predict and train --init-from."""

    checkpoint: Path
    """State dict (.pth or .safetensors), or a training checkpoint that contains it."""
    out: Path
    """Run directory to write."""
    labels: Path | None = None
    """JSON list of class names in the order of the logits; by default those of export-torch, else the sorted labels of
    --data."""
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
    """Make a run of a PyTorch state dict.

    Which sites the network was trained on is not in a state dict: the split of such a run is dealt by its recipe, and
    its scores are of unseen sites only where that is the split the network was trained by.

    Raises:
        InputError: the checkpoint, the labels or the dataset cannot be used or do not fit each other, or `out` is
            not empty.
    """
    recipe, out = config.recipe, Path(config.out)
    described = read_description(config.checkpoint)
    imported = exchange.import_state_dict(config.checkpoint, recipe.model.model)
    if imported.image_size is not None:
        recipe = dataclasses.replace(
            recipe, augment=dataclasses.replace(recipe.augment, crop=imported.image_size)
        )
    dataset = None if config.data is None else open_dataset(config.data)
    label_column = recipe.input.label_column or _known_label_column(described, dataset)
    recipe = dataclasses.replace(
        recipe, input=dataclasses.replace(recipe.input, label_column=label_column)
    )
    class_names = _class_names(config, described, imported.classes, dataset, label_column)
    facts, manifest = _facts(config.checkpoint, recipe, imported.channels, dataset, described)

    run = Run(
        out, recipe, () if dataset is None else (dataset.path.absolute(),), class_names, facts
    )
    with locked(out):  # one that was killed is found there, and finished
        start_run(run, manifest)
        checkpoints = Checkpoints(out)
        if not checkpoints.epochs():
            state = TrainState(
                imported.params, imported.stats, opt_state=(), step=jnp.int32(imported.batches)
            )
            checkpoints.save(state, epoch=0, facts=run.identity, accuracy=None)
        checkpoints.close()
    if described is None:
        _say_what_was_assumed(config, recipe, dataset)
    console.print(f"imported: {out}; judge it with `perturbjax evaluate --run {out} --data DIR`")
    return run


def export_run(config: ExportConfig) -> Path:
    """Write a run's parameters and statistics under the original's names.

    Raises:
        InputError: the run cannot be opened, its network is none of the original's, or `out` cannot be written.
    """
    run = open_run(config.chosen.run)
    model = run.recipe.model.model
    layers = exchange.layers_of(model)
    checkpoints = Checkpoints(run.path)
    tree, known = checkpoints.load(config.chosen.which, config.chosen.epoch or None)
    checkpoints.close()
    run.require_matching_files(known, checkpoints.path)
    first = f"params/{layers[0][1].replace('.', '/')}/kernel/value"
    if first not in tree:
        raise InputError(f"{run.path}: its checkpoint has no {first}; it belongs to another model")
    size = run.recipe.augment.crop if model in FIXED_SIZE_NETWORKS else None
    network = exchange.abstract(model, len(run.class_names), tree[first].shape[2], size)
    template = {"params": nnx.state(network, nnx.Param), "stats": nnx.state(network, nnx.BatchStat)}
    kept = {name: value for name, value in tree.items() if name.startswith(("params/", "stats/"))}
    filled = tree_to_state(kept, template, run.path)
    nnx.update(network, filled["params"], filled["stats"])
    tensors = exchange.state_dict(model, network, batches=int(tree["step"]))
    facts = {name: value for name, value in run.facts.items() if name not in NOT_EXPORTED}
    write_weights(config.out, tensors, Description(run.recipe, run.class_names, facts))
    console.print(f"written: {config.out}")
    return Path(config.out)


def open_weight_file(path: Path) -> tuple[Run, Tree]:
    """The run that a weight file of `export-torch` describes, in memory alone, and its parameters and statistics.

    Raises:
        InputError: the file cannot be read, or does not say what its network was fed.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    described = read_description(path)
    if described is None:
        raise InputError(
            f"{path}: says nothing of its recipe; make a run of it with `perturbjax import-torch`"
        )
    imported = exchange.import_state_dict(path, described.recipe.model.model)
    run = Run(path, described.recipe, (), described.class_names, described.facts)
    return run, state_to_tree({"params": imported.params, "stats": imported.stats})


def recipe_of_weight_file(checkpoint: Path) -> Recipe | None:
    """The recipe that `export-torch` wrote with a weight file; None where there is none."""
    described = read_description(checkpoint) if checkpoint.is_file() else None
    return None if described is None else described.recipe


def _known_label_column(described: Description | None, dataset: Dataset | None) -> str:
    if described is not None:
        return described.facts.get("label_column", LABEL_COLUMN)
    return LABEL_COLUMN if dataset is None else dataset.label_column


def _say_what_was_assumed(config: ImportConfig, recipe: Recipe, dataset: Dataset | None) -> None:
    """A bare state dict does not say what its network was fed, and another guess gives other predictions."""
    guessed = (
        "" if config.labels is not None else "; the order of the labels is a guess: give --labels"
    )
    seen = recipe.input
    console.print(
        f"{config.checkpoint}: says nothing of its recipe; assumed --crop {recipe.augment.crop} "
        f"--normalize {seen.normalize} --mask-encoding {seen.mask_encoding}{guessed}"
    )


def _class_names(
    config: ImportConfig,
    described: Description | None,
    classes: int,
    dataset: Dataset | None,
    label_column: str,
) -> list[str]:
    """The names of the logits, from a file, a dataset, or their numbers."""
    if config.labels is not None:
        names, source = read_json(config.labels), str(config.labels)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{source}: is not a JSON list of class names")
    elif described is not None:
        names, source = described.class_names, f"{config.checkpoint}, its description"
    elif dataset is not None:
        names, source = (
            sorted(dataset.column(label_column).astype(str).unique()),
            f"{dataset.path}, {label_column}",
        )
    else:
        return [f"class_{number:03d}" for number in range(classes)]
    if len(names) != classes or len(set(names)) != classes:
        raise InputError(
            f"{source}: names {len(set(names))} different classes, {config.checkpoint} has {classes} logits; "
            "give --labels a list of their names in order"
        )
    return names


def _facts(
    checkpoint: Path,
    recipe: Recipe,
    channels: int,
    dataset: Dataset | None,
    described: Description | None,
) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """What identifies the run, and its split; both as far as they are known."""
    label_column = recipe.input.label_column
    facts: dict[str, Any] = {
        "label_column": label_column,
        "imported": {
            "file": Path(checkpoint).name,
            "sha256": file_digest(Path(checkpoint)),
        },
    }
    if dataset is None:
        unknown = dict.fromkeys(("split_fingerprint", "channels", "image_dtype", "image_size"))
        return {**unknown, **({} if described is None else described.facts), **facts}, None
    seen = count_input_channels(dataset, recipe.input)
    if seen != channels:
        raise InputError(
            f"{dataset.path}: has {seen} channels as normalised by {recipe.input.normalize}, {checkpoint} takes "
            f"{channels}; build the dataset with --aggregate or --channels to match, or change --normalize"
        )
    manifest = create_manifest(dataset.index, recipe.split, label=label_column, seed=recipe.seed)
    # What the network was trained with goes before what this dataset would give.
    trained_with = {} if described is None else described.facts
    statistics = trained_with.get("normalization") or normalization.fit_statistics(
        dataset, recipe.input
    )
    known = {"split_fingerprint": fingerprint(manifest), "normalization": statistics}
    return {**facts, **known, **dataset_facts(dataset)}, manifest

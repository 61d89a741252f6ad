"""Checkpoints of the original program as runs of this one, and runs of this one as PyTorch checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tyro
from flax import nnx

from perturbjax.config import AugmentConfig, Recipe, check, preset
from perturbjax.console import InputError, console
from perturbjax.dataset import SiteDataset, open_dataset
from perturbjax.feed import channels_seen
from perturbjax.files import read_json
from perturbjax.models import SIZED, exchange
from perturbjax.splits import fingerprint, split_for
from perturbjax.training.checkpoint import Checkpoints, Which, tree_to_state
from perturbjax.training.run import CONFIG, Run, dataset_facts, open_run, start_run
from perturbjax.training.step import TrainState

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
    """Turn a PyTorch state dict into a run that evaluate, predict and train --init-from accept."""

    checkpoint: Path
    """State dict (.pth or .safetensors), alone or inside a training checkpoint."""
    out: Path
    """Run directory to write."""
    labels: Path | None = None
    """JSON list of the class names in the order of the logits; else the sorted labels of --data, or class_000 …"""
    data: Path | None = None
    """Dataset directory to judge the network on; it can also be given to evaluate."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=recipe_for_import)


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's parameters as a PyTorch state dict."""

    run: Path
    """Run directory of one of the original's networks."""
    out: Path
    """File to write: .pth, which torch.load(weights_only=True) opens, or .safetensors."""
    checkpoint: Which = "latest"
    """latest: after the last epoch. best: the most accurate on the judging sites."""
    epoch: int = 0
    """Export the checkpoint of this epoch; 0 takes the newest, or the best."""


def import_run(config: ImportConfig) -> Run:
    """Make a run of a PyTorch state dict.

    Which sites the network was trained on is not in a state dict: the split of such a run is dealt by its recipe, and
    its scores are of unseen sites only where that is the split the network was trained by.

    Raises:
        InputError: the checkpoint, the labels or the dataset cannot be used or do not fit each other, or `out` is
            not empty.
    """
    recipe, out = config.recipe, Path(config.out)
    imported = exchange.import_state_dict(config.checkpoint, recipe.model.model)
    if imported.image_size is not None:
        recipe = dataclasses.replace(recipe, augment=dataclasses.replace(recipe.augment, crop=imported.image_size))
    dataset = None if config.data is None else open_dataset(config.data)
    label_column = recipe.input.label_column or (LABEL_COLUMN if dataset is None else dataset.label_column)
    recipe = dataclasses.replace(recipe, input=dataclasses.replace(recipe.input, label_column=label_column))
    check(recipe)
    class_names = _class_names(config, imported.classes, dataset, label_column)
    facts, manifest = _facts(config.checkpoint, recipe, imported.channels, dataset)
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty{' and holds a run' * (out / CONFIG).is_file()}; choose another --out")

    run = Run(out, recipe, None if dataset is None else dataset.path.absolute(), class_names, facts)
    start_run(run, manifest)
    state = TrainState(imported.params, imported.stats, opt_state=(), step=np.int32(imported.batches))
    known = {"split_fingerprint": facts["split_fingerprint"], "classes": class_names}
    checkpoints = Checkpoints(out)
    checkpoints.save(state, epoch=0, facts=known, accuracy=None)
    checkpoints.close()
    console.print(f"imported: {out}; judge it with `perturbjax evaluate --run {out} --data DIR`")
    return run


def export_run(config: ExportConfig) -> Path:
    """Write a run's parameters and statistics under the original's names.

    Raises:
        InputError: the run cannot be opened, its network is none of the original's, or `out` cannot be written.
    """
    run = open_run(config.run)
    model = run.recipe.model.model
    layers = exchange.layers_of(model)
    checkpoints = Checkpoints(run.path)
    tree, _ = checkpoints.load(config.checkpoint, config.epoch or None)
    checkpoints.close()
    first = f"params/{layers[0][1].replace('.', '/')}/kernel/value"
    if first not in tree:
        raise InputError(f"{run.path}: its checkpoint has no {first}; it belongs to another model")
    size = run.recipe.augment.crop if model in SIZED else None
    network = exchange.abstract(model, len(run.class_names), tree[first].shape[2], size)
    template = {"params": nnx.state(network, nnx.Param), "stats": nnx.state(network, nnx.BatchStat)}
    kept = {name: value for name, value in tree.items() if name.startswith(("params/", "stats/"))}
    filled = tree_to_state(kept, template, run.path)
    nnx.update(network, filled["params"], filled["stats"])
    exchange.export_state_dict(config.out, model, network, batches=int(tree["step"]))
    console.print(f"written: {config.out}")
    return Path(config.out)


def _class_names(config: ImportConfig, classes: int, dataset: SiteDataset | None, label_column: str) -> list[str]:
    """The names of the logits, from a file, a dataset, or their numbers."""
    if config.labels is not None:
        names, source = read_json(config.labels), str(config.labels)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{source}: is not a JSON list of class names")
    elif dataset is not None:
        names, source = sorted(dataset.column(label_column).astype(str).unique()), f"{dataset.path}, {label_column}"
    else:
        return [f"class_{number:03d}" for number in range(classes)]
    if len(names) != classes or len(set(names)) != classes:
        raise InputError(
            f"{source}: names {len(set(names))} different classes, {config.checkpoint} has {classes} logits; "
            "give --labels a list of their names in order"
        )
    return names


def _facts(
    checkpoint: Path, recipe: Recipe, channels: int, dataset: SiteDataset | None
) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """What identifies the run, and its split; both as far as they are known."""
    label_column = recipe.input.label_column
    facts: dict[str, Any] = {
        "label_column": label_column,
        "imported": {
            "file": Path(checkpoint).name,
            "sha256": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        },
    }
    if dataset is None:
        unknown = dict.fromkeys(("split_fingerprint", "channels", "image_dtype", "image_size"))
        return {**facts, **unknown}, None
    seen = channels_seen(dataset, recipe.input)
    if seen != channels:
        raise InputError(
            f"{dataset.path}: has {seen} channels as normalised by {recipe.input.normalize}, {checkpoint} takes "
            f"{channels}; build the dataset with --aggregate or --channels to match, or change --normalize"
        )
    manifest = split_for(dataset.index, recipe.split, label=label_column, seed=recipe.seed)
    return {**facts, "split_fingerprint": fingerprint(manifest), **dataset_facts(dataset)}, manifest

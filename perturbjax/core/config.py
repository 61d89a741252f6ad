"""Every knob, its default, its meaning and its bounds, as frozen dataclasses; and the named presets.

A `Recipe` is all that decides a run's numbers. It is saved as `config.json` in the run directory, and a run is
resumed or judged only with the recipe it was started with.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from perturbjax.core.choices import MASK_ENCODINGS, NORMALIZATIONS, SPLIT_POLICIES
from perturbjax.core.errors import InputError
from perturbjax.core.options import require, require_sound

if TYPE_CHECKING:
    SplitPolicy = str
    MaskEncoding = str
    Normalization = str
else:  # the names of choices come from their tables alone
    SplitPolicy = Literal[tuple(SPLIT_POLICIES)]
    MaskEncoding = Literal[tuple(MASK_ENCODINGS)]
    Normalization = Literal[tuple(NORMALIZATIONS)]
MaskUse = Literal["keep", "none", "only", "shuffle"]
Precision = Literal["float32", "bf16"]
Head = Literal["dense", "attention", "channels"]
BackboneNorm = Literal["published", "batch"]
Pool = Literal["last", "stages"]

#: The linear solution, of `classify --preset linear`: logistic regression of this
#: inverse penalty on so many principal components of the backbone's features and on the site's statistics, both scaled
#: to this total variance, so that neither drowns in the other (chosen on inner folds of BBBC021, docs/presets.md).
LINEAR_C, LINEAR_COMPONENTS, LINEAR_VARIANCE = 0.01, 256, 500.0


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    model: str = "attention"
    """Name of the network."""
    dropout: float = 0.3
    """Share of units dropped before the last layer, in [0, 1)."""
    precision: Precision = "float32"
    """What activations are computed in; parameters and statistics stay float32."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("dropout", self.dropout, 0 <= self.dropout < 1, "a share from 0, less than 1")


@dataclass(frozen=True)
class InputConfig:
    """What the network sees of a record."""

    label_column: str = ""
    """Index column to predict; empty takes the one the dataset was built with."""
    normalize: Normalization = "dtype"
    """dtype: divide by the largest value of the stored integer type (the original's way). log: log(1 + value over the
    channel's background), so that stain and exposure shift rather than stretch. log_plate: log, and every channel a
    second time relative to the mean of its plate. site: per site and channel to mean 0, deviation 1. plate: the same
    with each plate's own mean and deviation. Where plates count, judge and predict them whole."""
    mask_encoding: MaskEncoding = "binary"
    """What the mask channel holds: instance numbers (the original's way), cell or not, cell outlines, or distance to
    the outline."""
    mask_use: MaskUse = "keep"
    """Ablations. none: mask zeroed. only: image zeroed. shuffle: every image with another site's mask."""

    def __post_init__(self) -> None:
        require_sound(self)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training images, applied to image and mask together."""

    crop: int = 128
    """Side in pixels of what the network sees. Evaluation resizes the whole site to this."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the site's area that a random resized crop takes."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Least and greatest aspect ratio of that crop."""
    flip: bool = True
    """Mirror at random, horizontally and vertically."""
    rotate: float = 180.0
    """Greatest rotation in degrees, either way."""
    brightness: float = 0.0
    """Greatest additive change of the normalised image, a channel at a time."""
    contrast: float = 0.0
    """Greatest relative change of the normalised image, a channel at a time."""
    legacy_augmentation: bool = False
    """Restore the original: flips and rotation move the image and not its mask, the crop interpolates the mask's
    numbers, and test images are augmented too."""

    def __post_init__(self) -> None:
        require_sound(self)
        least, most = self.crop_scale
        narrow, wide = self.crop_ratio
        require("crop", self.crop, self.crop >= 1, "at least 8 pixels")
        require("crop-scale", self.crop_scale, 0 < least <= most <= 1, "0 < low <= high <= 1")
        require("crop-ratio", self.crop_ratio, 0 < narrow <= wide, "0 < low <= high")
        require("rotate", self.rotate, 0 <= self.rotate <= 180, "from 0 to 180 degrees")
        require("brightness", self.brightness, self.brightness >= 0, "0 or more")
        require("contrast", self.contrast, self.contrast >= 0, "0 or more")


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move."""

    epochs: int = 200
    """Passes over the training sites."""
    batch_size: int = 128
    """Sites a step, over all devices."""
    steps_per_epoch: int = 0
    """Steps an epoch; 0: as many as one pass over the training sites takes. More begin another pass, fewer leave sites
    out; none is padded."""
    least_steps: int = 0
    """Steps of the whole training at least: where one pass an epoch takes fewer, every epoch takes more. It counts for
    nothing with --steps-per-epoch."""
    learning_rate: float = 0.005
    """Peak of the one-cycle schedule."""
    weight_decay: float = 1e-4
    """L2 added to the gradient, as torch.optim.Adam does; or decoupled, see --decoupled."""
    decoupled: bool = False
    """AdamW instead of Adam with L2."""
    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes, in [0, 1)."""
    warmup: float = 0.3
    """Share of all steps in which the learning rate rises."""
    cycle_momentum: bool = True
    """Move Adam's beta1 from 0.95 to 0.85 and back, against the learning rate."""
    balance: float = 0.0
    """0: every site counts the same. 1: every class counts the same in the loss. Between: class weights to this
    power."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("epochs", self.epochs, self.epochs >= 1, "at least one")
        require("batch-size", self.batch_size, self.batch_size >= 1, "at least one")
        require(
            "steps-per-epoch",
            self.steps_per_epoch,
            self.steps_per_epoch >= 0,
            "0 (one pass) or more",
        )
        require("least-steps", self.least_steps, self.least_steps >= 0, "0 or more")
        require("learning-rate", self.learning_rate, self.learning_rate > 0, "greater than 0")
        require("weight-decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        require("warmup", self.warmup, 0 <= self.warmup <= 1, "a share from 0 to 1")
        require(
            "label-smoothing",
            self.label_smoothing,
            0 <= self.label_smoothing < 1,
            "a share from 0, less than 1",
        )
        require("balance", self.balance, 0 <= self.balance <= 1, "a power from 0 to 1")


@dataclass(frozen=True)
class SplitConfig:
    """Who trains and who judges."""

    split: SplitPolicy = "well"
    """What is kept whole: site (the paper's protocol: sites of one well on both sides), well, plate, layout (plates
    that share a plate map) or compound."""
    folds: int = 5
    """Parts the groups are dealt into; one of them judges."""
    fold: int = 0
    """Which of the parts judges, from 0."""
    split_file: str = ""
    """A manifest written by `perturbjax split`, instead of the policy above."""
    exclude: tuple[str, ...] = ()
    """Sites that neither train nor judge: rules on columns of the index, as focus_DNA<-6 or Metadata_Well==A01, or
    files of such rules. What each leaves out is said."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("folds", self.folds, self.folds >= 2, "2 or more")
        require(
            "fold",
            self.fold,
            0 <= self.fold < self.folds,
            f"from 0 to --folds - 1, {self.folds - 1}",
        )


@dataclass(frozen=True)
class TransferConfig:
    """Two phases on published weights: new layers first, then all of them."""

    weights: str = ""
    """Where --model's published weights come from: a file, hf:OWNER/REPOSITORY[@REVISION] or
    package:NAME. Empty trains --model from scratch, in one phase."""
    head: Head = "dense"
    """What is put on the backbone. dense: average, dense. attention: the mask says where to average. channels: the
    backbone sees every channel by itself and always stands still; a head is fitted to what its stages find and to
    statistics of the site, and what the epochs train is a small attention network beside it (needs --normalize log or
    log_plate)."""
    symmetries: int = 1
    """How many of the square's eight symmetries --head channels averages what the backbone finds over."""
    freeze_epochs: int = 5
    """Epochs, of --epochs, in which only the new layers move and the backbone stands still."""
    finetune_rate: float = 0.1
    """Learning rate of the backbone in the epochs after, as a share of --learning-rate."""
    backbone_norm: BackboneNorm = "published"
    """What the backbone's BatchNorm normalises by in those epochs. published: the statistics that came with the
    weights, which the layers above were trained on. batch: each batch's own."""
    layer_decay: float = 1.0
    """Factor on that rate for each step down, from the backbone's last stage to its stem; 1 moves all alike."""

    def __post_init__(self) -> None:
        require_sound(self)
        require(
            "symmetries",
            self.symmetries,
            1 <= self.symmetries <= 8,
            "1 to 8: a square has 8 symmetries",
        )
        require("freeze-epochs", self.freeze_epochs, self.freeze_epochs >= 0, "0 or more")
        require("finetune-rate", self.finetune_rate, self.finetune_rate >= 0, "0 or more")
        require(
            "layer-decay", self.layer_decay, 0 < self.layer_decay <= 1, "greater than 0, at most 1"
        )


@dataclass(frozen=True)
class Recipe:
    """All that decides a run's numbers."""

    model: ModelConfig = field(default_factory=ModelConfig)
    input: InputConfig = field(default_factory=InputConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    seed: int = 0
    """Decides initial parameters, order, augmentation, dropout and split."""

    def __post_init__(self) -> None:
        require_sound(self)
        require(
            "crop", self.augment.crop, self.augment.crop >= 8, "at least 8 pixels"
        )  # what networks halve thrice
        require("seed", self.seed, self.seed >= 0, "from 0 to 2^32 - 1")
        if self.transfer.head == "channels":
            logarithms = self.input.normalize in ("log", "log_plate")
            require(
                "normalize",
                self.input.normalize,
                logarithms,
                "log or log_plate with --head channels",
            )
            require(
                "weights",
                self.transfer.weights,
                bool(self.transfer.weights),
                "given with --head channels",
            )
            require(
                "crop",
                self.augment.crop,
                self.augment.crop >= 16,
                "at least 16 pixels with --head channels",
            )


PRESETS: dict[str, Recipe] = {
    "paper": Recipe(),
    # Single cells in separate channels, few plates, very unequal classes (measured in experiments/bbbc021_cells.py).
    "cells": Recipe(
        input=InputConfig(normalize="log_plate"),
        augment=AugmentConfig(crop=48, crop_scale=(0.5, 1.0), crop_ratio=(1.0, 1.0)),
        optim=OptimConfig(
            epochs=30,
            batch_size=64,
            learning_rate=0.002,
            weight_decay=0.05,
            decoupled=True,
            balance=1.0,
        ),
        split=SplitConfig(split="plate"),
    ),
    # Any new data: photographs' features of every channel, and a small network trained beside them (docs/presets.md).
    "pretrained": Recipe(
        model=ModelConfig(model="efficientnet_lite0"),
        input=InputConfig(normalize="log_plate", mask_encoding="instance"),
        augment=AugmentConfig(crop=128, crop_scale=(0.5, 1.0), crop_ratio=(1.0, 1.0)),
        optim=OptimConfig(
            epochs=20,
            batch_size=64,
            least_steps=300,
            learning_rate=0.002,
            weight_decay=0.05,
            decoupled=True,
            balance=1.0,
        ),
        transfer=TransferConfig(
            weights="package:efficientnet_lite0", head="channels", symmetries=8
        ),
    ),
    # The simulated plates of `make demo`: learned in about a minute on two cores.
    "demo": Recipe(
        input=InputConfig(normalize="log"),
        augment=AugmentConfig(crop=48, crop_scale=(0.3, 1.0)),
        optim=OptimConfig(
            epochs=20, batch_size=32, learning_rate=0.003, weight_decay=0.01, decoupled=True
        ),
    ),
    # What the original program did, its known faults included; docs/fidelity.md says which they are.
    "original": Recipe(
        input=InputConfig(mask_encoding="instance"),
        augment=AugmentConfig(rotate=20.0, legacy_augmentation=True),
        split=SplitConfig(split="site"),
    ),
}


def preset(name: str) -> Recipe:
    """A named recipe.

    Raises:
        InputError: there is none of that name; the message lists those there are.

    Examples:
        >>> perturbjax.preset("cells").input.normalize
        'log_plate'
    """
    if name not in PRESETS:
        raise InputError(f"--preset {name}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested plain values, ready for JSON."""
    return dataclasses.asdict(recipe)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `recipe_to_dict`; fields that are absent take their defaults.

    Raises:
        InputError: a field is not known, or its value is none that a run can have.
    """
    sections: dict[str, Any] = {}
    for section in dataclasses.fields(Recipe):
        if section.name not in values:
            continue
        value = values[section.name]
        if isinstance(value, dict):
            kind: Any = section.default_factory
            known = {f.name for f in dataclasses.fields(kind)}
            if unknown := sorted(set(value) - known):
                raise InputError(f"config: unknown field {section.name}.{unknown[0]}")
            value = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
        sections[section.name] = value
    return Recipe(**sections)


def recipe_flags(recipe: Recipe) -> list[str]:
    """Command line flags that turn the default recipe into this one."""
    default, flags = (
        PRESETS["paper"],
        [] if recipe.seed == PRESETS["paper"].seed else ["--seed", str(recipe.seed)],
    )
    for section in dataclasses.fields(Recipe):
        if section.name == "seed":
            continue
        ours, usual = getattr(recipe, section.name), getattr(default, section.name)
        for option in dataclasses.fields(ours):
            value, name = getattr(ours, option.name), option.name.replace("_", "-")
            if value == getattr(usual, option.name):
                continue
            if isinstance(value, bool):
                flags.append(f"--{name}" if value else f"--no-{name}")
            else:
                flags += [
                    f"--{name}",
                    *(str(v) for v in (value if isinstance(value, tuple) else (value,))),
                ]
    return flags

"""Training settings as frozen dataclasses: defaults, help sentences, valid ranges and named
presets.

A `Recipe` contains all settings that determine the numbers of a run. It is stored in `config.json`
of the run directory; a run is resumed and evaluated with the recipe that it was started with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from perturbjax.core.choices import MASK_ENCODINGS, NORMALIZATIONS, SPLIT_POLICIES, Choice
from perturbjax.core.errors import InputError
from perturbjax.core.lengths import Length, parse_micrometers
from perturbjax.core.options import (
    chosen_from,
    python_only,
    require,
    require_fold,
    require_seed,
    require_sound,
)

#: `--split` value: the strictest policy that the data allow, see `data.split_choice`.
AUTO = "auto"
#: `--split` value -> its record.
SPLIT_CHOICES: dict[str, Choice] = {
    AUTO: Choice("the strictest of layout, plate and well that the data allow"),
    **SPLIT_POLICIES,
}
if TYPE_CHECKING:
    SplitPolicy = str
    AnySplit = str
    MaskEncoding = str
    Normalization = str
else:  # the names of choices come from their tables alone
    SplitPolicy = Literal[tuple(SPLIT_POLICIES)]
    AnySplit = Literal[tuple(SPLIT_CHOICES)]
    MaskEncoding = Literal[tuple(MASK_ENCODINGS)]
    Normalization = Literal[tuple(NORMALIZATIONS)]
MaskUse = Literal["keep", "none", "only", "shuffle"]
Precision = Literal["float32", "bf16"]
Head = Literal["dense", "attention", "channels"]
BackboneNorm = Literal["published", "batch"]
Pool = Literal["last", "stages"]
#: Summary of the features of the cells or tiles of a site.
Summary = Literal["mean", "median", "mean-std"]
DEFAULT_SUMMARY: Summary = "mean"

#: The linear baseline (`classify --preset linear`): inverse regularization strength of the logistic
#: regression, number of principal components of the backbone features, and total variance that the
#: components and the site statistics are each scaled to. Chosen on inner folds of BBBC021
#: (docs/presets.md).
LINEAR_C, LINEAR_COMPONENTS, LINEAR_VARIANCE = 0.01, 256, 500.0


@dataclass(frozen=True)
class ModelConfig:
    """Network"""

    model: str = "attention"
    """Network architecture, or package.module:function of a Flax network."""
    dropout: float = python_only(0.3)
    """Fraction of units dropped before the last layer, in [0, 1)."""
    precision: Precision = "float32"
    """Number format of activations; parameters stay float32."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and less than 1")


@dataclass(frozen=True)
class InputConfig:
    """Network input"""

    label_column: str = ""
    """Index column to predict; by default the label column of the dataset."""
    normalize: Normalization = chosen_from(NORMALIZATIONS, "dtype")
    """Intensity normalization."""
    mask_encoding: MaskEncoding = chosen_from(MASK_ENCODINGS, "binary")
    """Values of the mask channel."""
    mask_use: MaskUse = "keep"
    """Ablation. none: empty mask. only: empty image. shuffle: mask of another site."""
    cells: int = python_only(0)
    """Maximum number of cells of a site in the network input; 0: the input is the whole site."""
    cells_per_step: int = python_only(0)
    """Cells of a site in a training step, chosen at random in each epoch; 0: all."""
    cell_size: Length = python_only(0)
    """Size of the window of a cell in stored pixels, a multiple of 16, or a length such as 20um; 0:
    2.5 median diameters. A run stores the number of pixels."""

    def __post_init__(self) -> None:
        require_sound(self)
        step, size = self.cells_per_step, self.cell_size
        require("cells", self.cells, 0 <= self.cells <= 4096, "0 (whole sites) to 4096")
        require("cells-per-step", step, step >= 0, "0 (all) or more")
        # The stack of windows of a site is downsampled by powers of 2 as one image.
        pixels = str(size).isdecimal() and int(size) % 16 == 0
        expected = "0, a multiple of 16 pixels, or a length such as 20um"
        require("cell-size", size, pixels or parse_micrometers(size) is not None, expected)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation"""

    crop: int = 128
    """Height and width of the network input in pixels. Evaluation resizes whole sites to it."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Minimum and maximum fraction of the site area in a random crop."""
    crop_ratio: tuple[float, float] = python_only((0.75, 4 / 3))
    """Minimum and maximum aspect ratio of a random crop."""
    flip: bool = python_only(True)
    """Flip horizontally and vertically at random."""
    rotate: float = 180.0
    """Maximum rotation in degrees, in both directions."""
    brightness: float = python_only(0.0)
    """Maximum additive change of the normalized image, for each channel."""
    contrast: float = python_only(0.0)
    """Maximum relative change of the normalized image, for each channel."""
    legacy_augmentation: bool = python_only(False)
    """Reproduce the original program: flips and rotations change the image but not its mask, crops
    interpolate mask numbers, and test images are augmented too."""

    def __post_init__(self) -> None:
        require_sound(self)
        scale, ratio = self.crop_scale, self.crop_ratio
        require("crop", self.crop, self.crop >= 1, "at least 1 pixel")
        require("crop-scale", scale, 0 < scale[0] <= scale[1] <= 1, "0 < low <= high <= 1")
        require("crop-ratio", ratio, 0 < ratio[0] <= ratio[1], "0 < low <= high")
        require("rotate", self.rotate, 0 <= self.rotate <= 180, "0 to 180 degrees")
        require("brightness", self.brightness, self.brightness >= 0, "0 or more")
        require("contrast", self.contrast, self.contrast >= 0, "0 or more")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule"""

    epochs: int = 200
    """Number of epochs."""
    batch_size: int = 128
    """Sites in a training step, over all devices."""
    steps_per_epoch: int = python_only(0)
    """Steps in an epoch; 0: one pass over the training sites. Batches are never padded."""
    least_steps: int = python_only(0)
    """Minimum number of steps of the whole training; epochs of small datasets become longer to
    reach it. Ignored with steps_per_epoch."""
    learning_rate: float = 0.005
    """Peak learning rate of the one-cycle schedule."""
    weight_decay: float = 1e-4
    """Weight decay; L2 with Adam, decoupled with AdamW (recipe field decoupled)."""
    decoupled: bool = python_only(False)
    """AdamW instead of Adam with an L2 term."""
    label_smoothing: float = 0.1
    """Label smoothing, in [0, 1)."""
    warmup: float = python_only(0.3)
    """Fraction of all steps in which the learning rate rises."""
    cycle_momentum: bool = python_only(True)
    """Change the beta1 of Adam from 0.95 to 0.85 and back, opposite to the learning rate."""
    balance: float = 0.0
    """Exponent of inverse class frequency in the loss. 0: sites count equally. 1: classes count
    equally."""

    def __post_init__(self) -> None:
        require_sound(self)
        smoothing, per_epoch = self.label_smoothing, self.steps_per_epoch
        require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        require("batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("steps-per-epoch", per_epoch, per_epoch >= 0, "0 (one pass) or more")
        require("least-steps", self.least_steps, self.least_steps >= 0, "0 or more")
        require("learning-rate", self.learning_rate, self.learning_rate > 0, "greater than 0")
        require("weight-decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        require("warmup", self.warmup, 0 <= self.warmup <= 1, "a fraction from 0 to 1")
        require("label-smoothing", smoothing, 0 <= smoothing < 1, "at least 0 and less than 1")
        require("balance", self.balance, 0 <= self.balance <= 1, "an exponent from 0 to 1")


@dataclass(frozen=True)
class SplitConfig:
    """Train/test split"""

    split: AnySplit = chosen_from(SPLIT_CHOICES, AUTO)
    """Sites that stay together in the training or the test set; auto: strictest possible."""
    folds: int = 5
    """Number of folds; one of them is the test set."""
    fold: int = 0
    """Fold of the test set, from 0."""
    split_file: str = ""
    """Split written by `perturbjax split`, in place of --split."""
    exclude: tuple[str, ...] = ()
    """Sites to leave out: rules such as focus_DNA<-6 or Metadata_Well==A01, or files of rules."""
    validation_fraction: float = 0.0
    """Fraction of the training groups held out to choose the best checkpoint; 0: no best
    checkpoint."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_fold(self.fold, self.folds)
        fraction = self.validation_fraction
        require("validation-fraction", fraction, 0 <= fraction < 1, "at least 0 and less than 1")


@dataclass(frozen=True)
class TransferConfig:
    """Pretrained weights"""

    weights: str = ""
    """Pretrained weights of --model: FILE, hf:OWNER/REPOSITORY[@REVISION] or package:NAME. Empty:
    train from scratch."""
    head: Head = "dense"
    """Layers after the backbone. dense: average and dense layer. attention: average weighted by the
    mask. channels: frozen backbone for each channel, fitted classifiers and a trainable branch."""
    symmetries: int = python_only(1)
    """Number of flips and rotations of the site over which --head channels averages the features, 1
    to 8."""
    window: int = python_only(0)
    """Size in pixels of windows of native resolution at the cells, over which --head channels
    averages the features of sites larger than --crop. 0 resizes such sites."""
    freeze_epochs: int = 5
    """First epochs, in which only the new layers are trained."""
    finetune_rate: float = 0.1
    """Learning rate of the backbone after these epochs, as a fraction of --learning-rate."""
    backbone_norm: BackboneNorm = python_only("published")
    """Statistics of the BatchNorm layers of the backbone in these epochs. published: those of the
    weights. batch: those of each batch."""
    layer_decay: float = python_only(1.0)
    """Factor on the learning rate for each stage from the last to the first; 1: the same rate
    everywhere."""

    def __post_init__(self) -> None:
        require_sound(self)
        require("symmetries", self.symmetries, 1 <= self.symmetries <= 8, "1 to 8")
        require("window", self.window, self.window in (0, *range(32, 1025)), "0, or 32 to 1024")
        require("freeze-epochs", self.freeze_epochs, self.freeze_epochs >= 0, "0 or more")
        require("finetune-rate", self.finetune_rate, self.finetune_rate >= 0, "0 or more")
        decay = self.layer_decay
        require("layer-decay", decay, 0 < decay <= 1, "greater than 0 and at most 1")


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the numbers of a run."""

    model: ModelConfig = ModelConfig()
    input: InputConfig = InputConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    split: SplitConfig = SplitConfig()
    transfer: TransferConfig = TransferConfig()
    seed: int = 0
    """Random seed of training and split."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_seed(self.seed)
        # The networks downsample by 2 three times; the attention branch of --head channels, four
        # times.
        normalize, crop = self.input.normalize, self.augment.crop
        require("crop", crop, crop >= 8, "at least 8 pixels")
        # Other networks have no published weights, and no features of cells.
        is_builtin = ":" not in self.model.model or not (self.transfer.weights or self.input.cells)
        builtin = "a network of perturbjax with --weights, --head channels and --preset wells"
        require("model", self.model.model, is_builtin, builtin)
        if self.input.cells:
            head = self.transfer.head
            require("head", head, head != "channels", "dense or attention for networks on cells")
        if self.transfer.head == "channels":
            logarithm = normalize in ("log", "log_plate")
            require("normalize", normalize, logarithm, "log or log_plate with --head channels")
            weights = self.transfer.weights
            require("weights", weights, bool(weights), "set with --head channels")
            require("crop", crop, crop >= 16, "at least 16 pixels with --head channels")

    @property
    def decoded_augment(self) -> AugmentConfig | None:
        """Crops for which sites are downsampled on the host; None if windows need all pixels."""
        return None if self.transfer.window else self.augment


PRESETS: dict[str, Recipe] = {
    "paper": Recipe(),
    # Single cells in separate channels, few plates, unequal classes (measured in
    # experiments/grids/bbbc021_cells.py).
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
    ),
    # New data: ImageNet features of each channel, fitted classifiers and a small trainable branch
    # (docs/presets.md).
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
            weights="package:efficientnet_lite0", head="channels", symmetries=8, window=128
        ),
    ),
    # Whole fields: single cells at native resolution, and attention over the cells of a site.
    "wells": Recipe(
        input=InputConfig(normalize="log_plate", cells=64, cells_per_step=16),
        augment=AugmentConfig(crop=64, crop_scale=(0.7, 1.0), crop_ratio=(1.0, 1.0)),
        optim=OptimConfig(
            epochs=20,
            batch_size=16,
            least_steps=300,
            learning_rate=0.002,
            weight_decay=0.05,
            decoupled=True,
            balance=1.0,
        ),
    ),
    # The simulated plates of `make demo`: `pretrained` with few steps and one view of each site.
    "demo": Recipe(
        model=ModelConfig(model="efficientnet_lite0"),
        input=InputConfig(normalize="log_plate", mask_encoding="instance"),
        augment=AugmentConfig(crop=128, crop_scale=(0.5, 1.0), crop_ratio=(1.0, 1.0)),
        optim=OptimConfig(
            epochs=2,
            batch_size=32,
            learning_rate=0.002,
            weight_decay=0.05,
            decoupled=True,
            balance=1.0,
        ),
        transfer=TransferConfig(weights="package:efficientnet_lite0", head="channels"),
    ),
    # The original program with its known errors (docs/fidelity.md).
    "original": Recipe(
        input=InputConfig(mask_encoding="instance"),
        augment=AugmentConfig(rotate=20.0, legacy_augmentation=True),
        split=SplitConfig(split="site"),
    ),
}


def preset(name: str) -> Recipe:
    """Return a named recipe.

    Args:
        name: a key of `PRESETS`.

    Raises:
        InputError: the name is unknown.

    Examples:
        >>> perturbjax.preset("cells").input.normalize
        'log_plate'
    """
    if name not in PRESETS:
        raise InputError(f"--preset {name}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]

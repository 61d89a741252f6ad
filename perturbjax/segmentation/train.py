"""Train a segmentation network on images with masks, with the targets and loss of Cellpose.

Crops are cut and augmented on the device. An interrupted run resumes from its last checkpoint with
the same crops as without the interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.core.messages import console
from perturbjax.core.options import (
    python_only,
    require,
    require_output,
    require_seed,
    require_sound,
)
from perturbjax.core.progress import track
from perturbjax.models.layers import Mode
from perturbjax.segmentation import average_precision as precision
from perturbjax.segmentation import training_crops, weight_files
from perturbjax.segmentation.api import Segmenter
from perturbjax.segmentation.cpnet import CPnet, CPnetConfig, create
from perturbjax.segmentation.diameters import measure_diameters
from perturbjax.segmentation.dynamics import FLOW_SCALE
from perturbjax.segmentation.image_folders import LabeledImage, read_folder
from perturbjax.segmentation.training_crops import CropConfig, Crops, Pool
from perturbjax.segmentation.weights import build, load_weights, save_weights

#: Decay of the exponential moving average of the weights, which are evaluated and written.
EMA_DECAY = 0.99
#: Maximum norm of a gradient.
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainSegmenterConfig:
    """Train a segmentation network on images with masks."""

    images: tuple[Path, ...]
    """Folders of NAME.tif with NAME_labels.tif or NAME_masks.tif."""
    out: Path
    """Weights to write (.safetensors)."""
    init_from: str = ""
    """Initial weights, a name or a path; empty trains from scratch."""
    widths: tuple[int, ...] = python_only((32, 64, 128, 256))
    """Channels of each level, full resolution first; those of Cellpose by default."""
    steps: int = 2000
    """Number of training steps."""
    batch: int = 8
    """Crops in a training step."""
    learning_rate: float = 0.003
    """Peak learning rate; it rises in the first tenth of the steps, then decays to a hundredth
    (cosine)."""
    weight_decay: float = python_only(1e-4)
    """Weight decay of AdamW."""
    held_out: float = 0.15
    """Fraction of the images of each folder for validation (average precision), in [0, 1)."""
    evaluate_every: int = python_only(0)
    """Steps between validations; 0 validates at the end only."""
    checkpoint_every: int = python_only(50)
    """Steps between checkpoints."""
    half: bool = python_only(False)
    """Store the weights as float16."""
    seed: int = 0
    """Random seed of parameters and crops."""
    crops: CropConfig = CropConfig()

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out, ".safetensors")
        widths, every = min(self.widths, default=0) >= 1, self.evaluate_every
        require("images", self.images, bool(self.images), "at least one folder")
        require("widths", self.widths, widths, "positive, one for each level")
        require("steps", self.steps, self.steps >= 1, "at least 1")
        require("batch", self.batch, self.batch >= 1, "at least 1")
        require("learning-rate", self.learning_rate, self.learning_rate > 0, "greater than 0")
        require("weight-decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        require("held-out", self.held_out, 0 <= self.held_out < 1, "at least 0 and less than 1")
        require("evaluate-every", every, every >= 0, "0 (at the end only) or more")
        require("checkpoint-every", self.checkpoint_every, self.checkpoint_every >= 1, "at least 1")
        require_seed(self.seed)


class State(NamedTuple):
    """Everything that changes during training."""

    step: Int[Array, ""]
    params: nnx.State
    statistics: nnx.State
    optimizer: optax.OptState
    averaged: tuple[nnx.State, nnx.State]
    """Moving average of parameters and statistics."""


def train(config: TrainSegmenterConfig) -> Path:
    """Train a network, or resume, report its average precision, and write the weights.

    Returns:
        Path of the weights file.

    Raises:
        InputError: a setting or an image cannot be used, or the checkpoint next to `out` is of
            another run.
    """
    if config.out.exists():
        raise InputError(f"--out {config.out}: exists already. Remove it or choose another name")
    folders = [read_folder(folder) for folder in config.images]
    # Each folder is split separately, so that each has the same fraction of validation images.
    splits = [split_images(images, config.held_out) for images in folders]
    training = [image for images, _ in splits for image in images]
    validation = {
        str(folder.name): images
        for folder, (_, images) in zip(config.images, splits, strict=True)
        if images
    }
    count = sum(map(len, validation.values()))
    console.print(f"info: {len(training)} images for training, {count} for validation")
    model = _create_model(config)
    optimizer = make_optimizer(config)
    state = initial_state(model, optimizer)
    # A hidden file next to the weights; it is removed when training ends.
    checkpoint = config.out.with_name(f".{config.out.stem}.training.npz")
    # A checkpoint is used for the same settings and images only.
    identity = _run_identity(config, folders)
    if checkpoint.exists():
        state = _load_checkpoint(checkpoint, state, identity)
    pool = training_crops.make_pool(training, config.crops)
    for newest in _training_steps(state, pool, model, optimizer, config):
        state, step = newest, int(newest.step)
        if step % config.checkpoint_every == 0 or step == config.steps:
            _save_checkpoint(checkpoint, state, identity)
        # The last step is evaluated after the loop.
        if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
            _evaluate_state(model, state, validation, config)
    scores = _evaluate_state(model, state, validation, config)
    card = _make_card(config, folders, scores)
    save_weights(config.out, averaged_model(model, state), card, _storage_type(config))
    checkpoint.unlink(missing_ok=True)
    return config.out


def _evaluate_state(
    model: CPnet,
    state: State,
    folders: dict[str, list[LabeledImage]],
    config: TrainSegmenterConfig,
) -> dict[str, dict[str, float]]:
    """Evaluate the averaged weights as they will be read: rounded to the type of the file."""
    path = config.out.with_name(f".{config.out.stem}.judged.safetensors")
    try:
        save_weights(path, averaged_model(model, state), dtype=_storage_type(config))
        return evaluate(Segmenter(path, "per-image"), folders)
    finally:
        path.unlink(missing_ok=True)


def _storage_type(config: TrainSegmenterConfig) -> type[np.floating]:
    return np.float16 if config.half else np.float32


def split_images(
    images: list[LabeledImage], held_out: float
) -> tuple[list[LabeledImage], list[LabeledImage]]:
    """Split images into training and validation by a hash of their names.

    When a folder grows, most validation images remain validation images.

    Raises:
        InputError: no image remains for training.
    """
    # The order of hashes is random but depends on the names only, not on the seed or the machine.
    order = sorted(images, key=lambda image: hashlib.sha256(image.name.encode()).hexdigest())
    count = round(held_out * len(order))
    if count == len(order):
        raise InputError(f"--held-out {held_out}: leaves none of {len(order)} images for training")
    return order[count:], order[:count]


def _create_model(config: TrainSegmenterConfig) -> CPnet:
    if config.init_from:
        model = build(*load_weights(weight_files.find(config.init_from, flag="init-from")))
        if not isinstance(model, CPnet):
            raise InputError(
                f"--init-from {config.init_from}: is cpsam; only networks of Cellpose 3 can be "
                "trained"
            )
        if model.config.channels not in (1, 2):
            raise InputError(
                f"--init-from {config.init_from}: takes {model.config.channels} channels, not 1 or "
                "2"
            )
        return model
    size = config.crops.diameter
    return create(CPnetConfig((1, *config.widths), diam_mean=size, diam_labels=size), config.seed)


def make_optimizer(config: TrainSegmenterConfig) -> optax.GradientTransformation:
    """Return AdamW with gradient clipping, linear warmup and cosine decay."""
    peak = config.learning_rate
    # Arguments: initial rate, peak, warmup steps, all steps, final rate.
    rate = optax.warmup_cosine_decay_schedule(
        peak / 25, peak, max(config.steps // 10, 1), config.steps + 1, peak / 100
    )
    return optax.chain(
        optax.clip_by_global_norm(MAX_GRADIENT_NORM),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )


def initial_state(model: CPnet, optimizer: optax.GradientTransformation) -> State:
    """Return the state before the first step."""
    # `...` selects the remaining state: the running statistics of BatchNorm.
    params, statistics = nnx.state(model, nnx.Param, ...)
    copied = jax.tree.map(jnp.copy, (params, statistics))
    return State(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params), copied)


def averaged_model(model: CPnet, state: State) -> CPnet:
    """Return the network with the averaged weights."""
    return nnx.merge(nnx.split(model)[0], *state.averaged)


def _training_steps(
    state: State,
    pool: Pool,
    model: CPnet,
    optimizer: optax.GradientTransformation,
    config: TrainSegmenterConfig,
) -> Iterator[State]:
    graph = nnx.split(model)[0]
    channels = model.config.channels

    def loss(params: nnx.State, statistics: nnx.State, batch: Crops) -> tuple[Array, nnx.State]:
        # A copy, because the forward pass updates the running statistics in place.
        model = nnx.merge(graph, params, statistics, copy=True)
        # Cellpose's second channel shows nuclei next to cells; here it is empty.
        image = jnp.pad(batch.image, ((0, 0), (0, 0), (0, 0), (0, channels - 1)))
        maps = model(image, Mode(train=True)).maps
        return segmentation_loss(maps, batch), nnx.state(model, nnx.Param, ...)[1]

    @jax.jit
    def advance(state: State, pool: Pool) -> tuple[State, Array]:
        # The crops depend on the seed and the step only, so a resumed run draws the same ones.
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = training_crops.draw(pool, jax.random.split(key, config.batch), config.crops)
        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.statistics, batch
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early steps average over fewer steps, so that the initial weights do not remain in the
        # average.
        decay = jnp.minimum(EMA_DECAY, (1 + state.step) / (10 + state.step))
        mean = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, state.averaged, (params, statistics)
        )
        return State(state.step + 1, params, statistics, optimizer_state, mean), value

    done, recent = int(state.step), []
    steps = range(done, config.steps)
    for _ in track(steps, total=config.steps, label="Training", unit="steps", done=done):
        state, value = advance(state, pool)
        # Reading the loss waits for the step to finish.
        recent.append(float(value))
        if not np.isfinite(recent[-1]):
            raise InputError(
                f"--learning-rate {config.learning_rate}: the loss is {value} at step "
                f"{int(state.step)}. "
                "Pass a smaller rate"
            )
        if len(recent) == config.checkpoint_every:
            console.print(f"step {int(state.step)}: loss {np.mean(recent):.4f}")
            recent.clear()
        yield state


def segmentation_loss(maps: Float[Array, "b h w 3"], batch: Crops) -> Float[Array, ""]:
    """Compute Cellpose's loss: half the mean squared error of 5 times the flow, plus the
    cross-entropy of the foreground, averaged over the pixels inside the images."""
    # The network predicts FLOW_SCALE times the unit vectors of the targets.
    flow = jnp.square(maps[..., :2] - FLOW_SCALE * batch.flow).mean(-1) / 2
    foreground = optax.sigmoid_binary_cross_entropy(maps[..., 2], batch.inside)
    # Pixels of a crop beyond its image have weight 0.
    return ((flow + foreground) * batch.weight).sum() / batch.weight.sum()


def evaluate(
    segmenter: Segmenter, folders: dict[str, list[LabeledImage]]
) -> dict[str, dict[str, float]]:
    """Print and return the average precision on the validation images of each folder."""
    scores = {}
    for folder, images in folders.items():
        results = segmenter.masks(image.image for image in images)
        matches = [
            precision.match(image.labels, result.labels)
            for image, result in zip(images, results, strict=True)
            if image.labels.any()
        ]
        if not matches:
            console.print(
                f"warning: {folder}: its validation images contain no object, so no score"
            )
            continue
        average = precision.mean(matches)
        scores[folder] = {
            f"AP {threshold}": round(float(value), 4)
            for threshold, value in zip(precision.THRESHOLDS, average, strict=True)
        }
        text = ", ".join(f"{value:.3f} at IoU {name[3:]}" for name, value in scores[folder].items())
        console.print(f"{folder}: average precision on {len(matches)} validation images: {text}")
    return scores


def _run_identity(config: TrainSegmenterConfig, folders: list[list[LabeledImage]]) -> str:
    """Return a checksum of everything that the weights depend on."""
    # These settings do not change the training. Images enter by content, not by path.
    ignored = ("images", "out", "evaluate_every", "half", "checkpoint_every")
    settings = {key: value for key, value in asdict(config).items() if key not in ignored}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(_data_digest(folders).encode())
    return digest.hexdigest()


def _data_digest(folders: list[list[LabeledImage]]) -> str:
    digest = hashlib.sha256()
    for image in (image for images in folders for image in images):
        digest.update(image.name.encode() + image.image.tobytes() + image.labels.tobytes())
    return digest.hexdigest()


def _make_card(
    config: TrainSegmenterConfig, folders: list[list[LabeledImage]], scores: dict[str, Any]
) -> dict[str, Any]:
    """Return the model card that is stored in the weights file."""
    sizes = [measure_diameters(image.labels) for images in folders for image in images]
    settings = {k: v for k, v in asdict(config).items() if k not in ("images", "out")}
    return {
        "data": {
            folder.name: len(images) for folder, images in zip(config.images, folders, strict=True)
        },
        "data_sha256": _data_digest(folders),
        "objects": sum(map(len, sizes)),
        "settings": json.loads(json.dumps(settings)),
        "held_out": scores,
    }


def _save_checkpoint(path: Path, state: State, identity: str) -> None:
    # In the order of the pytree, as arr_0, arr_1, ...; `_load_checkpoint` reads this order.
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
    with atomic(path) as temporary:
        np.savez(temporary, *leaves, identity=np.array(identity))


def _load_checkpoint(path: Path, state: State, identity: str) -> State:
    leaves, structure = jax.tree.flatten(state)
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["identity"]) != identity:
                raise InputError(
                    f"{path}: belongs to a run with other settings or images. Remove it to train "
                    "from scratch"
                )
            values = [stored[f"arr_{number}"] for number in range(len(leaves))]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is an incomplete checkpoint ({error}). Remove it to train from scratch"
        ) from error
    console.print(f"info: resuming from {path}")
    return jax.tree.unflatten(structure, [jnp.asarray(value) for value in values])

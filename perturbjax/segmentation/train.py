"""Train a segmenter on folders of images with masks: cellpose's targets and losses, on crops made on the device.

A run that is killed goes on from its last checkpoint, and draws the crops that it would have drawn.
"""

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
from perturbjax.segmentation import training_crops as crops
from perturbjax.segmentation import weight_files as names
from perturbjax.segmentation.api import Segmenter
from perturbjax.segmentation.cpnet import CPnet, CPnetConfig, create
from perturbjax.segmentation.diameter_estimation import AnySize
from perturbjax.segmentation.diameters import diameters
from perturbjax.segmentation.dynamics import FLOW_SCALE
from perturbjax.segmentation.image_folders import Picture, read_folder
from perturbjax.segmentation.training_crops import CropConfig, Crops, Pool
from perturbjax.segmentation.weights import build, load_weights, save_weights

#: Share of the past in the averaged weights, which are what is judged and written.
AVERAGING = 0.99
#: Norm beyond which a gradient is shortened.
LONGEST = 1.0


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
    """Peak learning rate; it rises in the first tenth of the steps, then decays to a hundredth (cosine)."""
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
    step: Int[Array, ""]
    params: nnx.State
    statistics: nnx.State
    optimizer: optax.OptState
    averaged: tuple[nnx.State, nnx.State]
    """Parameters and statistics, averaged over the last steps."""


def train(config: TrainSegmenterConfig) -> Path:
    """Train, or go on training, state the precision, and write the weights.

    Raises:
        InputError: a setting or a picture cannot be used, or the checkpoint beside `out` is of another run.
    """
    if config.out.exists():
        raise InputError(f"--out {config.out}: is there already; remove it or choose another name")
    folders = [read_folder(folder) for folder in config.images]
    dealt = [deal(pictures, config.held_out) for pictures in folders]
    learned = [picture for pictures, _ in dealt for picture in pictures]
    judged = {
        str(folder.name): held
        for folder, (_, held) in zip(config.images, dealt, strict=True)
        if held
    }
    console.print(f"{len(learned)} images train, {sum(map(len, judged.values()))} judge")
    model = _start(config)
    optimizer = make_optimizer(config)
    state = begin(model, optimizer)
    path = config.out.with_name(f".{config.out.stem}.training.npz")
    identity = _identity(config, folders)
    state = _restored(path, state, identity) if path.exists() else state
    for newest in _steps(state, crops.pool(learned, config.crops), model, optimizer, config):
        state, step = newest, int(newest.step)
        if step % config.checkpoint_every == 0 or step == config.steps:
            _save(path, state, identity)
        if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
            _judged(model, state, judged, config)
    score = _judged(model, state, judged, config)
    save_weights(config.out, averaged(model, state), _card(config, folders, score), _stored(config))
    path.unlink(missing_ok=True)
    return config.out


def _judged(
    model: CPnet, state: State, folders: dict[str, list[Picture]], config: TrainSegmenterConfig
) -> dict[str, dict[str, float]]:
    """The precision of the averaged weights as they will be read: a file of them is judged."""
    path = config.out.with_name(f".{config.out.stem}.judged.safetensors")
    try:
        save_weights(path, averaged(model, state), dtype=_stored(config))
        return judge(Segmenter(path), folders)
    finally:
        path.unlink(missing_ok=True)


def _stored(config: TrainSegmenterConfig) -> type[np.floating]:
    return np.float16 if config.half else np.float32


def deal(pictures: list[Picture], held_out: float) -> tuple[list[Picture], list[Picture]]:
    """Which pictures are learned from and which judge: by a digest of their names, so that a folder that grows keeps
    its judges apart."""
    order = sorted(pictures, key=lambda picture: hashlib.sha256(picture.name.encode()).hexdigest())
    held = round(held_out * len(order))
    if held == len(order):
        raise InputError(f"--held-out {held_out}: leaves none of {len(order)} images to train on")
    return order[held:], order[:held]


def _start(config: TrainSegmenterConfig) -> CPnet:
    if config.init_from:
        model = build(*load_weights(names.find(config.init_from, flag="init-from")))
        if not isinstance(model, CPnet):
            raise InputError(
                f"--init-from {config.init_from}: is cpsam; networks of cellpose 3 are trained here"
            )
        if model.config.channels not in (1, 2):
            raise InputError(
                f"--init-from {config.init_from}: takes {model.config.channels} channels, not 1 or 2"
            )
        return model
    size = config.crops.diameter
    return create(CPnetConfig((1, *config.widths), diam_mean=size, diam_labels=size), config.seed)


def make_optimizer(config: TrainSegmenterConfig) -> optax.GradientTransformation:
    """AdamW under a rising and falling rate, gradients cut to a length."""
    top = config.learning_rate
    rate = optax.warmup_cosine_decay_schedule(
        top / 25, top, max(config.steps // 10, 1), config.steps + 1, top / 100
    )
    return optax.chain(
        optax.clip_by_global_norm(LONGEST), optax.adamw(rate, weight_decay=config.weight_decay)
    )


def begin(model: CPnet, optimizer: optax.GradientTransformation) -> State:
    """Before the first step."""
    params, statistics = nnx.state(model, nnx.Param, ...)
    copied = jax.tree.map(jnp.copy, (params, statistics))
    return State(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params), copied)


def averaged(model: CPnet, state: State) -> CPnet:
    """The network of the averaged weights."""
    return nnx.merge(nnx.split(model)[0], *state.averaged)


def _steps(
    state: State,
    pool: Pool,
    model: CPnet,
    optimizer: optax.GradientTransformation,
    config: TrainSegmenterConfig,
) -> Iterator[State]:
    graph = nnx.split(model)[0]
    channels = model.config.channels

    def loss(params: nnx.State, statistics: nnx.State, batch: Crops) -> tuple[Array, nnx.State]:
        model = nnx.merge(graph, params, statistics, copy=True)
        # Cellpose's second channel holds nuclei beside cells; of one channel it is empty.
        image = jnp.pad(batch.image, ((0, 0), (0, 0), (0, 0), (0, channels - 1)))
        maps = model(image, Mode(train=True)).maps
        return objective(maps, batch), nnx.state(model, nnx.Param, ...)[1]

    @jax.jit
    def advance(state: State, pool: Pool) -> tuple[State, Array]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        batch = crops.draw(pool, jax.random.split(key, config.batch), config.crops)
        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.params, state.statistics, batch
        )
        updates, moved = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Young runs average over fewer steps, or the start would stay in.
        share = jnp.minimum(AVERAGING, (1 + state.step) / (10 + state.step))
        mean = jax.tree.map(
            lambda old, new: share * old + (1 - share) * new, state.averaged, (params, statistics)
        )
        return State(state.step + 1, params, statistics, moved, mean), value

    done, recent = int(state.step), []
    for _ in track(
        range(done, config.steps), total=config.steps, label="training", unit="batches", done=done
    ):
        state, value = advance(state, pool)
        recent.append(float(value))
        if not np.isfinite(recent[-1]):
            raise InputError(
                f"--learning-rate {config.learning_rate}: the loss is {value} at step {int(state.step)}"
            )
        if len(recent) == config.checkpoint_every:
            console.print(f"step {int(state.step)}: loss {np.mean(recent):.4f}")
            recent.clear()
        yield state


def objective(maps: Float[Array, "b h w 3"], batch: Crops) -> Float[Array, ""]:
    """Half the mean squared error of the flow, five times unit vectors, plus the cross-entropy of being in an object
    (cellpose's), over what lies in the pictures."""
    flow = jnp.square(maps[..., :2] - FLOW_SCALE * batch.flow).mean(-1) / 2
    inside = optax.sigmoid_binary_cross_entropy(maps[..., 2], batch.inside)
    return ((flow + inside) * batch.weight).sum() / batch.weight.sum()


def judge(segmenter: Segmenter, folders: dict[str, list[Picture]]) -> dict[str, dict[str, float]]:
    """Print and return the mean over each folder's held-out images of their average precision."""
    scores = {}
    for folder, pictures in folders.items():
        found = AnySize(segmenter).masks(picture.image for picture in pictures)
        matches = [
            precision.match(picture.labels, mask.labels)
            for picture, mask in zip(pictures, found, strict=True)
        ]
        average = precision.mean(matches)
        scores[folder] = {
            f"AP {threshold}": round(float(value), 4)
            for threshold, value in zip(precision.THRESHOLDS, average, strict=True)
        }
        stated = ", ".join(
            f"{value:.3f} at IoU {name[3:]}" for name, value in scores[folder].items()
        )
        console.print(f"held out of {folder}, {len(pictures)} images: average precision {stated}")
    return scores


def _identity(config: TrainSegmenterConfig, folders: list[list[Picture]]) -> str:
    """Of everything that a run's weights follow from."""
    settings = {
        k: v
        for k, v in asdict(config).items()
        if k not in ("images", "out", "evaluate_every", "half")
    }
    settings.pop("checkpoint_every")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(_digest(folders).encode())
    return digest.hexdigest()


def _digest(folders: list[list[Picture]]) -> str:
    digest = hashlib.sha256()
    for picture in (picture for pictures in folders for picture in pictures):
        digest.update(picture.name.encode() + picture.image.tobytes() + picture.labels.tobytes())
    return digest.hexdigest()


def _card(
    config: TrainSegmenterConfig, folders: list[list[Picture]], scores: dict[str, Any]
) -> dict[str, Any]:
    widths = np.concatenate(
        [diameters(picture.labels) for pictures in folders for picture in pictures]
    )
    return {
        "data": {
            folder.name: len(pictures)
            for folder, pictures in zip(config.images, folders, strict=True)
        },
        "data_sha256": _digest(folders),
        "objects": len(widths),
        "settings": json.loads(
            json.dumps({k: v for k, v in asdict(config).items() if k not in ("images", "out")})
        ),
        "held_out": scores,
    }


def _save(path: Path, state: State, identity: str) -> None:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
    with atomic(path) as temporary:
        np.savez(temporary, *leaves, identity=np.array(identity))


def _restored(path: Path, state: State, identity: str) -> State:
    leaves, structure = jax.tree.flatten(state)
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["identity"]) != identity:
                raise InputError(
                    f"{path}: is of a run with other settings or images; remove it to start anew"
                )
            values = [stored[f"arr_{number}"] for number in range(len(leaves))]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is no whole checkpoint ({error}); remove it to start anew"
        ) from error
    console.print(f"going on from {path}")
    return jax.tree.unflatten(structure, [jnp.asarray(value) for value in values])

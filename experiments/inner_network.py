"""What each part of the network of preset `pretrained` is worth, told by folds of the training plates alone.

    python -m experiments.inner_network --data DIR --out runs/inner_network            # the head alone
    python -m experiments.inner_network --data DIR --out runs/inner_network --eyes     # and the eyes: five trainings

The folds are those of `experiments.inner_folds`. What the standing backbone sees is computed once for all sites, and a
head is fitted on two inner folds and judged on the third, in each way of `HEADS`. With `--trainable_branch` the whole preset is
trained on the first inner fold of each outer one, and judged with the eyes at every weight of `WEIGHTS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx
from jaxtyping import Float, Float32, Int

from experiments.inner_folds import INNER, inner_parts, scores
from experiments.runs import write_table
from perturbjax.cli import parse_options
from perturbjax.core.config import PRESETS, Recipe, SplitConfig
from perturbjax.core.errors import run_command
from perturbjax.core.files import make_folder
from perturbjax.core.options import require, require_sound
from perturbjax.core.progress import track
from perturbjax.data.augmentation import RawBatch
from perturbjax.data.batches import BatchOrder, open_batches
from perturbjax.data.splits import TEST, TRAIN, write_split
from perturbjax.dataset import PLATE, Dataset, open_dataset
from perturbjax.inference import BATCH_SIZE, load_network
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import BRANCH_WEIGHT, EnsembleHead, downsample_by_2
from perturbjax.training.apply_network import apply_to_sites
from perturbjax.training.devices import choose_placement
from perturbjax.training.ensemble_fit import MIX, fit_ensemble, fit_ensemble_members, fit_reduction
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.loss import class_weights
from perturbjax.training.setup import prepare_experiment
from perturbjax.training.step import evaluation_input, make_site_features_step

PRESET = PRESETS["pretrained"]
WEIGHTS = (0.0, 0.1, BRANCH_WEIGHT, 0.3, 0.4, 1.0)


@dataclass(frozen=True)
class Way:
    """How a head is made: views of a site, mixup's parameter, the power of the class weights, and the shares of
    perceptron and linear model; without these, held-out sites decide."""

    views: int = PRESET.transfer.symmetries
    mix: float = MIX
    balance: float = PRESET.optim.balance
    shares: tuple[float, float] | None = (1.0, 0.0)


HEADS = {
    "as it is": Way(shares=None),
    "the perceptron alone": Way(),
    "the linear model alone": Way(shares=(0.0, 1.0)),
    "both alike": Way(shares=(0.5, 0.5)),
    "the perceptron, four views of a site": Way(views=4),
    "the perceptron, one view": Way(views=1),
    "the perceptron, without mixed pairs": Way(mix=0.0),
    "the perceptron, classes weighted by the root": Way(balance=0.5),
}


@dataclass(frozen=True)
class Config:
    data: Path
    """Dataset directory."""
    out: Path
    """Folder for runs and scores."""
    folds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of which outer folds the training plates are taken."""
    inner: tuple[int, ...] = tuple(range(INNER))
    """On which inner folds of each the head is judged."""
    heads: tuple[str, ...] = tuple(HEADS)
    """Which ways to make a head."""
    trainable_branch: bool = False
    """Train the eyes too, on one inner fold of each outer fold."""

    def __post_init__(self) -> None:
        require_sound(self)
        require(
            "folds",
            self.folds,
            bool(self.folds) and all(0 <= fold < 5 for fold in self.folds),
            "some of 0 to 4",
        )
        inner = bool(self.inner) and all(0 <= part < INNER for part in self.inner)
        require("inner", self.inner, inner, f"some of 0 to {INNER - 1}")
        require("heads", self.heads, set(self.heads) <= set(HEADS), f"some of {', '.join(HEADS)}")


def main(options: Config) -> None:
    """Judge every variant on every inner fold; write and print the table."""
    dataset = open_dataset(options.data)
    label = str(dataset.column(dataset.label_column).name)
    labels, names_of = pd.factorize(dataset.column(label), sort=True)
    classes = len(names_of)
    parts = {
        INNER * fold + inner: part
        for fold in options.folds
        for inner, part in enumerate(inner_parts(dataset.index, label, fold))
    }
    heads_on = [number for number in parts if number % INNER in options.inner]
    rows: list[dict[str, Any]] = []

    def judged(
        variant: str,
        part: int,
        truth: Int[np.ndarray, " n"],
        logits: Float[np.ndarray, "n classes"],
    ) -> None:
        rows.append({"variant": variant, "part": part, **scores(truth, logits.argmax(1))})
        write_table(pd.DataFrame(rows), as_markdown(pd.DataFrame(rows)), options.out)

    for views in sorted({HEADS[name].views for name in options.heads}, reverse=True):
        described, seen = describe(options.data, views)
        names = [name for name in options.heads if HEADS[name].views == views]
        for number in track(heads_on, total=len(heads_on), label=f"{views} views", unit="folds"):
            train, held, groups = parts[number]
            mean, kernel = fit_reduction(described[train], seen)
            inside, outside = ((described[part] - mean) @ kernel for part in (train, held))
            for name in names:
                logits = answer(HEADS[name], inside, labels[train], groups, outside, classes)
                judged(name, number, labels[held], logits)
    if options.trainable_branch:
        for fold in options.folds:
            train, held, _ = parts[INNER * fold]
            with_eyes(options, dataset, fold, train, held, judged)
    print((options.out / "scores.md").read_text())


def describe(data: Path, views: int) -> tuple[Float32[np.ndarray, "n d"], int]:
    """What is described of every site before it is reduced, and how much of that the backbone finds."""
    transfer = dataclasses.replace(PRESET.transfer, symmetries=views)
    experiment = prepare_experiment(dataclasses.replace(PRESET, transfer=transfer), (data,))
    placement, positions = choose_placement("auto"), np.arange(len(experiment.dataset))
    step = placement.compile_predict(
        make_site_features_step(experiment.graphdef, experiment.recipe)
    )
    state = placement.replicate((experiment.params, experiment.stats))
    with open_batches(experiment.decoder, placement) as feed:

        def told(order: BatchOrder) -> Any:
            return track(feed.batches(order), total=len(order), label="features", unit="batches")

        (described,) = apply_to_sites(step, *state, told, positions, BATCH_SIZE)
    return described, nnx.merge(
        experiment.graphdef, experiment.params, experiment.stats
    ).backbone_feature_size


def answer(
    way: Way,
    z: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    groups: np.ndarray,
    asked: Float[np.ndarray, "m e"],
    classes: int,
) -> Float[np.ndarray, "m classes"]:
    """Logits of others by a head that is fitted to reduced features."""
    weight = class_weights(np.bincount(labels, minlength=classes), way.balance)[labels]
    fresh = EnsembleHead(z.shape[1], classes, rngs=nnx.Rngs(PRESET.seed))
    how: dict[str, Any] = {
        "smoothing": PRESET.optim.label_smoothing,
        "seed": PRESET.seed,
        "mix": way.mix,
    }
    if way.shares is None:
        made = fit_ensemble(fresh, z, labels, weight, groups, **how)
    else:
        made = fit_ensemble_members(fresh, z, labels, weight, **how)
        made.ensemble_weights[...] = jnp.array(way.shares)
    return np.asarray(made(jnp.asarray(asked, jnp.float32), Mode()))


def with_eyes(
    options: Config,
    dataset: Dataset,
    fold: int,
    train: Int[np.ndarray, " a"],
    held: Int[np.ndarray, " b"],
    judged: Callable[..., None],
) -> None:
    """Train the whole preset on one inner fold, and judge it with the eyes at every weight."""
    rows = dataset.index.iloc[np.concatenate([train, held])]
    part = np.repeat([TRAIN, TEST], [len(train), len(held)])
    split = make_folder(options.out / "runs") / f"inner{fold}.parquet"
    write_split(
        pd.DataFrame({"site_id": rows["site_id"], "group": rows[PLATE].astype(str), "part": part}),
        split,
    )
    recipe = dataclasses.replace(PRESET, split=SplitConfig(split_file=str(split)))
    run = fit(
        TrainConfig(
            out=split.with_suffix(""), data=(options.data,), recipe=recipe, evaluate_every=1000
        )
    )
    network = load_network(run, dataset=dataset)
    step = network.placement.compile_predict(_apart(network.graphdef, recipe))
    with open_batches(network.decoder(dataset), network.placement) as feed:
        head, trainable_branch = apply_to_sites(
            step, *network.state.values(), feed.batches, held, BATCH_SIZE
        )
    truth = pd.Categorical(
        dataset.column(run.label_column).iloc[held], categories=network.class_names
    ).codes
    for weight in WEIGHTS:
        judged(
            f"eyes weigh {weight:g}",
            INNER * fold,
            truth,
            (1 - weight) * head + weight * trainable_branch,
        )


def _apart(graphdef: nnx.GraphDef, recipe: Recipe) -> Callable[..., Any]:
    """The log-probabilities of head and eyes, each by itself."""

    def step(params: Any, stats: Any, batch: RawBatch) -> tuple[Any, Any]:
        x, mode = evaluation_input(recipe, batch)
        model = nnx.merge(graphdef, params, stats, copy=True)
        head = model.head(model.reduce(model.compute_features(x, mode)), mode)
        return jax.nn.log_softmax(head), jax.nn.log_softmax(
            model.trainable_branch(downsample_by_2(x), mode).logits
        )

    return step


def as_markdown(found: pd.DataFrame) -> str:
    """A row a variant: means over the inner folds that it was judged on."""
    lines = ["| variant | inner folds | accuracy | balanced accuracy |", "|---|---|---|---|"]
    for name, rows in found.groupby("variant", sort=False):
        means = " | ".join(
            f"{rows[metric].mean():.3f}" for metric in ("accuracy", "balanced_accuracy")
        )
        lines.append(f"| {name} | {len(rows)} | {means} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))

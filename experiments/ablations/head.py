"""Variants of the ensemble head of preset `pretrained`, and the weight of its attention branch.

    python -m experiments.ablation --ablation head --data DIR --out runs/head
    python -m experiments.ablation --ablation head --data DIR --out runs/head --branch

Features of the frozen backbone are computed once per number of views. Each variant of the head is
fitted on two inner folds of the training plates and evaluated on the third. `--branch` trains the
whole preset on the first inner fold of each outer fold and evaluates several weights of the branch.

Cost: not recorded for the head. `--branch` trains preset `pretrained` once per outer fold.
Result on 15 inner folds of BBBC021 (accuracy, balanced accuracy): MLP 0.737, 0.632; logistic
regression 0.682, 0.627; MLP without mixup 0.724, 0.641; with square root of class weights 0.740,
0.621; with four views 0.725, 0.612; with one view 0.711, 0.591. On the first inner fold of each
outer fold: reference 0.714, 0.632; MLP 0.719, 0.626; logistic regression 0.652, 0.607; equal
weights 0.698, 0.636. `--branch` has not been run on all folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx
from jaxtyping import Float, Float32, Int

from experiments.ablation import Config
from experiments.ablations.inner_folds import INNER, inner_folds, score
from perturbjax.core.config import PRESETS, Recipe, SplitConfig
from perturbjax.core.files import make_folder
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
#: Weights of the attention branch in the mean of log-probabilities.
BRANCH_WEIGHTS = (0.0, 0.1, BRANCH_WEIGHT, 0.3, 0.4, 1.0)


@dataclass(frozen=True)
class Variant:
    """Settings of the head.

    Attributes:
        views: number of flips and rotations over which backbone features are averaged.
        mix: parameter of mixup; 0 disables it.
        balance: power of the class weights.
        weights: ensemble weights of MLP and logistic regression; `None` fits them by stacking.
    """

    views: int = PRESET.transfer.symmetries
    mix: float = MIX
    balance: float = PRESET.optim.balance
    weights: tuple[float, float] | None = (1.0, 0.0)


REFERENCE = "reference"
_VARIANTS = {
    REFERENCE: Variant(weights=None),
    "MLP": Variant(),
    "logistic regression": Variant(weights=(0.0, 1.0)),
    "equal weights": Variant(weights=(0.5, 0.5)),
    "MLP, four views": Variant(views=4),
    "MLP, one view": Variant(views=1),
    "MLP, no mixup": Variant(mix=0.0),
    "MLP, square root of class weights": Variant(balance=0.5),
}
VARIANTS = tuple(_VARIANTS)


def run(options: Config) -> Iterator[dict[str, object]]:
    """Evaluate the variants on all inner folds, then the attention branch."""
    assert options.data is not None
    dataset = open_dataset(options.data)
    label = str(dataset.column(dataset.label_column).name)
    labels, names = pd.factorize(dataset.column(label), sort=True)
    folds = {
        INNER * fold + inner: part
        for fold in options.folds
        for inner, part in enumerate(inner_folds(dataset.index, label, fold))
    }
    chosen = {name: _VARIANTS[name] for name in options.variants or VARIANTS}
    for views in sorted({variant.views for variant in chosen.values()}, reverse=True):
        features, backbone_features = compute_features(options.data, views)
        for number in track(folds, total=len(folds), label=f"{views} views", unit="folds"):
            train, test, groups = folds[number]
            mean, kernel = fit_reduction(features[train], backbone_features)
            z_train, z_test = ((features[rows] - mean) @ kernel for rows in (train, test))
            for name, variant in chosen.items():
                if variant.views == views:
                    logits = fit_and_predict(
                        variant, z_train, labels[train], groups, z_test, len(names)
                    )
                    yield {
                        "variant": name,
                        "fold": number,
                        **score(labels[test], logits.argmax(1)),
                    }
    if options.branch:
        for fold in options.folds:
            train, test, _ = folds[INNER * fold]
            yield from evaluate_branch(options, dataset, fold, train, test)


def compute_features(data: Path, views: int) -> tuple[Float32[np.ndarray, "n d"], int]:
    """Compute the unreduced features of all sites with the frozen backbone.

    Returns:
        Features (sites, d), and the number of those that the backbone computes.
    """
    transfer = dataclasses.replace(PRESET.transfer, symmetries=views)
    experiment = prepare_experiment(dataclasses.replace(PRESET, transfer=transfer), (data,))
    placement, positions = choose_placement("auto"), np.arange(len(experiment.dataset))
    step = placement.compile_predict(
        make_site_features_step(experiment.graphdef, experiment.recipe)
    )
    state = placement.replicate((experiment.params, experiment.stats))
    with open_batches(experiment.decoder, placement) as batches:

        def tracked(order: BatchOrder) -> Iterable[RawBatch]:
            return track(batches.batches(order), total=len(order), label="features", unit="batches")

        (features,) = apply_to_sites(step, *state, tracked, positions, BATCH_SIZE)
    model = nnx.merge(experiment.graphdef, experiment.params, experiment.stats)
    return features, model.backbone_feature_size


def fit_and_predict(
    variant: Variant,
    z: Float[np.ndarray, "n e"],
    labels: Int[np.ndarray, " n"],
    groups: np.ndarray,
    z_test: Float[np.ndarray, "m e"],
    classes: int,
) -> Float[np.ndarray, "m classes"]:
    """Fit a head to reduced features and return its logits for other sites.

    Args:
        variant: settings of the head.
        z: (n, e) reduced features of the training sites.
        labels: (n,) class numbers.
        groups: (n,) plates; stacking holds out whole plates.
        z_test: (m, e) reduced features of the test sites.
        classes: width of the logits.
    """
    weight = class_weights(np.bincount(labels, minlength=classes), variant.balance)[labels]
    head = EnsembleHead(z.shape[1], classes, rngs=nnx.Rngs(PRESET.seed))
    settings: dict[str, Any] = {
        "smoothing": PRESET.optim.label_smoothing,
        "seed": PRESET.seed,
        "mix": variant.mix,
    }
    if variant.weights is None:
        fitted = fit_ensemble(head, z, labels, weight, groups, **settings)
    else:
        fitted = fit_ensemble_members(head, z, labels, weight, **settings)
        fitted.ensemble_weights[...] = jnp.array(variant.weights)
    return np.asarray(fitted(jnp.asarray(z_test, jnp.float32), Mode()))


def evaluate_branch(
    options: Config,
    dataset: Dataset,
    fold: int,
    train: Int[np.ndarray, " a"],
    test: Int[np.ndarray, " b"],
) -> Iterator[dict[str, object]]:
    """Train the preset on one inner fold; score the ensemble at every weight of the branch."""
    rows = dataset.index.iloc[np.concatenate([train, test])]
    manifest = {
        "site_id": rows["site_id"],
        "group": rows[PLATE].astype(str),
        "part": np.repeat([TRAIN, TEST], [len(train), len(test)]),
    }
    split = make_folder(options.out / "runs") / f"inner{fold}.parquet"
    write_split(pd.DataFrame(manifest), split)
    recipe = dataclasses.replace(PRESET, split=SplitConfig(split_file=str(split)))
    data = (Path(str(options.data)),)
    run = fit(TrainConfig(out=split.with_suffix(""), data=data, recipe=recipe, evaluate_every=1000))
    network = load_network(run, dataset=dataset)
    step = network.placement.compile_predict(_make_step(network.graphdef, recipe))
    with open_batches(network.decoder(dataset), network.placement) as batches:
        head, branch = apply_to_sites(
            step, *network.state.values(), batches.batches, test, BATCH_SIZE
        )
    labels = dataset.column(run.label_column).iloc[test]
    truth = pd.Categorical(labels, categories=network.class_names).codes
    for weight in BRANCH_WEIGHTS:
        logits = (1 - weight) * head + weight * branch
        scores = score(truth, logits.argmax(1))
        yield {"variant": f"branch weight {weight:g}", "fold": INNER * fold, **scores}


def _make_step(graphdef: nnx.GraphDef, recipe: Recipe) -> Callable[..., Any]:
    """Make a step that returns the log-probabilities of head and branch separately."""

    def step(params: Any, stats: Any, batch: RawBatch) -> tuple[Any, Any]:
        x, mode = evaluation_input(recipe, batch)
        model = nnx.merge(graphdef, params, stats, copy=True)
        head = model.head(model.reduce(model.compute_features(x, mode)), mode)
        branch = model.trainable_branch(downsample_by_2(x), mode).logits
        return jax.nn.log_softmax(head), jax.nn.log_softmax(branch)

    return step

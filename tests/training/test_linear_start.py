"""A network that starts at the linear solution: it answers as scikit-learn would, and goes on from there."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from published import write_resnet18
from sklearn.linear_model import LogisticRegression
from tiny_dataset import write_dataset

from perturbjax.config import AugmentConfig, InputConfig, ModelConfig, OptimConfig, Recipe, SplitConfig, TransferConfig
from perturbjax.console import InputError
from perturbjax.dataset import open_dataset
from perturbjax.inference import load_network
from perturbjax.models.channels import measured
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.devices import ComputeConfig
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.linear_start import solve


def blobs(n: int = 120, d: int = 20, classes: int = 3):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return (rng.normal(size=(classes, d))[labels] + rng.normal(size=(n, d))).astype(np.float32) * 5 + 7, labels


@pytest.mark.parametrize("classes", [2, 3])
def test_the_solution_answers_as_the_regression_it_was_made_of(classes):
    x, labels = blobs(classes=classes)
    found = solve(x, labels, classes + 1, backbone=15)
    logits = (x - found.mean) * found.gain @ found.kernel + found.bias
    model = LogisticRegression(C=0.01, max_iter=300, class_weight="balanced")
    z = (x - x.mean(0)) / x.std(0)
    z *= np.sqrt(500 / np.repeat([15, 5], [15, 5]))  # each part's total variance
    model.fit(z, labels)  # all components are kept, so that rotating the features changes nothing
    likelihood = np.exp(logits[:, :classes])
    np.testing.assert_allclose(likelihood / likelihood.sum(1, keepdims=True), model.predict_proba(z), atol=2e-3)
    assert (logits.argmax(1) < classes).all()  # the class without a site is never answered


def test_a_feature_that_never_varies_counts_for_nothing():
    x, labels = blobs()
    x[:, 3] = 4
    assert not np.any(solve(x, labels, 3, backbone=15).gain[3])


def test_cells_are_counted_by_their_numbers_and_light_as_it_is():
    mask = jnp.zeros((2, 8, 8)).at[0, :2, :2].set(1).at[0, 4:, 4:].set(7)
    image = jnp.stack([jnp.full((8, 8, 1), 2.0), jnp.arange(64.0).reshape(8, 8, 1)])
    found = np.asarray(measured(mask, image))
    np.testing.assert_allclose(found[0, :5], [2, 0, 2, 2, 2], atol=1e-6)
    np.testing.assert_allclose(found[1, [0, 3]], [31.5, 31.5])
    np.testing.assert_allclose(np.expm1(found[:, 5]), [2, 0], atol=1e-6)
    np.testing.assert_allclose(np.exp(found[:, 6]), [20 / 64 + 1e-3, 1e-3], rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    write_dataset(folder / "data", sites=36, size=24, channels=["DNA", "Actin"])
    write_resnet18(folder / "resnet18.safetensors")
    return folder


def config(folder, name: str, **changes) -> TrainConfig:
    recipe = Recipe(
        model=ModelConfig(model="resnet18"),
        input=InputConfig(normalize="log_plate", mask_encoding="instance"),
        augment=AugmentConfig(crop=24),
        optim=OptimConfig(epochs=1, batch_size=12, learning_rate=1e-9, weight_decay=0.0),
        split=SplitConfig(split="well", folds=3),
        transfer=TransferConfig(weights=str(folder / "resnet18.safetensors"), head="channels", freeze_epochs=1),
    )
    recipe = dataclasses.replace(recipe, **changes)
    return TrainConfig(
        out=folder / name,
        data=(folder / "data",),
        recipe=recipe,
        checkpoint_every=1,
        compute=ComputeConfig(devices="1"),
    )


@pytest.fixture(scope="module")
def run(folder):
    return fit(config(folder, "run"))


def test_a_run_that_hardly_moves_ends_where_it_started_at_the_linear_solution(folder, run):
    network = load_network(run)
    dataset = open_dataset(folder / "data")
    train = np.flatnonzero(run.parts(dataset.index["site_id"]) == "train")
    answers = network.apply_to(dataset, train)
    features = answers.features
    moving = features.std(0) > 1e-3
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(features[:, moving].std(0), 1, atol=1e-2)
    labels = dataset.column("Metadata_pert_iname").to_numpy()[train]
    assert (np.array(network.class_names)[answers.probabilities.argmax(1)] == labels).mean() > 0.9


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_at_the_same_bits(folder, run):
    again = fit(config(folder, "again"))
    one, other = (Checkpoints(path).load("latest")[0] for path in (run.path, again.path))
    assert all(np.array_equal(value, other[name]) for name, value in one.items())
    assert any(name.startswith("stats/standardize") for name in one)


def test_what_it_needs_is_said():
    with pytest.raises(InputError, match="--normalize site: must be log or log_plate"):
        Recipe(input=InputConfig(normalize="site"), transfer=TransferConfig(weights="w", head="channels"))
    with pytest.raises(InputError, match="--weights : must be given"):
        Recipe(input=InputConfig(normalize="log"), transfer=TransferConfig(head="channels"))

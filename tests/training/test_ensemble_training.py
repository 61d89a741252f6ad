"""Tests of trainings of the ensemble classifier, and of the features of its runs."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published import write_resnet18
from tiny_dataset import write_dataset

from perturbjax.core.config import (
    AugmentConfig,
    InputConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SplitConfig,
    TransferConfig,
)
from perturbjax.core.errors import InputError
from perturbjax.data.batches import open_batches
from perturbjax.data.batches.decoder import MaskChange
from perturbjax.dataset import open_dataset
from perturbjax.evaluation import class_attribution
from perturbjax.export import StableHLOConfig, export
from perturbjax.inference import load_network
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import (
    HIDDEN_UNITS,
)
from perturbjax.training.checkpoint import CheckpointConfig, Checkpoints
from perturbjax.training.checkpoint_arrays import select_network_arrays
from perturbjax.training.devices import ComputeConfig
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.setup import prepare_experiment
from perturbjax.training.site_features import SiteFeatures

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    write_dataset(folder / "data", sites=36, size=24, channels=["DNA", "Actin"])
    write_resnet18(folder / "resnet18.safetensors")
    return folder


def config(folder, name: str, window: int = 0) -> TrainConfig:
    """Settings; with `window`, the network gets windows of sites that are larger than the crop."""
    recipe = Recipe(
        model=ModelConfig(model="resnet18"),
        input=InputConfig(normalize="log_plate", mask_encoding="instance"),
        augment=AugmentConfig(crop=16 if window else 24),
        optim=OptimConfig(
            epochs=2, batch_size=12, learning_rate=0.01, weight_decay=0.1, decoupled=True
        ),
        split=SplitConfig(split="well", folds=3),
        transfer=TransferConfig(
            weights=str(folder / "resnet18.safetensors"), head="channels", window=window
        ),
    )
    return TrainConfig(
        out=folder / name,
        data=(folder / "data",),
        recipe=recipe,
        checkpoint_every=1,
        compute=ComputeConfig(devices="1"),
    )


@pytest.mark.parametrize(
    ("least", "steps_per_epoch", "steps"),
    [(0, 0, 2), (4, 0, 2), (5, 0, 3), (51, 0, 26), (51, 1, 1)],
)
def test_least_steps_lengthen_epochs_of_small_datasets(folder, least, steps_per_epoch, steps):
    recipe = config(folder, "unused").recipe
    optim = replace(recipe.optim, least_steps=least, steps_per_epoch=steps_per_epoch)
    experiment = prepare_experiment(replace(recipe, optim=optim), (folder / "data",))
    assert (
        experiment.steps_per_epoch == steps and len(experiment.order) == 2 * steps
    )  # 24 sites, 12 a step, 2 epochs


@pytest.fixture(
    scope="module",
    params=[0, pytest.param(32, marks=pytest.mark.slow)],  # a second training takes 30 s
    ids=["whole sites", "windows"],
)
def run(folder, request):
    return fit(config(folder, f"run{request.param}", request.param))


def test_training_changes_the_branch_only_and_frozen_members_fit_training_sites(folder, run):
    network = load_network(run)
    dataset = open_dataset(folder / "data")
    train = np.flatnonzero(run.parts(dataset.index["site_id"]) == "train")
    state, model = network.state.values(), nnx.merge(network.graphdef, *network.state.values())
    site_features = SiteFeatures(network.graphdef, run.recipe, network.placement)
    with open_batches(network.decoder(dataset), network.placement) as pipeline:
        unreduced = site_features.compute(*state, pipeline.batches, train)
    reduced = model.reduce(jnp.asarray(unreduced))
    np.testing.assert_allclose(reduced.mean(0), 0, atol=1e-3)
    labels = dataset.column("Metadata_pert_iname").to_numpy()[train]
    head = model.head
    for part in (head.mlp(reduced, Mode()), head.logistic_regression(reduced)):
        assert (np.array(network.class_names)[np.asarray(part).argmax(1)] == labels).mean() > 0.9
    one, other = (Checkpoints(run.path).load("latest", epoch)[0] for epoch in (1, 2))
    trained = [
        name for name in select_network_arrays(one) if not np.array_equal(one[name], other[name])
    ]
    assert trained and all("/trainable_branch/" in name for name in trained)


def test_features_are_the_trained_representation(folder, run):
    """Hidden units of the MLP and features of the branch, the same for arrays and datasets."""
    network, dataset = load_network(run), open_dataset(folder / "data")
    features = network.apply_to_dataset(dataset, np.arange(9)).features
    model = nnx.merge(network.graphdef, *network.state.values())
    assert features.shape == (9, model.feature_size)
    probabilities = model.head.mlp.out(jnp.asarray(features[:, :HIDDEN_UNITS]))
    assert (
        probabilities.shape == (9, len(network.class_names))
        and (features[:, :HIDDEN_UNITS] >= 0).all()
    )
    images, masks = dataset.read(range(9))
    plates = list(dataset.column("Metadata_Plate")[:9])
    if run.recipe.input.normalize == "log":
        assert np.array_equal(network.apply(images, masks, plates).features, features)


def test_several_masks_share_one_pass_of_the_backbone(folder, run, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBJAX_SITE_FEATURES", str(tmp_path))
    network, dataset, positions = load_network(run), open_dataset(folder / "data"), np.arange(9)
    changes = {"unchanged": MaskChange(), "empty": MaskChange(np.zeros_like)}
    unchanged, empty = network.apply_with_masks(dataset, positions, changes)
    separately = network.changed(dataset, positions, changes["empty"].change_batch)
    for one, other in (
        (unchanged, network.apply_to_dataset(dataset, positions)),
        (empty, separately),
    ):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
        np.testing.assert_allclose(one.features, other.features, atol=1e-3)
    assert not np.allclose(unchanged.features, empty.features, atol=1e-2)
    # The second time the features of both masks are read.
    monkeypatch.delattr(SiteFeatures, "_compute_masks")
    again = network.apply_with_masks(dataset, positions, changes)
    assert all(map(np.array_equal, (*unchanged, *empty), (*again[0], *again[1])))
    with pytest.raises(AttributeError):  # other sites are not stored
        network.apply_with_masks(dataset, positions + 1, changes)


def test_hidden_channels_share_one_pass_of_the_backbone(folder, run, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBJAX_SITE_FEATURES", str(tmp_path))
    network, dataset, positions = load_network(run), open_dataset(folder / "data"), np.arange(3)
    probabilities = network.apply_to_dataset(dataset, positions).probabilities
    inputs = network, dataset, positions, probabilities
    losses = class_attribution.part_losses(*inputs)
    with monkeypatch.context() as patch:
        # The second time all features are read.
        patch.setattr(SiteFeatures, "_compute_parts", lambda *_: iter(()))
        assert np.array_equal(class_attribution.part_losses(*inputs), losses)
    monkeypatch.setattr(class_attribution, "_features_of_parts", lambda *_: None)
    separately = class_attribution.part_losses(*inputs)
    np.testing.assert_allclose(losses, separately, atol=1e-6)
    assert abs(losses).max() > 1e-4


def test_repeated_sites_are_changed_separately(folder, run):
    """Occlusion repeats a site with other pixels each time."""
    network, dataset, positions = load_network(run), open_dataset(folder / "data"), np.arange(4)

    def empty_odd_rows(batch, first):
        image = np.array(batch.image)
        image[(first + np.arange(len(image))) % 2 == 1] = 0
        return batch._replace(image=image)

    features = network.changed(dataset, np.repeat(positions, 2), empty_odd_rows).features
    unchanged = network.apply_to_dataset(dataset, positions).features
    np.testing.assert_allclose(features[::2], unchanged, atol=1e-3)
    assert not np.allclose(features[1::2], unchanged, atol=1e-2)


def test_site_features_are_computed_once(folder, run, tmp_path, monkeypatch):
    """A second prediction reads the stored features and gives identical results."""
    monkeypatch.setenv("PERTURBJAX_SITE_FEATURES", str(tmp_path))
    network, dataset = load_network(run), open_dataset(folder / "data")
    first = network.apply_to_dataset(dataset, np.arange(5))
    (file,) = tmp_path.glob("*.npz")
    computed = []
    monkeypatch.setattr(
        SiteFeatures, "_compute_parts", lambda *args: iter(computed.append(args[-1]) or [])
    )
    again = network.apply_to_dataset(dataset, np.arange(5))
    assert not len(computed[0]) and all(map(np.array_equal, first, again))
    # Damaged files are ignored.
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(KeyError):
        network.apply_to_dataset(dataset, np.arange(5))
    assert computed[1].tolist() == list(range(5))


@pytest.mark.slow
def test_ensemble_training_is_bit_identical_when_repeated(folder, run):
    again = fit(config(folder, f"again{run.path.name}", run.recipe.transfer.window))
    one, other = (Checkpoints(path).load("latest")[0] for path in (run.path, again.path))
    assert all(np.array_equal(value, other[name]) for name, value in one.items())
    assert any(name.startswith("stats/reduce") for name in one)


def test_exported_ensemble_predicts_same_as_run(folder, run):
    out = export(
        StableHLOConfig(CheckpointConfig(run.path), out=folder / f"exported_{run.path.name}")
    )
    exported = jax.export.deserialize((out / "network.jax_export").read_bytes())
    network, dataset = load_network(run), open_dataset(folder / "data")
    images, masks = dataset.read(range(9))
    plates = list(dataset.column("Metadata_Plate")[:9])
    expected = network.apply(images, masks, plates)
    outputs = exported.call(images, masks.astype(np.uint16), *network.intensities(images, plates))
    np.testing.assert_allclose(outputs[0], expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(outputs[1], expected.features, atol=1e-3)


def test_ensemble_requirements_are_checked():
    with pytest.raises(InputError, match="--normalize site: must be log or log_plate"):
        Recipe(
            input=InputConfig(normalize="site"),
            transfer=TransferConfig(weights="w", head="channels"),
        )
    with pytest.raises(
        InputError, match="--crop 8: must be at least 16 pixels with --head channels"
    ):
        Recipe(
            input=InputConfig(normalize="log"),
            augment=AugmentConfig(crop=8),
            transfer=TransferConfig(weights="w", head="channels"),
        )
    with pytest.raises(InputError, match="--weights : must be set"):
        Recipe(input=InputConfig(normalize="log"), transfer=TransferConfig(head="channels"))

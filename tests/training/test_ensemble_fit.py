"""Tests of the ensemble classifier: fit of its frozen members, ensemble weights, and training of
the branch.
"""

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
    LINEAR_C,
    LINEAR_VARIANCE,
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
    COMPONENTS,
    HIDDEN_UNITS,
    MLP,
    EnsembleHead,
    compute_statistics,
)
from perturbjax.models.layers import Dense
from perturbjax.training.checkpoint import CheckpointConfig, Checkpoints
from perturbjax.training.checkpoint_arrays import select_network_arrays
from perturbjax.training.devices import ComputeConfig
from perturbjax.training.ensemble_fit import (
    MIN_ENSEMBLE_WEIGHT,
    estimate_ensemble_weights,
    fit_ensemble,
    fit_logistic_regression,
    fit_mlp,
    fit_reduction,
)
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.setup import prepare_experiment
from perturbjax.training.site_features import SiteFeatures

pytestmark = pytest.mark.full


def blobs(n: int = 120, d: int = 20, classes: int = 3):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return (rng.normal(size=(classes, d))[labels] + rng.normal(size=(n, d))).astype(
        np.float32
    ) * 5 + 7, labels


@pytest.mark.parametrize("n", [120, 12])
def test_reduction_balances_variance_of_uncorrelated_components_and_statistics(n):
    x, _ = blobs(n)
    mean, kernel = fit_reduction(x, backbone_features=15)
    z = (x - mean) @ kernel
    assert z.shape == (n, 20)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose([z[:, :15].var(0).sum(), z[:, 15:].var(0).sum()], 10, rtol=1e-4)
    covariance = np.cov(z[:, : min(15, n - 1)].T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    assert n > 15 or not z[:, n:15].any()  # fewer sites than components


def test_reduction_limits_number_of_components():
    x = np.random.default_rng(0).normal(size=(300, COMPONENTS + 40)).astype(np.float32)
    _, kernel = fit_reduction(x, backbone_features=COMPONENTS + 30)
    assert kernel.shape == (COMPONENTS + 40, COMPONENTS + 10)


def test_reduction_ignores_constant_feature():
    x, _ = blobs()
    x[:, 3] = 4
    assert not np.any(fit_reduction(x, backbone_features=15)[1][3])


def fit_blobs(x, labels, weight, seed: int = 0) -> MLP:
    return fit_mlp(MLP(x.shape[1], 4, rngs=nnx.Rngs(0)), x, labels, weight, 0.1, seed)


def test_mlp_predicts_held_out_sites_and_depends_on_seed():
    x, labels = blobs(240)
    x = (x - x.mean(0)) / x.std(0)
    head = fit_blobs(x[:160], labels[:160], np.ones(160))
    predicted = np.asarray(head(jnp.asarray(x[160:]), Mode())).argmax(1)
    assert (predicted == labels[160:]).mean() > 0.9
    other = fit_blobs(x[:160], labels[:160], np.ones(160), seed=1)
    assert not np.array_equal(other.hidden.kernel[...], head.hidden.kernel[...])


def test_mlp_uses_site_weights():
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    labels = (np.arange(300) % 10 == 0).astype(int)
    for weight, low, high in ((np.ones(300), 0, 0.05), (np.where(labels, 9.0, 1.0), 0.15, 0.7)):
        predicted = np.asarray(fit_blobs(x, labels, weight)(jnp.asarray(x), Mode())).argmax(1)
        assert low <= (predicted == 1).mean() <= high


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 2], [1]])
def test_logistic_regression_predicts_training_classes_only(classes):
    x, labels = blobs(240)
    x = ((x - x.mean(0)) / x.std(0))[np.isin(labels, classes)]
    labels = labels[np.isin(labels, classes)]
    half = len(x) // 2
    model = fit_logistic_regression(
        Dense(20, 3, rngs=nnx.Rngs(0)), x[:half], labels[:half], np.ones(half)
    )
    probabilities = np.asarray(jax.nn.softmax(model(jnp.asarray(x[half:]))))
    assert (probabilities.argmax(1) == labels[half:]).mean() > 0.9
    assert np.all(np.delete(probabilities, classes, axis=1) < 1e-9)


def test_logistic_regression_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    x, labels = blobs(90)
    x = (x - x.mean(0)) / x.std(0)
    scale = np.sqrt(2 * LINEAR_VARIANCE / 20)
    theirs = LogisticRegression(C=LINEAR_C, max_iter=300, class_weight="balanced").fit(
        x * scale, labels
    )
    ours = fit_logistic_regression(Dense(20, 3, rngs=nnx.Rngs(0)), x, labels, np.ones(90))
    np.testing.assert_allclose(
        jax.nn.softmax(ours(jnp.asarray(x))), theirs.predict_proba(x * scale), atol=1e-4
    )


def test_ensemble_weights_maximize_likelihood():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    informative = 2 * np.eye(4)[labels] + rng.normal(size=(400, 4))
    scores = np.stack([informative, rng.normal(size=(400, 4))])
    log_probabilities = np.asarray(jax.nn.log_softmax(jnp.asarray(scores)), np.float64)

    def loss(weights):
        logits = np.tensordot(weights, log_probabilities, 1)
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(400), labels])

    best = estimate_ensemble_weights(log_probabilities, labels)
    assert best[0] > 0.8 and MIN_ENSEMBLE_WEIGHT <= best[1] < 0.2
    for change in ([0.05, 0], [-0.05, 0], [0, 0.05], [0.05, 0.05]):
        assert loss(best) <= loss(np.maximum(best + change, MIN_ENSEMBLE_WEIGHT)) + 1e-9


@pytest.mark.parametrize("groups", [np.arange(120) // 30, np.zeros(120)])
def test_ensemble_combines_members_with_their_weights(groups):
    x, labels = blobs()
    x = (x - x.mean(0)) / x.std(0)
    head = fit_ensemble(
        EnsembleHead(20, 3, rngs=nnx.Rngs(0)),
        x,
        labels,
        np.ones(120),
        groups,
        smoothing=0.1,
        seed=0,
    )
    x = jnp.asarray(x)
    members = [
        jax.nn.log_softmax(logits) for logits in (head.mlp(x, Mode()), head.logistic_regression(x))
    ]
    weights = np.asarray(head.ensemble_weights[...])
    assert weights.min() >= np.float32(MIN_ENSEMBLE_WEIGHT) and weights.max() > 0.5
    expected = weights[0] * members[0] + weights[1] * members[1]
    np.testing.assert_allclose(head(x, Mode()), expected, atol=1e-4)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ensemble_fits_one_or_two_sites(n):
    x, labels = blobs(n)
    head = fit_ensemble(
        EnsembleHead(20, 3, rngs=nnx.Rngs(0)),
        x,
        labels,
        np.ones(n),
        np.zeros(n),
        smoothing=0.1,
        seed=0,
    )
    np.testing.assert_array_equal(head.ensemble_weights[...], [0.5, 0.5])
    assert np.isfinite(head(jnp.asarray(x), Mode())).all()


def test_ensemble_weights_ignore_classes_of_a_single_group():
    x, labels = blobs()
    x = (x - x.mean(0)) / x.std(0)
    head = fit_ensemble(
        EnsembleHead(20, 3, rngs=nnx.Rngs(0)),
        x,
        labels,
        np.ones(120),
        labels,
        smoothing=0.1,
        seed=0,
    )
    np.testing.assert_array_equal(head.ensemble_weights[...], [0.5, 0.5])


def test_site_statistics_count_cells_and_intensities():
    mask = jnp.zeros((2, 8, 8)).at[0, :2, :2].set(1).at[0, 4:, 4:].set(7)
    image = jnp.stack([jnp.full((8, 8, 1), 2.0), jnp.arange(64.0).reshape(8, 8, 1)])
    statistics = np.asarray(compute_statistics(mask, image))
    np.testing.assert_allclose(statistics[0, :5], [2, 0, 2, 2, 2], atol=1e-6)
    np.testing.assert_allclose(statistics[1, [0, 3]], [31.5, 31.5])
    np.testing.assert_allclose(np.expm1(statistics[:, 5]), [2, 0], atol=1e-6)
    np.testing.assert_allclose(np.exp(statistics[:, 6]), [20 / 64 + 1e-3, 1e-3], rtol=1e-5)


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

"""Tests that predictions are bit-identical for arrays and datasets, and for one site and many."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset

from perturbjax.cli.evaluate import ApplyConfig, PredictConfig, predict
from perturbjax.core.config import AugmentConfig, InputConfig, OptimConfig, Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.data.batches.decoder import MaskChange
from perturbjax.dataset import PLATE, open_dataset
from perturbjax.inference import load_network
from perturbjax.training.checkpoint import CheckpointConfig
from perturbjax.training.fit import TrainConfig, fit

pytestmark = pytest.mark.full

SITES, BATCH = 30, 8
NORMALIZATIONS = ("dtype", "log", "site", "plate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inference")
    write_dataset(folder / "data", sites=SITES, size=24, channels=["DNA", "Actin"])
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return open_dataset(folder / "data")


@pytest.fixture(scope="module", params=NORMALIZATIONS)
def run(request, folder):
    recipe = Recipe(
        input=InputConfig(normalize=request.param, mask_encoding="distance"),
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=8),
        split=SplitConfig(split="well", folds=3),
    )
    return fit(TrainConfig(out=folder / request.param, data=(folder / "data",), recipe=recipe))


def load(run):
    return load_network(run, batch_size=BATCH)


def plates_for(run, dataset):
    return dataset.column(PLATE).tolist() if run.recipe.input.normalize == "plate" else None


@pytest.mark.parametrize("feed", ["resident", "streamed"])
def test_predict_of_arrays_equals_command(run, dataset, tmp_path, feed):
    out = predict(
        PredictConfig(
            ApplyConfig(CheckpointConfig(run.path), batch_size=BATCH, feed=feed),
            (dataset.path,),
            tmp_path / "p.parquet",
        )
    )
    table = pd.read_parquet(out)
    network = load(run)
    ours = network.predict(*dataset.read(range(SITES)), plates_for(run, dataset))
    assert ours.dtype == np.float32 and ours.shape == (SITES, 2)
    assert np.array_equal(ours, table[[f"prob_{name}" for name in network.class_names]].to_numpy())


def test_masks_that_share_batches_give_the_same_predictions(run, dataset):
    network, positions = load(run), np.arange(BATCH + 3)
    changes = {"same": MaskChange(), "empty": MaskChange(np.zeros_like)}
    together = network.apply_with_masks(dataset, positions, changes)
    for change, one in zip(changes.values(), together, strict=True):
        assert all(
            map(np.array_equal, one, network.changed(dataset, positions, change.change_batch))
        )
    assert not np.array_equal(together[0].probabilities, together[1].probabilities)


def test_prediction_does_not_depend_on_other_sites_or_order(run, dataset):
    network, plates = load(run), plates_for(run, dataset)
    images, masks = dataset.read(range(SITES))
    together = network.apply(images, masks, plates)
    assert np.ptp(together.probabilities, axis=0).max() > 0, (
        "all predictions are equal, so the comparison would be trivial"
    )
    if plates is not None:  # predictions depend on the other sites of the plate
        return
    for position in (0, 5, 13, SITES - 1):
        single = network.apply(images[[position]], masks[[position]])
        for one, all_sites in zip(single, together, strict=True):
            assert np.array_equal(one[0], all_sites[position])
    shuffled = np.random.default_rng(0).permutation(SITES)
    assert np.array_equal(
        network.features(images[shuffled], masks[shuffled]), together.features[shuffled]
    )
    assert np.array_equal(
        network.apply_to_dataset(dataset, shuffled).features, together.features[shuffled]
    )


def test_load_network_accepts_path_and_stores_epoch(run):
    assert load_network(str(run.path)).facts["epoch"] == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda images, masks: (images[..., :1], masks), r"images: have shape .*2 \(DNA, Actin\)"),
        (lambda images, masks: (images[0], masks), "images: have shape"),
        (lambda images, masks: (images[:0], masks[:0]), "images: have shape"),
        (lambda images, masks: (images.astype(np.float32), masks), "images: are float32.*uint16"),
        (lambda images, masks: (images, masks[:, 1:]), "masks: have shape"),
        (
            lambda images, masks: (images, masks.astype(np.int32) - 1),
            "masks: must be whole numbers",
        ),
        (lambda images, masks: (images, masks.astype(float)), "masks: must be whole numbers"),
        (lambda images, masks: (images, masks, ["P0"]), "plates: 1 names for 30 images"),
    ],
)
def test_invalid_array_is_named(run, dataset, change, text):
    with pytest.raises(InputError, match=text):
        load(run).predict(*change(*dataset.read(range(SITES))))


def test_plates_are_required_by_plate_normalization_only(run, dataset):
    arrays = dataset.read(range(SITES))
    if run.recipe.input.normalize != "plate":
        assert len(load(run).predict(*arrays)) == SITES
        return
    with pytest.raises(InputError, match=r"plates: .* normalizes by plate"):
        load(run).predict(*arrays)

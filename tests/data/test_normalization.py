"""Predictions use the stored statistics of the run, so they do not depend on the other sites of a
dataset.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset

from perturbjax.cli.evaluate import ApplyConfig, PredictConfig, predict
from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.config import AugmentConfig, InputConfig, OptimConfig, Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.data import normalization
from perturbjax.dataset import open_dataset
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.training.checkpoint import CheckpointConfig, Checkpoints
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.run_directory import open_run

pytestmark = pytest.mark.full

SITES, FEW, CHANNELS = 48, 9, ["DNA", "Actin"]
BATCH = 3  # equal batches in both datasets


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`many` sites of two complete plates, and a dataset of the `few` first of them."""
    folder = tmp_path_factory.mktemp("normalize")
    for name, sites in (("many", SITES), ("few", FEW)):
        write_dataset(folder / name, sites=sites, size=32, channels=CHANNELS)
    many, few = (open_dataset(folder / name) for name in ("many", "few"))
    assert all(
        np.array_equal(a, b)
        for a, b in zip(many.read(range(FEW)), few.read(range(FEW)), strict=True)
    )
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Name of a normalisation → a run trained with it for an epoch, once."""
    runs = {}

    def train(name: str):
        if name not in runs:
            recipe = Recipe(
                input=InputConfig(normalize=name),
                augment=AugmentConfig(crop=16),
                optim=OptimConfig(epochs=1, batch_size=16),
                split=SplitConfig(folds=3),
            )
            runs[name] = fit(
                TrainConfig(out=folder / f"run_{name}", data=(folder / "many",), recipe=recipe)
            ).path
        return runs[name]

    return train


def predict_sites(run, data, out) -> np.ndarray:
    """Probabilities of the first sites."""
    table = pd.read_parquet(
        predict(PredictConfig(ApplyConfig(CheckpointConfig(run), batch_size=BATCH), (data,), out))
    )
    return table[[name for name in table if name.startswith("prob_")]].to_numpy()[:FEW]


def read_output(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("dtype", "site")), "log"]
)
def test_predictions_do_not_depend_on_other_sites(trained, folder, tmp_path, capsys, name):
    run = trained(name)
    expected, predicted = (
        predict_sites(run, folder / data, tmp_path / f"{data}.parquet") for data in ("many", "few")
    )
    np.testing.assert_array_equal(predicted, expected)
    assert "warning:" not in read_output(capsys)


def test_background_of_a_subset_differs(folder):
    """The test above could not fail otherwise."""
    few, many = (
        normalization.fit_statistics(open_dataset(folder / name), InputConfig(normalize="log"))
        for name in ("few", "many")
    )
    assert any(
        abs(few["background"][name] / many["background"][name] - 1) > 1e-3 for name in CHANNELS
    )


def test_features_use_statistics_of_the_run(trained, folder, tmp_path):
    def values(name: str) -> np.ndarray:
        config = FeaturesConfig(
            (folder / name,), tmp_path / f"{name}.parquet", run=trained("log"), batch_size=BATCH
        )
        table = pd.read_parquet(extract(config))
        return table[[column for column in table if not column.startswith("Metadata_")]].to_numpy()[
            :FEW
        ]

    np.testing.assert_array_equal(values("few"), values("many"))


def test_statistics_are_stored_in_run_and_checkpoints(trained, folder):
    run = trained("log")
    index = open_dataset(folder / "many").index
    background = {name: max(float(np.median(index[f"p01_{name}"])), 1.0) for name in CHANNELS}
    assert open_run(run).facts["normalization"] == {"background": background}
    checkpoints = Checkpoints(run)
    _, facts = checkpoints.load()
    checkpoints.close()
    assert facts["facts"]["normalization"] == {"background": background}


@pytest.mark.parametrize("name", [pytest.param("log_plate", marks=pytest.mark.slow), "plate"])
def test_incomplete_plate_is_named_in_a_warning(trained, folder, tmp_path, capsys, name):
    run = trained(name)
    capsys.readouterr()
    predict_sites(run, folder / "many", tmp_path / "many.parquet")
    assert "warning:" not in read_output(capsys)
    predict_sites(run, folder / "few", tmp_path / "few.parquet")
    output = read_output(capsys)
    assert (
        f"warning: plate P0 has 9 sites, compared with 24 sites in training. --normalize {name} "
        "uses" in output
    )
    assert output.count("warning:") == 1


def test_new_plate_is_complete_with_half_the_sites_of_training_plates(folder, capsys):
    few, input = open_dataset(folder / "few"), InputConfig(normalize="plate")
    for plates, expected in (
        ({"A": 16, "B": 18}, False),
        ({"A": 40, "B": 44}, True),
        ({"P0": 9, "B": 99}, False),
    ):
        normalization.choose_statistics(
            few, input, {"plates": plates}, "run", is_training_data=False
        )
        assert ("plate P0 has 9 sites" in read_output(capsys)) == expected


def test_missing_statistics_are_fitted_with_a_warning(folder, capsys):
    few, input = open_dataset(folder / "few"), InputConfig(normalize="log")
    assert normalization.choose_statistics(
        few, input, None, "run", is_training_data=True
    ) == normalization.fit_statistics(few, input)
    assert "warning:" not in read_output(capsys)  # the training dataset gives the same statistics
    normalization.choose_statistics(few, input, None, "run", is_training_data=False)
    assert "has no stored statistics for --normalize log. They are computed from" in read_output(
        capsys
    )


def test_channel_without_background_is_named(folder):
    stored = {"background": {"DNA": 100.0}}
    with pytest.raises(InputError, match="channel Actin has no background value in the run"):
        normalization.site_intensities(
            open_dataset(folder / "many"), InputConfig(normalize="log"), stored
        )


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalize_returns_count_input_channels(folder, name):
    dataset, input = open_dataset(folder / "few"), InputConfig(normalize=name)
    shift, scale = map(jnp.asarray, normalization.site_intensities(dataset, input))
    image, _ = dataset.read(range(FEW))
    normalized = normalization.normalize(jnp.asarray(image, jnp.float32), shift, scale, name)
    assert normalized.shape == (FEW, 32, 32, normalization.count_input_channels(dataset, input))
    assert np.isfinite(normalized).all()

"""A run's statistics are its own: what it answers to a site does not depend on the sites beside it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset

from perturbjax.core.choices import NORMALIZATIONS
from perturbjax.core.config import AugmentConfig, InputConfig, OptimConfig, Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.data import normalization
from perturbjax.dataset import open_dataset
from perturbjax.evaluation.apply import ApplyConfig, PredictConfig, predict
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.training.checkpoint import CheckpointConfig, Checkpoints
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.run_directory import open_run

SITES, FEW, CHANNELS = 48, 9, ["DNA", "Actin"]
BATCH = 3  # the same batches among many sites as among few


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`many` sites of two whole plates; `few`, the first nine of them, alone."""
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


def answers(run, data, out) -> np.ndarray:
    """Probabilities of the first sites."""
    table = pd.read_parquet(
        predict(PredictConfig(ApplyConfig(CheckpointConfig(run), batch_size=BATCH), (data,), out))
    )
    return table[[name for name in table if name.startswith("prob_")]].to_numpy()[:FEW]


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("dtype", "site")), "log"]
)
def test_nine_sites_alone_are_answered_as_among_all(trained, folder, tmp_path, capsys, name):
    run = trained(name)
    among, alone = (
        answers(run, folder / data, tmp_path / f"{data}.parquet") for data in ("many", "few")
    )
    np.testing.assert_array_equal(alone, among)
    assert "warning:" not in said(capsys)


def test_a_background_of_the_nine_themselves_is_another(folder):
    """So that the test above can fail."""
    few, many = (
        normalization.fit_statistics(open_dataset(folder / name), InputConfig(normalize="log"))
        for name in ("few", "many")
    )
    assert any(
        abs(few["background"][name] / many["background"][name] - 1) > 1e-3 for name in CHANNELS
    )


def test_features_of_a_run_use_its_statistics_too(trained, folder, tmp_path):
    def values(name: str) -> np.ndarray:
        config = FeaturesConfig(
            (folder / name,), tmp_path / f"{name}.parquet", run=trained("log"), batch_size=BATCH
        )
        table = pd.read_parquet(extract(config))
        return table[[column for column in table if not column.startswith("Metadata_")]].to_numpy()[
            :FEW
        ]

    np.testing.assert_array_equal(values("few"), values("many"))


def test_statistics_stand_in_the_run_and_in_its_checkpoints(trained, folder):
    run = trained("log")
    index = open_dataset(folder / "many").index
    background = {name: max(float(np.median(index[f"p01_{name}"])), 1.0) for name in CHANNELS}
    assert open_run(run).facts["normalization"] == {"background": background}
    checkpoints = Checkpoints(run)
    _, facts = checkpoints.load()
    checkpoints.close()
    assert facts["facts"]["normalization"] == {"background": background}


@pytest.mark.parametrize("name", [pytest.param("log_plate", marks=pytest.mark.slow), "plate"])
def test_a_plate_that_is_not_whole_is_named_in_one_line(trained, folder, tmp_path, capsys, name):
    run = trained(name)
    capsys.readouterr()
    answers(run, folder / "many", tmp_path / "many.parquet")
    assert "warning:" not in said(capsys)
    answers(run, folder / "few", tmp_path / "few.parquet")
    heard = said(capsys)
    assert (
        f"warning: plate P0 has 9 sites, compared with 24 sites in training. --normalize {name} uses"
        in heard
    )
    assert heard.count("warning:") == 1


def test_a_new_plate_is_whole_from_half_of_what_plates_had(folder, capsys):
    few, input = open_dataset(folder / "few"), InputConfig(normalize="plate")
    for plates, expected in (
        ({"A": 16, "B": 18}, False),
        ({"A": 40, "B": 44}, True),
        ({"P0": 9, "B": 99}, False),
    ):
        normalization.choose_statistics(
            few, input, {"plates": plates}, "run", is_training_data=False
        )
        assert ("plate P0 has 9 sites" in said(capsys)) == expected


def test_a_network_that_kept_nothing_says_where_it_takes_its_statistics(folder, capsys):
    few, input = open_dataset(folder / "few"), InputConfig(normalize="log")
    assert normalization.choose_statistics(
        few, input, None, "run", is_training_data=True
    ) == normalization.fit_statistics(few, input)
    assert "warning:" not in said(capsys)  # the dataset that it was trained on is as good
    normalization.choose_statistics(few, input, None, "run", is_training_data=False)
    assert "has no stored statistics for --normalize log. They are computed from" in said(capsys)


def test_a_channel_without_statistics_is_named(folder):
    kept = {"background": {"DNA": 100.0}}
    with pytest.raises(InputError, match="channel Actin has no background value in the run"):
        normalization.site_intensities(
            open_dataset(folder / "many"), InputConfig(normalize="log"), kept
        )


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_every_way_gives_as_many_channels_as_it_says(folder, name):
    dataset, input = open_dataset(folder / "few"), InputConfig(normalize=name)
    shift, scale = map(jnp.asarray, normalization.site_intensities(dataset, input))
    image, _ = dataset.read(range(FEW))
    seen = normalization.normalize(jnp.asarray(image, jnp.float32), shift, scale, name)
    assert seen.shape == (FEW, 32, 32, normalization.count_input_channels(dataset, input))
    assert np.isfinite(seen).all()

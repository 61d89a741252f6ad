"""A run on published weights: two phases in one run directory, however often it is interrupted."""

import shutil

import numpy as np
import pytest
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
from perturbjax.evaluation.apply import ApplyConfig, PredictConfig, predict
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.training import fit as training
from perturbjax.training.checkpoint import CheckpointConfig, Checkpoints
from perturbjax.training.devices import ComputeConfig
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.run_directory import read_metrics

EPOCHS, FROZEN = 4, 2
ONE = ComputeConfig(devices="1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    write_dataset(folder / "data", sites=30, size=32, channels=["DNA"])
    write_resnet18(folder / "resnet18.safetensors")
    return folder


def config(folder, name: str, **changes) -> TrainConfig:
    recipe = Recipe(
        model=ModelConfig(model="resnet18"),
        input=InputConfig(normalize="site"),
        augment=AugmentConfig(crop=32),
        optim=OptimConfig(epochs=EPOCHS, batch_size=8, learning_rate=1e-3),
        split=SplitConfig(split="well", folds=3),
        transfer=TransferConfig(
            weights=str(folder / "resnet18.safetensors"), freeze_epochs=FROZEN, **changes
        ),
    )
    return TrainConfig(
        out=folder / name,
        data=(folder / "data",),
        recipe=recipe,
        checkpoint_every=1,
        keep_latest=EPOCHS,
        compute=ONE,
    )


def arrays(run, epoch: int | None = None) -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(run)
    tree, _ = checkpoints.load("latest", epoch)
    checkpoints.close()
    return tree


@pytest.fixture(scope="module")
def run(folder):
    return fit(config(folder, "run")).path


def test_frozen_epochs_leave_every_bit_of_the_backbone_and_later_ones_only_its_statistics(run):
    epochs = [arrays(run, epoch) for epoch in range(1, EPOCHS + 1)]
    backbone = [n for n in epochs[0] if n.startswith(("params/backbone", "stats/backbone"))]
    assert len(backbone) > 80
    for name in backbone:
        frozen, thawed = (
            (value[name].tobytes() for value in epochs[:FROZEN]),
            epochs[-1][name].tobytes(),
        )
        assert len(set(frozen)) == 1, name
        assert (thawed == epochs[0][name].tobytes()) == name.startswith("stats"), name
    heads = {
        tree[next(n for n in tree if n.startswith("params/head/kernel"))].tobytes()
        for tree in epochs
    }
    assert len(heads) == EPOCHS


@pytest.mark.slow
def test_the_backbone_may_take_the_statistics_of_its_batches_once_it_moves(folder):
    run = fit(config(folder, "batch", backbone_norm="batch")).path
    frozen, thawed = arrays(run, FROZEN), arrays(run, EPOCHS)
    statistics = [name for name in frozen if name.startswith("stats/backbone")]
    assert len(statistics) > 30
    assert all(frozen[name].tobytes() != thawed[name].tobytes() for name in statistics)


def test_each_phase_has_its_own_one_cycle(run):
    rates = [row["learning_rate"] for row in read_metrics(run) if row["split"] == "train"]
    assert rates[0] > rates[1] and rates[2] > rates[1] and rates[2] > rates[3]


@pytest.mark.parametrize("killed_after", [pytest.param(1, marks=pytest.mark.slow), FROZEN])
def test_a_run_interrupted_within_a_phase_or_between_the_two_ends_the_same(
    folder, run, killed_after, monkeypatch
):
    again = config(folder, f"killed{killed_after}")

    def interrupted(items, **_):
        for number, item in enumerate(items):
            if number == killed_after:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "track", interrupted)
        fit(again)
    fit(again)
    whole, resumed = arrays(run), arrays(again.out)
    assert whole.keys() == resumed.keys()
    assert all(value.tobytes() == resumed[name].tobytes() for name, value in whole.items())


def test_a_run_is_applied_without_the_file_it_started_from(folder, run):
    moved = folder / "moved.safetensors"
    shutil.move(folder / "resnet18.safetensors", moved)
    try:
        out = predict(
            PredictConfig(
                ApplyConfig(CheckpointConfig(run), compute=ONE),
                (folder / "data",),
                folder / "predictions.parquet",
            )
        )
        features = extract(
            FeaturesConfig(data=(folder / "data",), out=folder / "features.parquet", run=run)
        )
    finally:
        shutil.move(moved, folder / "resnet18.safetensors")
    assert out.is_file() and features.is_file()


def test_other_weights_are_refused_by_a_run_that_was_begun(folder, run):
    other = write_resnet18(folder / "other.safetensors")
    other.write_bytes(other.read_bytes()[:-4] + b"\0\0\0\0")
    shutil.copy(folder / "resnet18.safetensors", folder / "kept.safetensors")
    shutil.copy(other, folder / "resnet18.safetensors")
    try:
        with pytest.raises(InputError, match="already holds another run"):
            fit(config(folder, "run"))
    finally:
        shutil.copy(folder / "kept.safetensors", folder / "resnet18.safetensors")

"""Tests of training on pretrained weights: two phases in one run directory, also after
interruptions.
"""

import shutil

import numpy as np
import pytest
from published import write_resnet18
from tiny_dataset import write_dataset

from perturbjax.cli.evaluate import ApplyConfig, PredictConfig, predict
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
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.training import fit as training
from perturbjax.training.checkpoint import CheckpointConfig, Checkpoints
from perturbjax.training.devices import ComputeConfig
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.run_directory import read_metrics

pytestmark = pytest.mark.full

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
    with Checkpoints(run) as checkpoints:
        return checkpoints.load("latest", epoch)[0]


@pytest.fixture(scope="module")
def run(folder):
    return fit(config(folder, "run")).path


def test_first_phase_freezes_backbone_and_second_phase_keeps_its_statistics(run):
    epochs = [arrays(run, epoch) for epoch in range(1, EPOCHS + 1)]
    backbone = [n for n in epochs[0] if n.startswith(("params/backbone", "stats/backbone"))]
    assert len(backbone) > 80
    for name in backbone:
        frozen = {tree[name].tobytes() for tree in epochs[:FROZEN]}
        assert len(frozen) == 1, name
        unchanged = epochs[-1][name].tobytes() in frozen
        assert unchanged == name.startswith("stats"), name
    kernel = next(n for n in epochs[0] if n.startswith("params/head/kernel"))
    assert len({tree[kernel].tobytes() for tree in epochs}) == EPOCHS


@pytest.mark.slow
def test_backbone_norm_batch_trains_backbone_statistics_in_second_phase(folder):
    run = fit(config(folder, "batch", backbone_norm="batch")).path
    first, second = arrays(run, FROZEN), arrays(run, EPOCHS)
    statistics = [name for name in first if name.startswith("stats/backbone")]
    assert len(statistics) > 30
    assert all(first[name].tobytes() != second[name].tobytes() for name in statistics)


def test_each_phase_has_its_own_one_cycle_schedule(run):
    rates = [row["learning_rate"] for row in read_metrics(run) if row["split"] == "train"]
    assert rates[0] > rates[1] and rates[2] > rates[1] and rates[2] > rates[3]


@pytest.mark.parametrize("stop_epoch", [pytest.param(1, marks=pytest.mark.slow), FROZEN])
def test_resume_within_and_between_phases_is_bit_identical(folder, run, stop_epoch, monkeypatch):
    again = config(folder, f"stopped{stop_epoch}")

    def track_until_stop(epochs, **_):
        for epoch in epochs:
            if epoch == stop_epoch:
                raise KeyboardInterrupt
            yield epoch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "track", track_until_stop)
        fit(again)
    fit(again)
    expected, resumed = arrays(run), arrays(again.out)
    assert expected.keys() == resumed.keys()
    assert all(value.tobytes() == resumed[name].tobytes() for name, value in expected.items())


def test_trained_run_does_not_need_the_pretrained_weight_file(folder, run):
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


def test_resume_with_other_pretrained_weights_is_refused(folder, run):
    other = write_resnet18(folder / "other.safetensors")
    other.write_bytes(other.read_bytes()[:-4] + b"\0\0\0\0")
    shutil.copy(folder / "resnet18.safetensors", folder / "original.safetensors")
    shutil.copy(other, folder / "resnet18.safetensors")
    try:
        with pytest.raises(InputError, match="already contains another run"):
            fit(config(folder, "run"))
    finally:
        shutil.copy(folder / "original.safetensors", folder / "resnet18.safetensors")

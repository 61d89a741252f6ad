"""Tests of additional metric loggers, with recorded calls instead of their packages."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager

import pytest
from tiny_dataset import write_dataset

from perturbjax.core.config import AugmentConfig, OptimConfig, Recipe
from perturbjax.core.errors import InputError
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.metric_logs import PACKAGES, open_log
from perturbjax.training.run_directory import read_metrics

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    write_dataset(folder / "data", sites=24, size=24, channels=["DNA"])
    recipe = Recipe(augment=AugmentConfig(crop=16), optim=OptimConfig(epochs=1, batch_size=8))
    return fit(TrainConfig(out=folder / "run", data=(folder / "data",), recipe=recipe))


class CallRecorder:
    """Replaces a package and its objects; records every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            return self._block()

        return call

    @contextmanager
    def _block(self):
        yield self


@pytest.mark.parametrize(
    ("logger", "expected"),
    [
        (
            "tensorboard",
            [
                ("add_scalar", "train/loss"),
                ("add_scalar", "train/accuracy"),
                ("add_scalar", "test/loss"),
            ],
        ),
        (
            "wandb",
            [
                (
                    "log",
                    {"train/loss", "train/accuracy", "test/loss", "test/accuracy", "learning_rate"},
                )
            ],
        ),
        (
            "mlflow",
            [
                (
                    "log_metrics",
                    {"train/loss", "train/accuracy", "test/loss", "test/accuracy", "learning_rate"},
                )
            ],
        ),
    ],
)
def test_loggers_receive_metrics_of_each_epoch(monkeypatch, run, logger, expected):
    recorder = CallRecorder()
    monkeypatch.setitem(sys.modules, PACKAGES[logger][0], recorder)
    with open_log(logger, run) as log:
        log(read_metrics(run.path))
    calls = [
        (name, args[0] if isinstance(args[0], str) else set(args[0]))
        for name, args, _ in recorder.calls
        if args
    ]
    assert [call for call in expected if call not in calls] == []
    opened = [options for name, _, options in recorder.calls if name in ("init", "start_run")]
    assert all(run.path.name in options.values() for options in opened)


def test_training_logs_to_tensorboard(monkeypatch, run, tmp_path):
    recorder = CallRecorder()
    module = types.ModuleType("tensorboardX")
    module.SummaryWriter, module.__spec__ = recorder.SummaryWriter, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    fit(TrainConfig(out=tmp_path / "run", data=run.data, recipe=run.recipe, log_to="tensorboard"))
    scalars = {args[0]: args[2] for name, args, _ in recorder.calls if name == "add_scalar"}
    assert scalars["train/loss"] == 1 and len(read_metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("logger", PACKAGES)
def test_missing_logger_package_is_named(monkeypatch, tmp_path, logger):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=f"--log-to {logger}: must be installed: pip install {PACKAGES[logger][1]}"
    ):
        fit(TrainConfig(out=tmp_path / "run", log_to=logger))
    assert not list(tmp_path.iterdir())

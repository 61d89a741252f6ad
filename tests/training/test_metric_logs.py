"""A training tells its epochs to others under the names they look for, and needs none of their packages."""

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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    write_dataset(folder / "data", sites=24, size=24, channels=["DNA"])
    recipe = Recipe(augment=AugmentConfig(crop=16), optim=OptimConfig(epochs=1, batch_size=8))
    return fit(TrainConfig(out=folder / "run", data=(folder / "data",), recipe=recipe))


class Told:
    """Stands for a package and what it makes: notes every call."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*words, **named):
            self.calls.append((name, words, named))
            return self._block()

        return call

    @contextmanager
    def _block(self):
        yield self


@pytest.mark.parametrize(
    ("to", "expected"),
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
def test_every_epoch_is_told_under_its_names(monkeypatch, run, to, expected):
    told = Told()
    monkeypatch.setitem(sys.modules, PACKAGES[to][0], told)
    with open_log(to, run) as log:
        log(read_metrics(run.path))
    calls = [
        (name, words[0] if isinstance(words[0], str) else set(words[0]))
        for name, words, _ in told.calls
        if words
    ]
    assert [call for call in expected if call not in calls] == []
    opened = [named for name, _, named in told.calls if name in ("init", "start_run")]
    assert all(run.path.name in named.values() for named in opened)


def test_training_tells_as_it_goes(monkeypatch, run, tmp_path):
    told = Told()
    module = types.ModuleType("tensorboardX")
    module.SummaryWriter, module.__spec__ = told.SummaryWriter, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    fit(TrainConfig(out=tmp_path / "run", data=run.data, recipe=run.recipe, log_to="tensorboard"))
    scalars = {words[0]: words[2] for name, words, _ in told.calls if name == "add_scalar"}
    assert scalars["train/loss"] == 1 and len(read_metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize("to", PACKAGES)
def test_a_package_that_is_not_there_is_named(monkeypatch, tmp_path, to):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=f"--log-to {to}: must be installed: pip install {PACKAGES[to][1]}"
    ):
        fit(TrainConfig(out=tmp_path / "run", log_to=to))
    assert not list(tmp_path.iterdir())

"""A run knows how far it is: what it goes on from, and what is left when it must stop."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.console import InputError, Terminated
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.fit import _require_finite
from perturbjax.training.progress import leave, resume
from perturbjax.training.run import locked
from perturbjax.training.step import Sums, TrainState

STEPS, FACTS = 5, {"split_fingerprint": "x"}


def state(step: int) -> TrainState:
    return TrainState({"w": jnp.full(3, step / 7)}, {"m": jnp.zeros(2)}, {"v": jnp.ones(3)}, jnp.int32(step))


def sums(*steps: float) -> list[Sums]:
    return [Sums(*(np.float32(step / 3 + row) for row in range(4))) for step in steps]


@pytest.fixture
def run(tmp_path):
    dropped = []
    return SimpleNamespace(path=tmp_path, facts=FACTS, dropped=dropped, truncate_metrics=dropped.append)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path)
    yield opened
    opened.close()


def test_a_run_left_within_an_epoch_goes_on_there_with_the_sums_of_its_steps(run, checkpoints):
    checkpoints.save(state(10), epoch=2, facts=FACTS, accuracy=None)
    ends = leave(checkpoints, state(13), epoch=2, parts=sums(11, 12, 13), seconds=1.5, facts=FACTS)
    assert isinstance(ends, Terminated) and "after step 3 of epoch 3" in str(ends)
    begun = resume(run, checkpoints, state(0), STEPS)
    assert (begun.epoch, begun.taken, begun.seconds) == (2, 3, 1.5) and run.dropped == [2]
    assert int(begun.state.step) == 13
    (part,) = begun.parts()
    for row, of_steps in enumerate(part):
        assert np.array_equal(of_steps, [taken[row] for taken in sums(11, 12, 13)])


def test_the_next_epoch_that_is_saved_takes_its_place(run, checkpoints):
    leave(checkpoints, state(13), epoch=2, parts=sums(13), seconds=0.0, facts=FACTS)
    checkpoints.save(state(15), epoch=3, facts=FACTS, accuracy=0.5)
    begun = resume(run, checkpoints, state(0), STEPS)
    assert (begun.epoch, begun.taken) == (3, 0) and begun.parts() == []
    assert not (run.path / "checkpoints" / "interrupted").exists()


def test_a_run_without_checkpoints_begins_afresh(run, checkpoints):
    begun = resume(run, checkpoints, state(0), STEPS)
    assert (begun.epoch, begun.taken) == (0, 0) and run.dropped == [0]


def test_a_loss_that_is_not_finite_names_the_checkpoint_that_stays(run, checkpoints):
    losses = np.array([1, np.nan, 1])
    with pytest.raises(InputError, match=r"step 14 \(epoch 5\); no checkpoint was saved"):
        _require_finite(losses, 4, checkpoints, run)
    checkpoints.save(state(9), epoch=3, facts=FACTS, accuracy=None)
    with pytest.raises(InputError, match="the checkpoint of epoch 3 stays"):
        _require_finite(losses, 4, checkpoints, run)
    _require_finite(losses[:1], 4, checkpoints, run)


def test_a_directory_is_kept_by_one_at_a_time(tmp_path):
    kept = locked(tmp_path / "run")
    with kept, pytest.raises(InputError, match="another process is training there"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"), locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()

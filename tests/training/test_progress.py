"""A run knows how far it is: what it goes on from, and what is left when it must stop."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError, Terminated
from perturbjax.training import run_directory as run_module
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.fit import _require_finite
from perturbjax.training.progress import leave, resume
from perturbjax.training.run_directory import Run, locked, read_metrics
from perturbjax.training.step import Sums, TrainState

STEPS = 5


def state(step: int) -> TrainState:
    return TrainState(
        {"w": jnp.full(3, step / 7)}, {"m": jnp.zeros(2)}, {"v": jnp.ones(3)}, jnp.int32(step)
    )


def sums(*steps: float) -> list[Sums]:
    return [Sums(*(np.float32(step / 3 + row) for row in range(4))) for step in steps]


@pytest.fixture
def run(tmp_path):
    """A run of three epochs in its metrics."""
    run = Run(tmp_path, Recipe(), (), ["DMSO", "taxol"], {"split_fingerprint": None})
    run.append_metrics(
        [dict.fromkeys(("step", "split", "loss", "accuracy")) | {"epoch": n} for n in (1, 2, 3)]
    )
    return run


def epochs_kept(run: Run) -> list[int]:
    return [row["epoch"] for row in read_metrics(run.path)]


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path)
    yield opened
    opened.close()


def test_a_run_left_within_an_epoch_goes_on_there_with_the_sums_of_its_steps(run, checkpoints):
    checkpoints.save(state(10), epoch=2, facts=run.identity, accuracy=None)
    ends = leave(
        checkpoints, state(13), epoch=2, parts=sums(11, 12, 13), seconds=1.5, facts=run.identity
    )
    assert isinstance(ends, Terminated) and "after step 3 of epoch 3" in str(ends)
    begun = resume(run, checkpoints, state(0), STEPS)
    assert (begun.epoch, begun.taken, begun.seconds) == (2, 3, 1.5) and epochs_kept(run) == [1, 2]
    assert int(begun.state.step) == 13
    (part,) = begun.parts()
    for row, of_steps in enumerate(part):
        assert np.array_equal(of_steps, [taken[row] for taken in sums(11, 12, 13)])


def test_the_next_epoch_that_is_saved_takes_its_place(run, checkpoints):
    leave(checkpoints, state(13), epoch=2, parts=sums(13), seconds=0.0, facts=run.identity)
    checkpoints.save(state(15), epoch=3, facts=run.identity, accuracy=0.5)
    begun = resume(run, checkpoints, state(0), STEPS)
    assert (begun.epoch, begun.taken) == (3, 0) and begun.parts() == []
    assert not (run.path / "checkpoints" / "interrupted").exists()


def test_a_run_without_checkpoints_begins_afresh(run, checkpoints):
    begun = resume(run, checkpoints, state(0), STEPS)
    assert (begun.epoch, begun.taken) == (0, 0) and epochs_kept(run) == []


def test_a_loss_that_is_not_finite_names_the_checkpoint_that_stays(run, checkpoints):
    losses = np.array([1, np.nan, 1])
    with pytest.raises(InputError, match=r"step 14 \(epoch 5\); no checkpoint was saved"):
        _require_finite(losses, 4, checkpoints, run)
    checkpoints.save(state(9), epoch=3, facts=run.identity, accuracy=None)
    with pytest.raises(InputError, match="the checkpoint of epoch 3 stays"):
        _require_finite(losses, 4, checkpoints, run)
    _require_finite(losses[:1], 4, checkpoints, run)


def test_a_directory_is_kept_by_one_at_a_time(tmp_path):
    kept = locked(tmp_path / "run")
    with (
        kept,
        pytest.raises(InputError, match="another process is training there"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"), locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "damage", [b"\xff\x00\x80", b'{"epoch": 2', b"[" * 100_000, b'{"epoch": "x"}', b"null"]
)
def test_what_follows_a_damaged_line_of_metrics_is_left_out(tmp_path, damage):
    row = {"epoch": 1, "step": 4, "split": "train", "loss": 2.0, "accuracy": 0.5}
    whole = json.dumps(row).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([whole, damage, whole]))
    assert read_metrics(tmp_path) == [row]


def test_a_run_names_the_commit_of_a_clone_and_nothing_where_there_is_none(tmp_path, monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", run_module._commit().get("commit", "0000000"))
    monkeypatch.setattr(
        run_module, "__file__", str(tmp_path / "perturbjax" / "training" / "run.py")
    )
    assert run_module._commit() == {}, "no clone"
    (tmp_path / ".git").mkdir()
    assert run_module._commit() == {}, "a clone that git cannot read"

"""Tests of resuming, of saving an interrupted training, and of the lock of a run directory."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError, Terminated
from perturbjax.training.checkpoint import BEST_METRIC, FORMER_BEST_METRIC, Checkpoints, _best_score
from perturbjax.training.fit import require_finite_loss
from perturbjax.training.progress import first_progress, resume, save_interrupted
from perturbjax.training.run_directory import Run, git_commit, read_metrics
from perturbjax.training.run_lock import lock_run
from perturbjax.training.step import Sums, TrainState

STEPS = 5


def make_state(step: int) -> TrainState:
    return TrainState(
        {"w": jnp.full(3, step / 7)}, {"m": jnp.zeros(2)}, {"v": jnp.ones(3)}, jnp.int32(step)
    )


def make_sums(*steps: float) -> list[Sums]:
    return [Sums(*(np.float32(step / 3 + row) for row in range(4))) for step in steps]


FRESH = first_progress(make_state(0), STEPS)


@pytest.fixture
def run(tmp_path):
    """A run with the metrics of three epochs."""
    run = Run(tmp_path, Recipe(), (), ["DMSO", "taxol"], {"split_fingerprint": None})
    run.append_metrics(
        [
            {"epoch": epoch, "step": epoch, "split": "train", "loss": 1.0, "accuracy": 0.5}
            for epoch in (1, 2, 3)
        ]
    )
    return run


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        yield checkpoints


def metric_epochs(run: Run) -> list[int]:
    return [row["epoch"] for row in read_metrics(run.path)]


def interrupt(checkpoints: Checkpoints, run: Run, *steps: int) -> Terminated:
    return save_interrupted(
        checkpoints,
        make_state(steps[-1]),
        epoch=2,
        partial_sums=make_sums(*steps),
        seconds=1.5,
        facts=run.identity,
    )


def test_resume_restores_sums_of_incomplete_epoch(run, checkpoints):
    checkpoints.save(make_state(10), epoch=2, facts=run.identity)
    error = interrupt(checkpoints, run, 11, 12, 13)
    assert isinstance(error, Terminated) and "after step 3 of epoch 3" in str(error)
    progress = resume(run, checkpoints, FRESH)
    assert (progress.epoch, progress.taken, progress.seconds) == (2, 3, 1.5)
    assert metric_epochs(run) == [1, 2]
    assert progress.step == int(progress.state.step) == 13
    (part,) = progress.partial_sums()
    for row, values in enumerate(part):
        assert np.array_equal(values, [sums[row] for sums in make_sums(11, 12, 13)])


def test_complete_epoch_replaces_interrupted_checkpoint(run, checkpoints):
    interrupt(checkpoints, run, 13)
    checkpoints.save(make_state(15), epoch=3, facts=run.identity)
    progress = resume(run, checkpoints, FRESH)
    assert (progress.epoch, progress.taken) == (3, 0) and progress.partial_sums() == []
    assert not (run.path / "checkpoints" / "interrupted").exists()


def test_resume_without_checkpoint_starts_from_scratch(run, checkpoints):
    progress = resume(run, checkpoints, FRESH)
    assert (progress.epoch, progress.taken) == (0, 0) and metric_epochs(run) == []


def test_best_checkpoint_has_highest_validation_score(run, checkpoints):
    with pytest.raises(InputError, match=r"--checkpoint best: .*--validation-fraction"):
        checkpoints.load("best")
    for epoch, score in ((1, 0.5), (2, 0.8), (3, 0.7)):
        checkpoints.save(make_state(epoch), epoch=epoch, facts=run.identity, score=score)
    assert checkpoints.load("best")[1]["epoch"] == 2
    assert checkpoints.load("latest")[1]["epoch"] == 3
    # Earlier releases stored the accuracy on test sites.
    assert _best_score({FORMER_BEST_METRIC: 0.4}) == 0.4
    assert _best_score({BEST_METRIC: 0.3}) == 0.3


def test_nonfinite_loss_error_names_remaining_checkpoint(run, checkpoints):
    losses = np.array([1, np.nan, 1])
    with pytest.raises(InputError, match=r"step 14 \(epoch 5\); no checkpoint was saved"):
        require_finite_loss(losses, 4, checkpoints, run)
    checkpoints.save(make_state(9), epoch=3, facts=run.identity)
    with pytest.raises(InputError, match="the checkpoint of epoch 3 remains"):
        require_finite_loss(losses, 4, checkpoints, run)
    require_finite_loss(losses[:1], 4, checkpoints, run)


def test_lock_admits_one_process_and_leaves_foreign_folders_alone(tmp_path):
    with (
        lock_run(tmp_path / "run"),
        pytest.raises(InputError, match="another process is training in this directory"),
        lock_run(tmp_path / "run"),
    ):
        pass
    with lock_run(tmp_path / "run"):
        pass
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="contains no run"), lock_run(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "damage", [b"\xff\x00\x80", b'{"epoch": 2', b"[" * 100_000, b'{"epoch": "x"}', b"null"]
)
def test_read_metrics_stops_at_damaged_line(tmp_path, damage):
    row = {"epoch": 1, "step": 4, "split": "train", "loss": 2.0, "accuracy": 0.5}
    line = json.dumps(row).encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([line, damage, line]))
    assert read_metrics(tmp_path) == [row]


def test_git_commit_is_empty_outside_a_readable_clone(tmp_path):
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", git_commit().get("commit", "0000000"))
    assert git_commit(tmp_path) == {}
    (tmp_path / ".git").mkdir()
    assert git_commit(tmp_path) == {}

"""Tests of SIGTERM, which schedulers send before they kill a process: save, end, and resume
bit-identically.
"""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from commands import assert_same_parameters, command_line
from test_killed import epochs_of, last_epoch

from perturbjax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.full

EPOCHS = 16
#: One site in a step gives 32 steps in an epoch, so that a signal arrives within an epoch.
FLAGS = (
    "--preset",
    "paper",
    "--crop",
    "16",
    "--batch-size",
    "1",
    "--epochs",
    str(EPOCHS),
    "--split",
    "well",
    "--folds",
    "3",
)
RARELY = ("--checkpoint-every", "8", "--evaluate-every", "100")


@pytest.fixture
def terminated(environment, tmp_path_factory):
    """Return a function: start a command, send SIGTERM when `ready(stderr)` is true, return status
    and stderr.
    """
    log = tmp_path_factory.mktemp("log") / "stderr"

    def run(name: str, *flags: object, ready) -> tuple[int, str]:
        line = [*command_line(name), *map(str, flags)]
        with open(log, "w") as file:
            process = subprocess.Popen(line, env=environment, stderr=file)
        try:
            while not ready(log.read_text()) and process.poll() is None:
                time.sleep(0.005)
            assert process.poll() is None, "the command ended before the signal"
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)
        finally:
            process.kill()
        return process.returncode, log.read_text()

    return run


# Epochs after which signals are sent: after the first checkpoint, or before and after it.
@pytest.mark.parametrize(
    ("feed", "signals"),
    [("resident", (9,)), pytest.param("streamed", (1, 9), marks=pytest.mark.slow)],
)
def test_terminated_training_resumes_bit_identically(
    command, terminated, dataset, tmp_path, feed, signals
):
    expected, resumed = tmp_path / "expected", tmp_path / "resumed"
    flags = ("--data", dataset, *FLAGS, *RARELY, "--feed", feed)
    command("train", *flags, "--out", expected)
    within = 0
    for epoch in signals:
        status, stderr = terminated(
            "train",
            *flags,
            "--out",
            resumed,
            ready=lambda _, epoch=epoch: last_epoch(resumed) >= epoch,
        )
        assert status == 143, stderr
        (line,) = [line for line in stderr.splitlines() if line.startswith("terminated: ")]
        assert "saved after step" in line and "Traceback" not in stderr
        checkpoints = Checkpoints(resumed)
        _, facts = checkpoints.load_newest()
        checkpoints.close()
        assert facts["epoch"] >= epoch and f"of epoch {facts['epoch'] + 1};" in line
        within += 0 < len(facts["sums"][0]) < 32
    assert within, "no signal arrived within an epoch"
    done = command("train", *flags, "--out", resumed)
    assert "resuming after" in done.stderr
    assert_same_parameters(expected, resumed)
    assert epochs_of(resumed) == epochs_of(expected)
    assert not (resumed / "checkpoints" / "interrupted").exists()


def test_terminated_predict_leaves_no_partial_output(terminated, run, dataset, tmp_path):
    out = tmp_path / "predictions.parquet"
    status, stderr = terminated(
        *("predict", "--run", run, "--data", dataset, "--out", out),
        ready=lambda text: "checkpoint of epoch" in text,
    )
    assert status == 143, stderr
    assert stderr.splitlines()[-1].startswith("terminated: ") and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_second_training_in_same_directory_is_refused(command, environment, dataset, tmp_path):
    out = tmp_path / "run"
    flags = ("--data", dataset, *FLAGS, *RARELY, "--out", out)
    line = [*command_line("train"), *map(str, flags)]
    first = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    try:
        while last_epoch(out) < 1 and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # the first process must not end while the second starts
        assert first.poll() is None, "the first training ended too early"
        refused = command("train", *flags, status=2)
    finally:
        first.kill()
        first.wait()
    assert (
        "another process is training in this directory" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    command("train", *flags)  # the lock ends with its process
    assert [epoch for epoch, *_ in epochs_of(out)] == [*range(1, EPOCHS + 1), EPOCHS]


def test_unwritable_compile_cache_is_a_warning(environment, run, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ("--run", run, "--data", dataset, "--out", tmp_path / "p.parquet")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file" / "cache")}
    line = [*command_line("predict"), *map(str, flags)]
    done = subprocess.run(line, env={**environment, **cache}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "JAX_COMPILATION_CACHE_DIR" in line]
    assert str(tmp_path / "file") in warning
    assert (tmp_path / "p.parquet").is_file()

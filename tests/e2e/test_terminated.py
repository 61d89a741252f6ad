"""SIGTERM, which schedulers send before they kill: the run is saved at once, and goes on to the same bits."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from commands import assert_same_parameters, command_line
from test_killed import epochs_of, last_epoch

from perturbjax.training.checkpoint import Checkpoints

EPOCHS = 16
#: One site a step: 32 steps an epoch, so that a signal comes within one.
FLAGS = (
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
    """Start a command, send SIGTERM when it is `ready(what it said)`, and give its status and all it said."""
    log = tmp_path_factory.mktemp("said") / "stderr"

    def run(verb: str, *flags: object, ready) -> tuple[int, str]:
        line = [*command_line(verb), *map(str, flags)]
        with open(log, "w") as file:
            process = subprocess.Popen(line, env=environment, stderr=file)
        try:
            while not ready(log.read_text()) and process.poll() is None:
                time.sleep(0.005)
            assert process.poll() is None, "it ended before the signal, so nothing was shown"
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)
        finally:
            process.kill()
        return process.returncode, log.read_text()

    return run


# Before the first checkpoint and after it.
@pytest.mark.parametrize(
    ("feed", "signals"),
    [("resident", (9,)), pytest.param("streamed", (1, 9), marks=pytest.mark.slow)],
)
def test_training_saves_within_the_epoch_and_goes_on_to_the_same_bits(
    command, terminated, dataset, tmp_path, feed, signals
):
    whole, again = tmp_path / "whole", tmp_path / "again"
    flags = ("--data", dataset, *FLAGS, *RARELY, "--feed", feed)
    command("train", *flags, "--out", whole)
    within = 0
    for epoch in signals:
        status, said = terminated(
            "train", *flags, "--out", again, ready=lambda _, epoch=epoch: last_epoch(again) >= epoch
        )
        assert status == 143, said
        (line,) = [line for line in said.splitlines() if line.startswith("terminated: ")]
        assert "saved after step" in line and "Traceback" not in said
        checkpoints = Checkpoints(again)
        _, facts = checkpoints.load_newest()
        checkpoints.close()
        assert facts["epoch"] >= epoch and f"of epoch {facts['epoch'] + 1};" in line
        within += 0 < len(facts["sums"][0]) < 32
    assert within, "no signal came within an epoch, so nothing was shown"
    done = command("train", *flags, "--out", again)
    assert "resuming after" in done.stderr
    assert_same_parameters(whole, again)
    assert epochs_of(again) == epochs_of(whole)
    assert not (again / "checkpoints" / "interrupted").exists()


def test_other_commands_end_in_one_line_and_leave_nothing_half_written(
    terminated, run, dataset, tmp_path
):
    out = tmp_path / "predictions.parquet"
    status, said = terminated(
        *("predict", "--run", run, "--data", dataset, "--out", out),
        ready=lambda said: "checkpoint of epoch" in said,
    )
    assert status == 143, said
    assert said.splitlines()[-1].startswith("terminated: ") and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_is_trained_in_by_one_process_at_a_time(
    command, environment, dataset, tmp_path
):
    out = tmp_path / "run"
    flags = ("--data", dataset, *FLAGS, *RARELY, "--out", out)
    line = [*command_line("train"), *map(str, flags)]
    first = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    try:
        while last_epoch(out) < 1 and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # so that it cannot end while the second starts
        assert first.poll() is None, "it ended before the second began, so nothing was shown"
        refused = command("train", *flags, status=2)
    finally:
        first.kill()
        first.wait()
    assert (
        "another process is training in this directory" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    command("train", *flags)  # a lock dies with its process
    assert [epoch for epoch, *_ in epochs_of(out)] == [*range(1, EPOCHS + 1), EPOCHS]


def test_a_compile_cache_that_cannot_be_written_is_a_note_and_no_error(
    environment, run, dataset, tmp_path
):
    (tmp_path / "file").write_text("")
    flags = ("--run", run, "--data", dataset, "--out", tmp_path / "p.parquet")
    done = command("predict", *flags, "--compile-cache", tmp_path / "file" / "cache")
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "compiled programs are not cached" in note and str(tmp_path / "file") in note
    assert (tmp_path / "p.parquet").is_file()

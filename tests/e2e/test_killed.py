"""Test of a training that is killed at random moments and restarted."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
from commands import assert_same_parameters, command_line

pytestmark = pytest.mark.full

EPOCHS = 24
FLAGS = (
    "--preset",
    "paper",
    "--crop",
    "16",
    "--batch-size",
    "16",
    "--epochs",
    str(EPOCHS),
    "--split",
    "well",
    "--folds",
    "3",
)
OFTEN = ("--checkpoint-every", "1", "--evaluate-every", "5")
#: The process is killed up to WITHIN_S seconds after these epochs, while it computes, writes or
#: saves.
KILLED_AFTER, WITHIN_S = (0, 8), 0.3


def test_resume_after_kill_is_bit_identical(command, environment, dataset, tmp_path):
    expected, killed = tmp_path / "expected", tmp_path / "killed"
    command("train", "--data", dataset, "--out", expected, *FLAGS, *OFTEN)

    random_delay = random.Random(0)
    line = [*command_line("train"), "--data", str(dataset), "--out", str(killed), *FLAGS, *OFTEN]
    for epoch in KILLED_AFTER:
        process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
        while last_epoch(killed) < epoch and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random_delay.uniform(0, WITHIN_S))
        assert process.poll() is None, "the training ended before it was killed"
        process.kill()
        process.wait()
    done = command("train", "--data", dataset, "--out", killed, *FLAGS, *OFTEN)

    assert "resuming after" in done.stderr
    assert_same_parameters(expected, killed)
    assert epochs_of(killed) == epochs_of(expected)


def last_epoch(run: Path) -> int:
    """Return the last epoch with a complete line in the metrics; 0 before the first."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    return json.loads(lines[-1])["epoch"] if lines else 0


def epochs_of(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["epoch"], row["split"], row["loss"], row["accuracy"]) for row in rows]

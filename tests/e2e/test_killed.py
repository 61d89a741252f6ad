"""A run that is killed at any instant and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

from commands import assert_same_parameters, command_line

EPOCHS = 24
FLAGS = (
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
#: Kills come within this many seconds after the run has reached these epochs: while it computes, writes or saves.
KILLED_AFTER, WITHIN_S = (0, 8), 0.3


def test_training_killed_at_random_ends_with_bit_identical_parameters(
    command, environment, dataset, tmp_path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command("train", "--data", dataset, "--out", whole, *FLAGS, *OFTEN)

    random_delay = random.Random(0)
    line = [*command_line("train"), "--data", str(dataset), "--out", str(killed), *FLAGS, *OFTEN]
    for epoch in KILLED_AFTER:
        process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
        while last_epoch(killed) < epoch and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random_delay.uniform(0, WITHIN_S))
        assert process.poll() is None, "it ended before it was killed, so nothing was shown"
        process.kill()
        process.wait()
    done = command("train", "--data", dataset, "--out", killed, *FLAGS, *OFTEN)

    assert "resuming after" in done.stderr
    assert_same_parameters(whole, killed)
    assert epochs_of(killed) == epochs_of(whole)


def last_epoch(run: Path) -> int:
    """The last epoch that is wholly written in the run's metrics; 0 before the first."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    return json.loads(lines[-1])["epoch"] if lines else 0


def epochs_of(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["epoch"], row["split"], row["loss"], row["accuracy"]) for row in rows]

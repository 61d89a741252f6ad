"""A run that is killed at any instant and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import subprocess
import time

from commands import assert_same_parameters, command_line

FLAGS = ("--crop", "16", "--batch-size", "16", "--epochs", "40", "--split", "well", "--folds", "3")
OFTEN = ("--checkpoint-every", "1", "--evaluate-every", "5")
KILLS = 4


def test_training_killed_at_random_ends_with_bit_identical_parameters(command, environment, dataset, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    command("train", "--data", dataset, "--out", whole, *FLAGS, *OFTEN)
    took = time.monotonic() - started

    moments = random.Random(0)
    line = [*command_line("train"), "--data", str(dataset), "--out", str(killed), *FLAGS, *OFTEN]
    interrupted = 0
    for _ in range(KILLS):
        process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.4, 0.9) * took)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            interrupted += 1
    done = command("train", "--data", dataset, "--out", killed, *FLAGS, *OFTEN)

    assert interrupted, "no kill came before the end, so nothing was shown"
    assert "going on after epoch" in done.stderr
    assert_same_parameters(whole, killed)
    assert epochs_of(killed) == epochs_of(whole)


def epochs_of(run) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["epoch"], row["split"], row["loss"], row["accuracy"]) for row in rows]

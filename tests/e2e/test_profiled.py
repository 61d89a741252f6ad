"""Test of `perturbjax train --profile`."""

from __future__ import annotations

import pytest
from commands import SMALL, assert_same_parameters


@pytest.mark.slow
def test_profile_prints_times_and_does_not_change_training(command, run, dataset, tmp_path):
    out = tmp_path / "profiled"
    stderr = command("train", "--data", dataset, "--out", out, *SMALL, "--profile").stderr
    assert "ms per step" in stderr
    parts = next(line for line in stderr.splitlines() if "forward" in line and "backward" in line)
    assert "augment" in parts and "update" in parts
    assert len(list((out / "profile").rglob("perfetto_trace.json.gz"))) == 1
    assert_same_parameters(run, out)

"""`perturbjax train --profile` tells where time goes and leaves training as it is."""

from __future__ import annotations

import pytest
from commands import SMALL, assert_same_parameters


@pytest.mark.slow
def test_a_profiled_run_ends_with_the_same_parameters_and_says_where_time_went(
    command, run, dataset, tmp_path
):
    out = tmp_path / "profiled"
    said = command("train", "--data", dataset, "--out", out, *SMALL, "--profile").stderr
    assert "ms a step" in said
    shares = next(line for line in said.splitlines() if "forward" in line and "backward" in line)
    assert "augment" in shares and "update" in shares
    assert len(list((out / "profile").rglob("perfetto_trace.json.gz"))) == 1
    assert_same_parameters(run, out)

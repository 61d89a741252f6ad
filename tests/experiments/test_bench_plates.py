"""The benchmark of whole plates, on one that is small."""

from __future__ import annotations

import pytest

from experiments.bench.plates import Config, built, limits, measured, seconds_of


def test_a_build_is_measured_by_its_stages(tmp_path):
    options = Config(tmp_path, wells=4, sites=1, size=64, plates=(1,), workers=(1,))
    row = built(options, 1, 1)
    assert row["sites"] == 4 and row["processor s"] > 0 and row["disk MB"] > 0
    assert row["checking s"] + row["segmenting s"] + row["writing s"] <= row["build s"] + 0.3
    assert limits(options)["MB of pixels"] == pytest.approx(4 * 3 * 64 * 64 * 2 / 1e6, abs=0.06)


def test_seconds_are_read_however_long_they_are():
    assert seconds_of("writing: 3/3 sites in 1:02:03\n", "writing") == 3723
    assert seconds_of("x\nwriting: 3/3 sites in 2.5 s", "writing") == 2.5
    with pytest.raises(RuntimeError, match="checking is not in what was said"):
        seconds_of("writing: 3/3 sites in 2.5 s", "checking")


def test_a_command_that_fails_is_told_with_what_it_said(tmp_path):
    with pytest.raises(RuntimeError, match="unknown"):
        measured(["nothing"], tmp_path / "log")

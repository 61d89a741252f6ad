"""Communication between devices, counted in the text of compiled programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from experiments.bench.devices import all_reduced

HLO = """
  %all-reduce.1 = f32[3,3,64,128]{3,2,1,0} all-reduce(%x), replica_groups=[1,2]<=[2], to_apply=%add
  %all-reduce.2 = (f32[32]{0}, bf16[4]{0}, f32[], f32[1]{0}, f32[2]{0}, /*index=5*/f32[8]{0}) all-reduce(%a, %b), x=y
  %start = f32[10]{0} all-reduce-start(%y), channel_id=1
  %done = f32[10]{0} all-reduce-done(%start)
  %not = f32[7]{0} add(%all-reduce.1, %x)
"""


def test_all_reduced_counts_bytes_and_operations():
    bytes_ = 4 * 3 * 3 * 64 * 128 + (4 * 32 + 2 * 4 + 4 + 4 + 8 + 32) + 40
    assert all_reduced(HLO) == (bytes_, 3)
    assert all_reduced("ROOT %a = f32[2] add(%x, %y)") == (0, 0)


@pytest.mark.slow
def test_devices_benchmark_reduces_all_gradients(tmp_path):
    command = [sys.executable, "-m", "experiments.bench", "--only", "devices", "--quick"]
    command += ["--out", str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=500)
    rows = json.loads((tmp_path / "devices.json").read_text())["rows"]
    assert [(row["way"], row["devices"]) for row in rows] == [
        ("sharded", 1),
        ("sharded", 2),
        ("pmap", 2),
    ]
    single, *several = rows
    assert single["all-reduced KiB"] == 0 and single["efficiency"] == 1
    for row in several:
        assert row["parameters KiB"] <= row["all-reduced KiB"] < 1.1 * row["parameters KiB"]
        assert row["step ms"] > 0 and row["all-reduces"] > 0

"""Several processes share an extraction: the bytes of one process, and a death costs a line and its own parts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest
from published import write_resnet18
from tiny_dataset import write_dataset

from perturbjax.core.errors import InputError
from perturbjax.profiles import extract as extraction
from perturbjax.profiles import shards as shares
from perturbjax.profiles.extract import FeaturesConfig, extract
from perturbjax.profiles.image_inputs import AdaptConfig
from perturbjax.profiles.shards import Crew

SITES, BATCH = 10, 2
#: `perturbjax features`, with parts of one batch; process 1 is killed before it has kept its first.
COMMAND = """
import os, signal, sys
import numpy as np
from perturbjax import cli
from perturbjax.profiles import extract, shards as shares
extract.PART_BATCHES, shares.BEAT_S, shares.SILENT_S, shares.LOOK_S = 1, 0.2, 10.0, 0.2
if sys.argv[-1] == "1":
    np.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cli.main(["features", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), sites=SITES, size=32, channels=["DNA"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return str(write_resnet18(tmp_path_factory.mktemp("weights") / "resnet18.safetensors"))


@pytest.mark.slow
def test_one_that_is_killed_is_one_line_and_the_next_start_computes_what_it_owes(
    data, weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(extraction, "PART_BATCHES", 1)
    network = {
        "backbone": "resnet18",
        "weights": weights,
        "adapt": AdaptConfig(size=32),
        "batch_size": BATCH,
    }
    whole = extract(FeaturesConfig((data,), tmp_path / "whole.parquet", **network))

    out = tmp_path / "shared.parquet"
    flags = [
        "--data",
        data,
        "--out",
        out,
        "--backbone",
        "resnet18",
        "--weights",
        weights,
        "--size",
        "32",
    ]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = [
            "--coordinator",
            f"localhost:{free.getsockname()[1]}",
            "--processes",
            "2",
            "--process",
        ]
    words = list(map(str, [*flags, "--batch-size", BATCH, *job]))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, *words, str(process)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [2, -9], said
    errors = [line for line in said[0].splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and "process 1 (of 0 to 1) gave no sign of life" in errors[0]
        and "Traceback" not in said[0]
    )
    assert not out.exists()
    kept = sorted(path.name for path in (tmp_path / ".shared.parquet.extracting").glob("*.npy"))
    assert kept == [
        "part-000000.npy",
        "part-000002.npy",
        "part-000004.npy",
    ]  # what the first was dealt

    computed: list[str] = []
    save = extraction.np.save
    monkeypatch.setattr(
        extraction.np, "save", lambda path, values: (computed.append(path.name), save(path, values))
    )
    extract(FeaturesConfig((data,), out, **network))
    assert len(computed) == 2
    assert out.read_bytes() == whole.read_bytes()


def crew_of(tmp_path, count: int) -> list[Crew]:
    folder = tmp_path / ".out.parquet.processes"
    folder.mkdir()
    return [Crew(folder, index, count) for index in range(count)]


def test_every_number_is_dealt_once_and_shares_differ_by_one_at_most(tmp_path):
    first, *others = crew_of(tmp_path, 3)
    numbers = [0, 1, 4, 5, 8, 9, 10]
    shares_of = [first.deal(lambda: numbers), *(other.deal(list) for other in others)]
    assert shares_of == [[0, 5, 10], [1, 8], [4, 9]]
    assert Crew().deal(lambda: numbers) == numbers


def test_why_one_gave_up_ends_the_others_and_the_last_clears_up(tmp_path):
    crew = crew_of(tmp_path, 2)
    crew[0].deal(lambda: [0, 1])
    with pytest.raises(InputError, match="the shard is damaged"), crew[1].at_work():
        raise InputError("the shard is damaged")
    words = r"process 1 .* gave up \(the shard is damaged\); .* run the same command again"
    with pytest.raises(InputError, match=words), crew[0].at_work():
        crew[0].wait_for_all(lambda number: number == 0)
    assert list(tmp_path.iterdir()) == []


def test_one_that_beats_is_waited_for_and_one_that_does_not_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "SILENT_S", 2.0)
    monkeypatch.setattr(shares, "BEAT_S", 0.05)
    monkeypatch.setattr(shares, "LOOK_S", 0.1)
    crew = crew_of(tmp_path, 2)
    crew[0].deal(lambda: [0, 1])
    there = threading.Event()
    with crew[1].at_work():
        threading.Timer(3.0, there.set).start()
        crew[0].wait_for_all(lambda number: number == 0 or there.is_set())
    there.clear()
    with pytest.raises(
        InputError, match=r"process 1 \(of 0 to 1\) gave no sign of life in .*processes for 2 s"
    ):
        crew[0].wait_for_all(lambda number: number == 0)


def test_the_others_leave_when_the_table_is_written(tmp_path):
    first, second = crew_of(tmp_path, 2)
    threading.Timer(0.2, first.dismiss).start()
    second.wait_for_first()
    assert list(tmp_path.iterdir()) == []

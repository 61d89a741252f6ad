"""Tests of jobs with two processes that are connected over the loopback interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import pytest
from commands import SMALL, assert_same_parameters, command_line, one_line


def explicit(process: int, port: int) -> tuple[list[str], dict[str, str]]:
    job = {"COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": 2, "PROCESS_ID": process}
    return ["--distributed"], {f"JAX_{name}": str(value) for name, value in job.items()}


def slurm(process: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Environment that srun sets for each of two tasks; JAX derives the port from the job
    number.
    """
    variables = {
        "JOB_ID": port,
        "STEP_NODELIST": "localhost",
        "NTASKS": 2,
        "PROCID": process,
        "LOCALID": process,
    }
    return ["--distributed"], {f"SLURM_{name}": str(value) for name, value in variables.items()}


@pytest.fixture(scope="module")
def both(environment):
    """Return a function that runs a command in two connected processes: (status, stderr) of
    each.
    """

    def run(name: str, *flags: object, job=explicit) -> list[tuple[int, str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        line, started = [*command_line(name), *map(str, flags)], []
        for job_flags, variables in (job(process, port) for process in range(2)):
            command = {"args": [*line, *job_flags], "env": {**environment, **variables}}
            started.append(subprocess.Popen(**command, stderr=subprocess.PIPE, text=True))
        try:
            errors = [process.communicate(timeout=300)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        return [(process.returncode, text) for process, text in zip(started, errors, strict=True)]

    return run


@pytest.fixture(scope="module")
def trained(both, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("hosts") / "run"
    return out, both("train", "--data", dataset, "--out", out, *SMALL)


@pytest.mark.slow
def test_two_processes_train_same_network_as_one(trained, run):
    out, ends = trained
    assert [status for status, _ in ends] == [0, 0], ends
    assert "on 2 cpu device(s)" in ends[0][1]
    assert_same_parameters(run, out, tolerance=2e-4)
    for two, one in zip(metrics(out), metrics(run), strict=True):
        assert two["split"] == one["split"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["accuracy"] == one["accuracy"]


@pytest.mark.slow
def test_only_first_process_prints_and_writes(trained):
    out, ((_, first), (_, second)) = trained
    assert "Epoch 2" in first and "epoch" not in second.lower()
    assert len(metrics(out)) == 3
    assert {path.name for path in (out / "checkpoints/latest").iterdir()} == {"2"}


@pytest.mark.slow
def test_two_processes_extract_identical_features(both, command, run, dataset, tmp_path):
    flags = ("--data", dataset, "--run", run, "--batch-size", "1")  # three parts
    command("features", *flags, "--out", tmp_path / "one.parquet")
    ends = both("features", *flags, "--out", tmp_path / "two.parquet")
    assert [status for status, _ in ends] == [0, 0], ends
    assert "48 sites, " in ends[0][1] and "sites" not in ends[1][1]
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.parquet", "two.parquet"]


@pytest.mark.slow
def test_slurm_job_ends_with_same_error_in_both_processes(both, trained, dataset):
    flags = ("--data", dataset, "--out", trained[0], *SMALL, "--learning-rate", "0.5")
    ends = both("train", *flags, job=slurm)
    assert [status for status, _ in ends] == [2, 2], ends
    lines = {one_line(text) for _, text in ends}
    assert len(lines) == 1 and "already contains another run" in lines.pop()


def test_undescribed_job_is_refused(command, dataset, tmp_path):
    flags = ("--data", dataset, "--out", tmp_path / "run", "--distributed", *SMALL)
    line = one_line(command("train", *flags, status=2).stderr)
    assert "set JAX_COORDINATOR_ADDRESS" in line and not (tmp_path / "run").exists()


def metrics(run: os.PathLike) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

"""Two processes train one network over the loopback interface, each on its share of every batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import pytest
from commands import SMALL, assert_same_parameters, command_line, one_line


@pytest.fixture(scope="module")
def both(environment):
    """Run a verb in two processes that know of each other; gives (status, stderr) of each."""

    def run(verb: str, *flags: object) -> list[tuple[int, str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        job = ("--coordinator", f"localhost:{port}", "--processes", "2", "--process")
        started = [
            subprocess.Popen(
                [*command_line(verb), *map(str, flags), *job, str(process)],
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
        return [(process.returncode, words) for process, words in zip(started, said, strict=True)]

    return run


@pytest.fixture(scope="module")
def trained(both, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("hosts") / "run"
    return out, both("train", "--data", dataset, "--out", out, *SMALL)


def test_two_processes_train_the_network_of_one(trained, run):
    out, ends = trained
    assert [status for status, _ in ends] == [0, 0], ends
    assert "on 2 cpu device(s)" in ends[0][1]
    assert_same_parameters(run, out, tolerance=2e-4)
    for mine, theirs in zip(metrics(out), metrics(run), strict=True):
        assert mine["split"] == theirs["split"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["accuracy"] == theirs["accuracy"]


def test_the_first_process_alone_speaks_and_writes(trained):
    out, ((_, first), (_, second)) = trained
    assert "epoch 2" in first and "epoch" not in second and "trained" not in second
    assert len(metrics(out)) == 3
    assert {path.name for path in (out / "checkpoints/latest").iterdir()} == {"2"}


def test_what_the_first_process_refuses_ends_both_with_the_same_line(both, trained, dataset):
    ends = both("train", "--data", dataset, "--out", trained[0], *SMALL, "--learning-rate", "0.5")
    assert [status for status, _ in ends] == [2, 2], ends
    lines = {one_line(words) for _, words in ends}
    assert len(lines) == 1 and "already holds another run" in lines.pop()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--processes", "2"), "--coordinator"),
        (("--coordinator", "localhost:1", "--processes", "2", "--process", "2"), "--process 2"),
        (("--distributed",), "--coordinator HOST:PORT"),
    ],
)
def test_a_job_that_is_not_described_is_refused(command, dataset, environment, tmp_path, flags, words):
    done = command("train", "--data", dataset, "--out", tmp_path / "run", *flags, *SMALL, status=2)
    assert words in one_line(done.stderr) and not (tmp_path / "run").exists()


def metrics(run: os.PathLike) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

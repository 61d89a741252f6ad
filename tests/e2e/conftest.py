"""Fixtures that run the commands in separate processes on a small simulated plate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import SMALL, one_line

from tests.faults.arena import CommandServer, Request, Result


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of processes that tests start."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[CommandServer]:
    """Process that forks one process for each command, so that modules are imported once."""
    with CommandServer(tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture(scope="session")
def command(server) -> Callable[..., Result]:
    """Return a function: `command("train", ...)` runs `perturbjax train ...`; `data_prep build`
    runs data_prep. `environment` sets variables.
    """

    def run(
        name: str, *flags: object, status: int = 0, environment: dict[str, str] | None = None
    ) -> Result:
        program = name.split() if name.startswith("data_prep") else ["perturbjax", name]
        words = [*program, *map(str, flags)]
        done = server.run(Request(words, Path.cwd(), environment or {}))
        assert done.status == status, (
            f"{name} {flags}: status {done.status}\n{done.stdout}\n{done.stderr}"
        )
        return done

    return run


@pytest.fixture
def refused(command, tmp_path):
    """Return a function that runs a command that must fail and returns its error line; `out` must
    not exist.
    """

    def run(name: str, *flags: object, out=None) -> str:
        done = command(name, *flags, status=2)
        if out is not None:
            assert not out.exists(), f"{out} was left behind"
        return one_line(done.stderr)

    return run


@pytest.fixture(scope="session")
def plates(command, tmp_path_factory) -> Path:
    """Two simulated plates of 12 wells with two 64-pixel sites; three compounds and DMSO."""
    out = tmp_path_factory.mktemp("plates") / "plates"
    command(
        "data_prep simulate",
        *(
            "--out",
            out,
            "--plates",
            2,
            "--wells",
            12,
            "--sites",
            2,
            "--compounds",
            3,
            "--size",
            64,
            "--effect",
            3,
        ),
    )
    return out


@pytest.fixture(scope="session")
def dataset(command, plates, tmp_path_factory) -> Path:
    """Dataset of the simulated plates."""
    out = tmp_path_factory.mktemp("dataset") / "dataset"
    paths = ("--load-data", plates / "load_data.csv", "--images", plates, "--out", out)
    command("data_prep build", *paths, "--workers", 1)
    return out


@pytest.fixture(scope="session")
def run(command, dataset, tmp_path_factory) -> Path:
    """A run trained for two epochs and evaluated."""
    out = tmp_path_factory.mktemp("run") / "run"
    command("train", "--data", dataset, "--out", out, *SMALL)
    command("evaluate", "--run", out, "--replicates", 200)
    return out

"""Fixtures that run the commands in separate processes on a small simulated plate."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SMALL, command_line


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of all commands."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}


@pytest.fixture(scope="session")
def command(environment) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function: `command("train", ...)` runs `perturbjax train ...`; `data_prep build`
    runs data_prep.
    """

    def run(name: str, *flags: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*command_line(name), *map(str, flags)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, (
            f"{name} {flags}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

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
    command(
        "data_prep build", "--load-data", plates / "load_data.csv", "--images", plates, "--out", out
    )
    return out


@pytest.fixture(scope="session")
def run(command, dataset, tmp_path_factory) -> Path:
    """A run trained for two epochs and evaluated."""
    out = tmp_path_factory.mktemp("run") / "run"
    command("train", "--data", dataset, "--out", out, *SMALL)
    command("evaluate", "--run", out, "--replicates", 200)
    return out

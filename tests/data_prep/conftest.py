"""Fixtures: a small simulated plate, and commands in this or another process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from fork_server import ForkServerContext

from data_prep import process_pool
from data_prep.__main__ import main
from data_prep.simulate import SimulateConfig, simulate


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Use a temporary cache folder instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> Iterator[None]:
    """Fork the workers of builds in this process; builds in other processes spawn them."""
    context = ForkServerContext()
    with pytest.MonkeyPatch.context() as patch:
        replacement = SimpleNamespace(get_context=lambda method: context)
        patch.setattr(process_pool, "multiprocessing", replacement)
        yield


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plates of 6 wells, 2 sites each, 64 x 64 pixels, with DMSO and two compounds.

    Do not change it.
    """
    out = tmp_path_factory.mktemp("simulated") / "plate"
    simulate(SimulateConfig(out=out, plates=2, wells=6, sites=2, compounds=2, size=64, effect=3.0))
    return out


@pytest.fixture
def plate(simulated: Path, tmp_path: Path) -> Path:
    """Copy of that plate; tests may change it."""
    return Path(shutil.copytree(simulated, tmp_path / "plate"))


@pytest.fixture
def edit(plate: Path) -> Callable[[Callable[[pd.DataFrame], pd.DataFrame]], None]:
    """Apply a function to the load_data.csv of the plate."""

    def change(function: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
        path = plate / "load_data.csv"
        function(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)

    return change


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a command that must end with status 2 and one line of error; returns that line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
        ]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture
def build_arguments(plate: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a build of that plate, with additional flags."""

    def arguments(*more: object, out: Path = tmp_path / "dataset") -> list[str]:
        paths = ["--load-data", plate / "load_data.csv", "--images", plate, "--out", out]
        return [str(word) for word in ("build", *paths, "--workers", 1, *more)]

    return arguments


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.Popen]:
    """Start `python -m data_prep` in another process, without mask cache."""

    def start(
        *arguments: object, start_new_session: bool = False, **environment: str
    ) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "data_prep", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PERTURBJAX_MASK_CACHE": "none", **environment},
            start_new_session=start_new_session,
        )

    return start

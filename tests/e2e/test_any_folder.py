"""Tests of the working directory of commands, and of the packages in a wheel."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import find_packages

from perturbjax.dataset import open_dataset

REPOSITORY = Path(__file__).resolve().parents[2]


def test_commands_ignore_user_folder_named_data_prep(tmp_path, environment):
    (tmp_path / "data_prep").mkdir()
    (tmp_path / "data_prep/__init__.py").write_text(
        "raise SystemExit('this package belongs to the user')"
    )
    environment = {**environment, "PYTHONPATH": str(REPOSITORY)}
    for words in (
        "simulate --out plates --plates 1 --wells 6 --sites 1 --compounds 1 --size 48",
        "build --load-data plates/load_data.csv --images plates --out dataset --segmenter "
        "watershed --workers 2",
    ):
        command = [sys.executable, "-m", "perturbjax", *words.split()]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert len(open_dataset(tmp_path / "dataset")) == 6


def test_wheel_contains_two_packages():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]["find"]
    packages = find_packages(str(REPOSITORY), include=settings["include"])
    assert {name.split(".")[0] for name in packages} == {"perturbjax", "data_prep"}

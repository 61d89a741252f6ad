"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run, whatever the machine's load: a test that fails, fails for everyone.
settings.register_profile("perturbjax", derandomize=True, deadline=None)
settings.load_profile("perturbjax")

# Commands of the tests share no cached masks: a test that interrupts a build must compute them.
os.environ["PERTURBJAX_MASK_CACHE"] = "none"

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of real data; tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("PERTURBJAX_SHARED", REPOSITORY.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no real data at {path}: set PERTURBJAX_SHARED to the folder that holds it")
    return path

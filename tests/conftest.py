"""Settings and fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from perturbjax.core.errors import InputError

# Hypothesis draws the same examples in every run, without time limits, so that failures are
# reproducible.
settings.register_profile("perturbjax", derandomize=True, deadline=None)
settings.load_profile("perturbjax")

# Commands of the tests share no cached masks: a test that interrupts a build must compute them.
os.environ["PERTURBJAX_MASK_CACHE"] = "none"
# The same for features of frozen backbones.
os.environ["PERTURBJAX_SITE_FEATURES"] = "none"

# One thread for linear algebra and OpenMP: the workers of pytest use all cores, and the threads of
# several processes wait for each other in busy loops. An audit took twice the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]

# Compiled programs are shared by the processes of a run and by later runs. Compiling is more than
# half of the time of a first run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache/compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="session", autouse=True)
def messages_name_flags() -> Iterator[None]:
    """Use the messages of the command line; `core/test_errors.py` tests those of Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputError, "__str__", lambda error: error.message)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data; tests that need it are skipped if it does not exist."""
    path = Path(os.environ.get("PERTURBJAX_SHARED", REPOSITORY.parent / "shared"))
    if not (path / "data").is_dir():
        pytest.skip(f"no real data in {path}; set PERTURBJAX_SHARED to its folder")
    return path

"""Helpers of tests that run the commands in separate processes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from perturbjax.training.checkpoint import Checkpoints

#: Flags of the smallest training: 16-pixel crops, two epochs.
SMALL = (
    *("--preset", "paper", "--crop", "16", "--batch-size", "16", "--epochs", "2"),
    *("--split", "well", "--folds", "3"),
)


def command_line(name: str) -> list[str]:
    module, *words = name.split() if name.startswith("data_prep") else ("perturbjax", name)
    return [sys.executable, "-m", module, *words]


def one_line(stderr: str) -> str:
    """Return the error line of a failed command, which must be the only one, without traceback."""
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    return errors[0]


def assert_same_parameters(first: Path, second: Path, tolerance: float = 0.0) -> None:
    """Check that the latest checkpoints of two runs are bit-identical, or equal within a
    tolerance.
    """
    one, other = (Checkpoints(path).load()[0] for path in (first, second))
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=tolerance, atol=tolerance, err_msg=name)

"""What tests that drive the real commands say again and again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from perturbjax.training.checkpoint import Checkpoints

#: The least a network here is trained with: 16-pixel crops of 40 sites.
SMALL = ("--crop", "16", "--batch-size", "16", "--epochs", "2", "--split", "well", "--folds", "3")


def command_line(verb: str) -> list[str]:
    module, *words = verb.split() if verb.startswith("data_prep") else ("perturbjax", verb)
    return [sys.executable, "-m", module, *words]


def one_line(stderr: str) -> str:
    """The error of a command that was refused, which must be one line and no traceback."""
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    return errors[0]


def assert_same_parameters(first: Path, second: Path, tolerance: float = 0.0) -> None:
    """The latest checkpoints of two runs hold the same arrays: to the bit, or within a tolerance."""
    one, other = (Checkpoints(path).load()[0] for path in (first, second))
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=tolerance, atol=tolerance, err_msg=name)

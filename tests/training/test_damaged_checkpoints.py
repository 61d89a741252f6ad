"""A damaged file of a checkpoint gives the stored arrays or one line that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from perturbjax.core.errors import InputError
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.step import TrainState

KERNEL = np.arange(6, dtype=np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    state = TrainState({"kernel": KERNEL}, {}, {}, jnp.int32(3))
    with Checkpoints(run) as checkpoints:
        for epoch in (1, 2):
            checkpoints.save(state, epoch=epoch, facts={"recipe": {}}, score=0.5)
    return run


DAMAGE = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "half": lambda content: content[: len(content) // 2],
    "list": lambda content: b"[]",
    "number": lambda content: b"3",
    "mapping": lambda content: b'{"a": null}',
    "nested": lambda content: b"[" * 100_000,
    "flipped": lambda content: bytes([content[0] ^ 4]) + content[1:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "_CHECKPOINT_METADATA",
        "facts/metadata",
        "metrics/metrics",
        "state/_METADATA",
    ],
)
def test_damaged_checkpoint_is_one_line(saved, tmp_path, name, damage):
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    file = run / "checkpoints/best/2" / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    try:
        with Checkpoints(run) as checkpoints:
            tree, facts = checkpoints.load("best")
    except InputError as error:
        assert str(run / "checkpoints/best") in str(error) and "\n" not in str(error)
        return
    # orbax does not need the file, or another checkpoint is the best one.
    np.testing.assert_array_equal(tree["params/kernel"], KERNEL)
    assert facts["epoch"] in (1, 2)

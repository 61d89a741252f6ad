"""Checkpoints with orbax: the latest for resuming and the best for judging, kept as two things.

A third, `interrupted`, is of a run that was told to end within an epoch: it is there to go on from, and goes when the
next epoch is saved.

A checkpoint holds parameters, statistics, the optimizer's state and the step as one flat tree of named arrays
(`params/head/kernel`, …), with the epoch and what identifies the run as JSON beside it. It does not depend on how
many devices wrote it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Shaped

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, require_room
from perturbjax.core.options import renamed_from, require, require_sound
from perturbjax.models.ensemble_head import rename_saved_arrays
from perturbjax.training.step import TrainState

Tree = dict[str, Shaped[np.ndarray, "..."]]
Which = Literal["latest", "best"]
#: The fact that holds a checkpoint's arrays to what was saved.
DIGEST = "arrays_sha256"
INTERRUPTED = "interrupted"
#: Bytes of a checkpoint that are not its arrays.
BESIDE_ARRAYS = 1 << 20


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint"""

    run: Path
    """Run directory from `perturbjax train`."""
    checkpoint: str = renamed_from("latest", "epoch")
    """latest: after the last epoch. best: highest test accuracy, an optimistic score. Or the number of an epoch."""

    def __post_init__(self) -> None:
        require_sound(self)
        is_valid = self.checkpoint in get_args(Which) or self.epoch > 0
        require("checkpoint", self.checkpoint, is_valid, "latest, best or the number of an epoch")

    @property
    def which(self) -> Which:
        """latest or best; latest if an epoch is chosen."""
        return "best" if self.checkpoint == "best" else "latest"

    @property
    def epoch(self) -> int:
        """The chosen epoch, or 0."""
        return int(self.checkpoint) if re.fullmatch(r"\d{1,9}", self.checkpoint) else 0


def arrays_checksum(tree: Tree) -> str:
    """SHA-256 (hexadecimal) over names, types, shapes and values of arrays."""
    digest = hashlib.sha256()
    for name in sorted(tree):
        array = np.ascontiguousarray(tree[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def state_to_tree(state: Any) -> Tree:
    """Every array of a pytree under its path, on the host."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(state))[0]
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def tree_to_state(tree: Tree, template: Any, source: Path | str) -> Any:
    """Put named arrays back into a pytree of the template's structure.

    Raises:
        InputError: an array is missing, too many, or of another shape; the message names it.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(template)
    wanted = {_name(path): leaf for path, leaf in paths}
    if odd := sorted(set(wanted) ^ set(tree)):
        side = "lacks" if odd[0] in wanted else "has an unknown array"
        raise InputError(f"{source}: {side} {odd[0]}; it belongs to another model")
    for name, leaf in wanted.items():
        if np.shape(leaf) != tree[name].shape:
            raise InputError(
                f"{source}: {name} has shape {tree[name].shape}, the model needs {np.shape(leaf)}"
            )
    return jax.tree_util.tree_unflatten(treedef, [tree[name] for name in wanted])


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _alone() -> Any:
    """orbax's options for a process that reads or writes without waiting for the others of its job."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process {me}"
    )


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run: Path, *, keep_latest: int = 2, keep_best: int = 1):
        """Open `run/checkpoints`; it is created by the first save.

        Args:
            keep_latest: how many of the newest are kept, for resuming.
            keep_best: how many of the best (greatest accuracy on the judged sites) are kept.
        """
        self.path = Path(run).absolute() / "checkpoints"
        self._keep = {"latest": keep_latest, "best": keep_best, INTERRUPTED: 1}
        self._managers: dict[str, Any] = {}

    def _manager(self, which: str) -> Any:
        if which not in self._managers:
            import orbax.checkpoint as ocp

            logging.getLogger("absl").setLevel(logging.ERROR)
            best = (
                {"best_fn": lambda metrics: metrics["accuracy"], "best_mode": "max"}
                if which == "best"
                else {}
            )
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep[which],
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                create=False,  # orbax does not create where one process of several is active
                multiprocessing_options=_alone(),
                **best,
            )
            self._managers[which] = ocp.CheckpointManager(
                make_folder(self.path / which), options=options, item_names=("state", "facts")
            )
        return self._managers[which]

    def save(
        self, state: TrainState, *, epoch: int, facts: dict[str, Any], accuracy: float | None
    ) -> None:
        """Save after `epoch` (counted from 1). Given an accuracy, it is also a candidate for the best."""
        facts = {"epoch": epoch, **facts}
        for which in ("latest",) if accuracy is None else ("latest", "best"):
            self._save(which, epoch, state_to_tree(state), facts, accuracy)
        if manager := self._managers.pop(INTERRUPTED, None):
            manager.close()
        shutil.rmtree(self.path / INTERRUPTED, ignore_errors=True)

    def save_within(
        self, state: TrainState, *, epoch: int, step: int, facts: dict[str, Any]
    ) -> None:
        """Save within the epoch that follows `epoch`, at a step counted from the run's first."""
        self._save(INTERRUPTED, step, state_to_tree(state), {"epoch": epoch, **facts}, None)

    def _save(
        self, which: str, number: int, tree: Tree, facts: dict[str, Any], accuracy: float | None
    ) -> None:
        import orbax.checkpoint as ocp

        facts = {**facts, DIGEST: arrays_checksum(tree)}
        # Before orbax is asked for anything: its threads do not end well where a save fails.
        require_room(
            make_folder(self.path), sum(array.nbytes for array in tree.values()) + BESIDE_ARRAYS
        )
        self._manager(which).save(
            number,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree), facts=ocp.args.JsonSave(facts)
            ),
            metrics=None if accuracy is None else {"accuracy": float(accuracy)},
            force=True,
        )

    def epochs(self, which: Which = "latest") -> list[int]:
        """Epochs of which a complete checkpoint is there, ascending."""
        if not (self.path / which).is_dir():
            return []
        return sorted(self._manager(which).all_steps())

    def load(
        self, which: Which = "latest", epoch: int | None = None
    ) -> tuple[Tree, dict[str, Any]]:
        """The arrays and facts of a checkpoint: of `epoch`, or the newest (`latest`) or greatest in accuracy (`best`).

        Raises:
            InputError: there is none, or it cannot be read.
        """
        there = self.epochs(which)
        if not there:
            raise InputError(f"{self.path / which}: holds no checkpoint; train first")
        if epoch is None:
            epoch = self._manager(which).best_step() if which == "best" else there[-1]
        if epoch not in there:
            raise InputError(
                f"{self.path / which}: holds no epoch {epoch}; it has {', '.join(map(str, there))}"
            )
        return self._load(which, epoch)

    def load_newest(self) -> tuple[Tree, dict[str, Any]] | None:
        """What a run goes on from: the latest epoch, or where it was interrupted after that; None where there is none.

        Raises:
            InputError: it cannot be read.
        """
        epochs = self.epochs()
        if (self.path / INTERRUPTED).is_dir() and (steps := self._manager(INTERRUPTED).all_steps()):
            tree, facts = self._load(INTERRUPTED, max(steps))
            if not epochs or facts["epoch"] >= epochs[-1]:
                return tree, facts
        return self.load() if epochs else None

    def _load(self, which: str, number: int) -> tuple[Tree, dict[str, Any]]:
        import orbax.checkpoint as ocp

        try:
            loaded = self._manager(which).restore(
                number,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(), facts=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.path / which / str(number)}: cannot be read ({reason})"
            ) from error
        tree, facts = (
            {name: np.asarray(value) for name, value in loaded["state"].items()},
            loaded["facts"],
        )
        if not isinstance(facts, dict) or facts.get(DIGEST) != arrays_checksum(tree):
            raise InputError(
                f"{self.path / which / str(number)}: is damaged (its arrays are not those that were saved); "
                "remove it to go on from an earlier one, or train again"
            )
        return rename_saved_arrays(tree), facts

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()

"""Checkpoints of a run, stored with orbax.

Three sets are kept in `RUN/checkpoints`: `latest` (to resume), `best` (highest balanced accuracy on
validation sites; only in runs with `--validation-fraction`) and `interrupted` (saved within an
epoch after SIGTERM, deleted by the next complete epoch). orbax with `best_fn` would delete the
latest checkpoint, so the sets have separate managers.

A checkpoint contains parameters, statistics, optimizer state and step as one flat mapping from
names (`params/head/kernel/value`) to arrays. Next to it, JSON facts contain the epoch, the identity
of the run and a checksum of the arrays. Checkpoints do not depend on the number of devices.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, read_json, require_free_space
from perturbjax.core.options import renamed_from, require, require_sound
from perturbjax.models.ensemble_head import rename_saved_arrays
from perturbjax.training.checkpoint_arrays import Tree, arrays_checksum, state_to_tree
from perturbjax.training.step import TrainState

Which = Literal["latest", "best"]
#: Keys of the checksums of the arrays, and of the other facts, in the facts of a checkpoint.
CHECKSUM, FACTS_CHECKSUM = "arrays_sha256", "facts_sha256"
INTERRUPTED = "interrupted"
#: Metric of the best checkpoints. Earlier releases selected them by accuracy on test sites; they
#: stay readable.
BEST_METRIC, FORMER_BEST_METRIC = "balanced_accuracy", "accuracy"
#: Upper estimate of the size in bytes of a checkpoint's files other than its arrays.
METADATA_BYTES = 1 << 20
#: JSON files in the folder of a checkpoint, written by orbax.
JSON_FILES = ("_CHECKPOINT_METADATA", "facts/metadata", "metrics/metrics", "state/_METADATA")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint"""

    run: Path | None
    """Run directory from `perturbjax train`."""
    checkpoint: str = renamed_from("latest", "epoch")
    """latest: after the last epoch. best: highest balanced accuracy on validation sites. Or the
    number of an epoch.
    """

    def __post_init__(self) -> None:
        require_sound(self)
        is_valid = self.checkpoint in get_args(Which) or self.epoch > 0
        require("checkpoint", self.checkpoint, is_valid, "latest, best or the number of an epoch")

    @property
    def folder(self) -> Path:
        """The run directory.

        Raises:
            InputError: there is none.
        """
        if self.run is None:
            raise InputError("--run is missing: pass a run directory from `perturbjax train`")
        return self.run

    @property
    def which(self) -> Which:
        """latest or best; latest if an epoch is chosen."""
        return "best" if self.checkpoint == "best" else "latest"

    @property
    def epoch(self) -> int:
        """The chosen epoch, or 0."""
        return int(self.checkpoint) if re.fullmatch(r"\d{1,9}", self.checkpoint) else 0


def facts_checksum(facts: dict[str, Any]) -> str:
    """Compute the SHA-256 checksum (hexadecimal) of facts, as they are read from JSON."""
    # Reading turns tuples into lists, and all keys into text.
    stored = json.loads(json.dumps({**facts, FACTS_CHECKSUM: None}))
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def _single_process_options() -> Any:
    """Return orbax options with which this process does not wait for the others of its job."""
    import orbax.checkpoint as ocp

    # orbax synchronizes all processes by default, which would block if only one of them saves.
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process {index}"
    )


class Checkpoints:
    """Checkpoints of one run directory; use it in a `with` block, or call `close`."""

    def __init__(self, run: Path, *, keep_latest: int = 2):
        """Open `RUN/checkpoints`, which the first save creates.

        Args:
            run: run directory.
            keep_latest: number of latest checkpoints to keep.
        """
        self.path = Path(run).absolute() / "checkpoints"
        self._keep = {"latest": keep_latest, "best": 1, INTERRUPTED: 1}
        self._managers: dict[str, Any] = {}

    def _manager(self, which: str) -> Any:
        if which not in self._managers:
            import orbax.checkpoint as ocp

            # Hides the progress messages of orbax; errors remain visible.
            logging.getLogger("absl").setLevel(logging.ERROR)
            best = {"best_fn": _best_score, "best_mode": "max"} if which == "best" else {}
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep[which],
                # Synchronous: the checkpoint is complete when `save` returns. A killed save leaves
                # a temporary folder, which the next start removes.
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
                create=False,  # orbax creates no folder if only one of several processes is active
                multiprocessing_options=_single_process_options(),
                **best,
            )
            folder = make_folder(self.path / which)
            with _readable(folder):
                self._managers[which] = ocp.CheckpointManager(
                    folder, options=options, item_names=("state", "facts")
                )
        return self._managers[which]

    def save(
        self,
        state: TrainState,
        *,
        epoch: int,
        facts: dict[str, Any],
        score: float | None = None,
    ) -> None:
        """Save the state after an epoch.

        Args:
            state: arrays of the training.
            epoch: number of completed epochs.
            facts: identity of the run.
            score: balanced accuracy on validation sites; if given, the checkpoint is also a
                candidate for the best.
        """
        for which in ("latest",) if score is None else ("latest", "best"):
            self._save(which, epoch, state, {"epoch": epoch, **facts}, score)
        # A complete epoch replaces the state that was saved within it.
        if manager := self._managers.pop(INTERRUPTED, None):
            manager.close()
        shutil.rmtree(self.path / INTERRUPTED, ignore_errors=True)

    def save_within(
        self, state: TrainState, *, epoch: int, step: int, facts: dict[str, Any]
    ) -> None:
        """Save the state at a step within the epoch after `epoch`; steps count from the start."""
        self._save(INTERRUPTED, step, state, {"epoch": epoch, **facts})

    def _save(
        self,
        which: str,
        number: int,
        state: TrainState,
        facts: dict[str, Any],
        score: float | None = None,
    ) -> None:
        import orbax.checkpoint as ocp

        tree = state_to_tree(state)
        facts = {**facts, CHECKSUM: arrays_checksum(tree)}
        facts[FACTS_CHECKSUM] = facts_checksum(facts)
        # Check the free space first: the threads of orbax do not stop cleanly if a save fails.
        size = sum(array.nbytes for array in tree.values())
        require_free_space(make_folder(self.path), size + METADATA_BYTES)
        self._manager(which).save(
            number,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(tree), facts=ocp.args.JsonSave(facts)
            ),
            metrics=None if score is None else {BEST_METRIC: float(score)},
            force=True,
        )

    def epochs(self, which: Which = "latest") -> list[int]:
        """Return the epochs with a complete checkpoint, in ascending order."""
        if not (self.path / which).is_dir():
            return []
        with _readable(self.path / which):
            return sorted(self._manager(which).all_steps())

    def load(
        self, which: Which = "latest", epoch: int | None = None
    ) -> tuple[Tree, dict[str, Any]]:
        """Load the arrays and facts of a checkpoint.

        Args:
            which: set of checkpoints.
            epoch: epoch to load; None loads the newest (`latest`) or the one with the highest score
                (`best`).

        Raises:
            InputError: there is no such checkpoint, or it is not readable.
        """
        epochs = self.epochs(which)
        if not epochs and which == "best":
            raise InputError(
                f"--checkpoint best: {self.path.parent} has no best checkpoint, because it was "
                "trained without "
                "validation sites. Train with --validation-fraction 0.2, or use --checkpoint "
                "latest."
            )
        if not epochs:
            raise InputError(f"{self.path / which}: has no checkpoint; train the run first")
        if epoch is None:
            epoch = self._best() if which == "best" else epochs[-1]
        if epoch not in epochs:
            raise InputError(
                f"{self.path / which}: has no epoch {epoch} (available: "
                f"{', '.join(map(str, epochs))})"
            )
        return self._load(which, epoch)

    def _best(self) -> int | None:
        with _readable(self.path / "best"):
            return self._manager("best").best_step()

    def load_newest(self) -> tuple[Tree, dict[str, Any]] | None:
        """Load the checkpoint to resume from; None if there is none.

        This is the latest epoch, or the interrupted state if it is later.

        Raises:
            InputError: the checkpoint is not readable.
        """
        epochs = self.epochs()
        # Interrupted checkpoints are numbered by step, the latest ones by epoch.
        if (self.path / INTERRUPTED).is_dir() and (steps := self._manager(INTERRUPTED).all_steps()):
            tree, facts = self._load(INTERRUPTED, max(steps))
            # `epoch` counts complete epochs. A smaller number is a leftover of a command that was
            # killed before it deleted the interrupted state.
            if not epochs or facts["epoch"] >= epochs[-1]:
                return tree, facts
        return self.load() if epochs else None

    def _load(self, which: str, number: int) -> tuple[Tree, dict[str, Any]]:
        import orbax.checkpoint as ocp

        folder = self.path / which / str(number)
        # Without a template, orbax restores the arrays as they were saved. `StandardRestore` would
        # open each array once more for its metadata, which takes half of the time.
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(), facts=ocp.args.JsonRestore())
        _ignore_closed_loops()
        with _readable(folder):
            loaded = self._manager(which).restore(number, args=items)
            tree = {name: np.asarray(value) for name, value in loaded["state"].items()}
            facts = loaded["facts"]
        if not isinstance(facts, dict) or facts.get(CHECKSUM) != arrays_checksum(tree):
            raise _damaged(folder, "arrays")
        # Checkpoints of earlier versions have no checksum of the facts.
        expected = facts.get(FACTS_CHECKSUM, facts_checksum(facts))
        if not isinstance(facts.get("epoch"), int) or expected != facts_checksum(facts):
            raise _damaged(folder / "facts" / "metadata", "facts")
        return rename_saved_arrays(tree), facts

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _damaged(path: Path, part: str) -> InputError:
    return InputError(
        f"{path}: is damaged (checksum of the {part} differs). Remove the checkpoint to use an "
        "earlier one, or train again."
    )


@functools.cache
def _ignore_closed_loops() -> None:
    """Hide messages about the remaining reads of a damaged checkpoint.

    orbax reads all arrays at the same time, and closes its event loop at the first error.
    tensorstore then reports each remaining read to the closed loop, for which Python prints a
    traceback.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn any error of orbax into one line that names the damaged file.

    Args:
        folder: one checkpoint, or a set of checkpoints.

    Raises:
        InputError: the block failed.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds
        # tensorstore appends its settings to the message.
        reason = (str(error) or type(error).__name__).splitlines()[0].split(" [tensorstore_spec")[0]
        damaged = _damaged_file(folder)
        raise InputError(
            f"{damaged or folder}: cannot be read ({reason}). Restore it, or remove the folder of "
            "its checkpoint to use an earlier one"
        ) from error


def _damaged_file(folder: Path) -> Path | None:
    """Return the first JSON file of orbax that cannot be parsed or contains another type."""
    for name in JSON_FILES:
        for file in sorted(folder.rglob(name)):
            try:
                if not isinstance(read_json(file), dict):
                    return file
            except InputError:
                return file
    return None


def _best_score(metrics: dict[str, float]) -> float:
    return metrics.get(BEST_METRIC, metrics.get(FORMER_BEST_METRIC, 0.0))

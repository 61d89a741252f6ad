"""The run directory: what a run was asked to do, and what it wrote.

`config.json` · `split.parquet` · `labels.json` · `metrics.jsonl` · `checkpoints/` · `evaluation/` · `report.html`
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.config import Recipe, recipe_from_dict, recipe_to_dict
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, make_folder, read_json, read_parquet, write_json
from perturbjax.data import normalization
from perturbjax.data.splits import create_manifest, fingerprint, read_split, write_split
from perturbjax.dataset import Dataset, open_dataset

CONFIG, SPLIT_FILE, LABELS, METRICS = "config.json", "split.parquet", "labels.json", "metrics.jsonl"
LOCK = ".lock"
#: Packages whose version can change a run's numbers.
RECORDED_VERSIONS = ("perturbjax", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Run:
    """A run directory that has been opened.

    Attributes:
        path: the directory.
        recipe: what decides the run's numbers.
        data: the dataset directories it was started on; none for a network imported without one.
        class_names: in the order of the logits.
        facts: what must not change between two parts of one run.
    """

    path: Path
    recipe: Recipe
    data: tuple[Path, ...]
    class_names: list[str]
    facts: dict[str, Any]

    @property
    def label_column(self) -> str:
        return self.facts["label_column"]

    @property
    def identity(self) -> dict[str, Any]:
        """All that its predictions depend on beside the arrays: what every checkpoint of it repeats."""
        return {
            "recipe": recipe_to_dict(self.recipe),
            "classes": self.class_names,
            "facts": self.facts,
        }

    def require_matching_files(self, facts: dict[str, Any], checkpoint: Path) -> None:
        """Hold the files of the run, which are for reading, to what its checkpoint says.

        Raises:
            InputError: names the file that differs.
        """
        for name, file in (("classes", LABELS), ("recipe", CONFIG), ("facts", CONFIG)):
            said = facts.get(name)
            if name == "recipe" and isinstance(said, dict):
                said = recipe_to_dict(recipe_from_dict(said))  # of a version that had fewer options
            if _json(said) != _json(self.identity[name]):
                raise InputError(
                    f"{self.path / file}: differs from what {checkpoint} was trained with ({name}); "
                    "restore the file, or train again"
                )

    def manifest(self, index: pd.DataFrame) -> pd.DataFrame:
        """The run's split, in the order of `index`; where it came without one, what its recipe deals."""
        if not (self.path / SPLIT_FILE).is_file():
            return create_manifest(
                index, self.recipe.split, label=self.label_column, seed=self.recipe.seed
            )
        return read_split(self.path / SPLIT_FILE, index)

    def parts(self, site_ids: pd.Series) -> np.ndarray:
        """The part that each site had in the run: train, test, or new where the run does not know it."""
        if not (self.path / SPLIT_FILE).is_file():
            return np.full(len(site_ids), "new", object)
        known = _read_split_file(self.path).set_index("site_id")["part"]
        return site_ids.map(known).fillna("new").to_numpy()

    def statistics_for(self, dataset: Dataset) -> normalization.Statistics:
        """What intensities of a dataset are normalised by: the statistics that the run was trained with.

        A line is printed where they are not enough (see `normalization.choose_statistics`).
        """
        kept, own = self.facts.get("normalization"), self.facts.get("index_sha256")
        is_own = own is not None and own == dataset_facts(dataset)["index_sha256"]
        return normalization.choose_statistics(
            dataset, self.recipe.input, kept, self.path, is_training_data=is_own
        )

    def open_data(self, paths: tuple[Path, ...] = ()) -> Dataset:
        """The dataset at `paths`, or else the one the run was started on.

        Raises:
            InputError: there is neither, or it cannot be opened.
        """
        if not (chosen := paths or self.data):
            raise InputError(f"--data: {self.path} was imported without a dataset; name one")
        return open_dataset(chosen)

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Add rows to `metrics.jsonl`."""
        with (self.path / METRICS).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def truncate_metrics(self, epoch: int) -> None:
        """Drop what was written after `epoch`, and what a kill left half-written."""
        kept = [row for row in read_metrics(self.path) if row["epoch"] <= epoch]
        with atomic(self.path / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; what follows a line that was cut short or is damaged is left out."""
    file = Path(path) / METRICS
    if not file.is_file():
        return []
    rows = []
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
            whole = isinstance(row["epoch"], int) and {"step", "split", "loss", "accuracy"} <= set(
                row
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            break
        rows.append(row)
    return rows


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """What a dataset must share with a model that is applied to it, and what identifies it."""
    return {
        "channels": dataset.channel_names,
        "image_dtype": str(dataset.image_dtype),
        "image_size": list(dataset.image_size),
        "index_sha256": dataset.index_sha256,
    }


def describe_run(
    path: Path,
    *,
    recipe: Recipe,
    dataset: Dataset,
    label_column: str,
    class_names: list[str],
    manifest: pd.DataFrame,
    pretrained: dict[str, Any] | None = None,
) -> Run:
    """A run that is to be; nothing is read or written. `pretrained` says where published weights came from."""
    facts = {
        "label_column": label_column,
        "split_fingerprint": fingerprint(manifest),
        **dataset_facts(dataset),
        "normalization": normalization.fit_statistics(dataset, recipe.input),
    }
    if pretrained is not None:
        facts["pretrained"] = pretrained
    return Run(
        Path(path), recipe, tuple(path.absolute() for path in dataset.paths), class_names, facts
    )


def start_run(run: Run, manifest: pd.DataFrame | None) -> None:
    """Make the directory of a run, or find there the one that the same recipe, data and split began before.

    Only an imported network may come without a split.

    Raises:
        InputError: the directory holds another run, or something that is no run.
    """
    path = run.path
    if (path / CONFIG).is_file():
        _require_same(open_run(path), run)
        return
    _require_free(path)
    make_folder(path)
    if manifest is not None:
        write_split(manifest, path / SPLIT_FILE)
    write_json(path / LABELS, run.class_names)
    # Written last: a directory with a config.json is a run, whole.
    write_json(
        path / CONFIG,
        {
            "recipe": recipe_to_dict(run.recipe),
            "data": _as_json(run.data),
            "facts": run.facts,
            "versions": {name: version(name) for name in RECORDED_VERSIONS},
            "begun": {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "on": _machine(),
                **_commit(),
            },
        },
    )


def _as_json(data: tuple[Path, ...]) -> str | list[str] | None:
    """One directory as its name, several as a list, none as null."""
    return str(data[0]) if len(data) == 1 else [str(path) for path in data] or None


def dataset_paths(config: dict[str, Any]) -> tuple[Path, ...]:
    """The dataset directories that a `config.json` names."""
    named = config["data"]
    return tuple(map(Path, [named] if isinstance(named, str) else named or []))


def _machine() -> str:
    """Where this process computes, in words."""
    import jax

    devices = jax.devices()
    host = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{host}; {len(devices)} × {devices[0].device_kind}"


def _commit() -> dict[str, str]:
    """The commit of the program, where it runs from a clone; with -dirty where files of it were changed since."""
    clone = Path(__file__).parents[2]
    if not (clone / ".git").exists():
        return {}
    command = [
        "git",
        "-C",
        str(clone),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git here, or it will not read this clone
        return {}
    return {"commit": told.stdout.strip()}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a run directory, made if need be, for this process alone until the block ends, or the process does.

    Raises:
        InputError: another process keeps it, it holds something that is no run, or it cannot be written to.
    """
    if not (path / CONFIG).is_file():
        _require_free(path)
    with (make_folder(path) / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another process is training there; let it end, or choose another --out"
            ) from None
        except OSError:  # some network filesystems have no locks, and training there must go on
            pass
        yield


def _require_free(path: Path) -> None:
    # A run that was killed while it was begun left no more than these, and files still under temporary names.
    begun = (LOCK, SPLIT_FILE, LABELS)
    if path.is_dir() and any(
        file.name not in begun and not file.name.startswith(".") for file in path.iterdir()
    ):
        raise InputError(f"{path}: is not empty and holds no run; choose another --out")


def open_run(path: Path) -> Run:
    """Open a run directory.

    Raises:
        InputError: it is missing or incomplete.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise InputError(
            f"{path}: holds no run ({CONFIG} is missing); make one with `perturbjax train --out {path}`"
        )
    config, names = read_json(path / CONFIG), read_json(path / LABELS)
    try:
        recipe, facts = recipe_from_dict(config["recipe"]), config["facts"]
        data = dataset_paths(config)
        split = facts["split_fingerprint"]
        labels = facts["label_column"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path / CONFIG}: was not written by this program ({error!r})") from error
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or not isinstance(labels, str)
    ):
        raise InputError(
            f"{path / LABELS}: is not the list of class names that was written; restore it"
        )
    if split is not None and fingerprint(_read_split_file(path)) != split:
        raise InputError(
            f"{path / SPLIT_FILE}: is not the split that the run was trained by; restore it"
        )
    return Run(path, recipe, data, names, facts)


def _read_split_file(path: Path) -> pd.DataFrame:
    """A run's own split.

    Raises:
        InputError: it is missing or damaged.
    """
    table = read_parquet(path / SPLIT_FILE, "restore it")
    if not {"site_id", "part"} <= set(table.columns):
        raise InputError(
            f"{path / SPLIT_FILE}: is not the split that the run was trained by; restore it"
        )
    return table.assign(site_id=table["site_id"].astype(str), part=table["part"].astype(str))


def _json(value: Any) -> str:
    """A value as it is once it has been through JSON, comparable."""
    return json.dumps(value, sort_keys=True)


def _require_same(run: Run, other: Run) -> None:
    """Refuse to go on with a run under another recipe, dataset, split or labels."""
    before, now = recipe_to_dict(run.recipe), recipe_to_dict(other.recipe)
    old = {
        **{
            f"{s}.{k}": v
            for s, part in before.items()
            if isinstance(part, dict)
            for k, v in part.items()
        },
        **run.facts,
        "labels": run.class_names,
    }
    new = {
        **{
            f"{s}.{k}": v
            for s, part in now.items()
            if isinstance(part, dict)
            for k, v in part.items()
        },
        **other.facts,
        "labels": other.class_names,
    }
    old["seed"], new["seed"] = run.recipe.seed, other.recipe.seed
    for name in new:
        if _plain(old.get(name)) != _plain(new[name]):
            raise InputError(
                f"{run.path}: already holds another run ({name} was {old.get(name)}, now {new[name]}); "
                "choose another --out, or give the same flags to go on with it"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

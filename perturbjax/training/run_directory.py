"""Run directory: settings, split, metrics and checkpoints of one training.

Files: `config.json`, `split.parquet`, `labels.json`, `metrics.jsonl`, `checkpoints/`,
`evaluation/`, `report.html`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax.core.config import Recipe
from perturbjax.core.errors import InputError
from perturbjax.core.files import (
    atomic,
    describe_path,
    make_folder,
    read_json,
    read_parquet,
    write_json,
)
from perturbjax.core.recipe_files import recipe_from_dict, recipe_to_dict
from perturbjax.data import normalization
from perturbjax.data.splits import create_manifest, fingerprint, read_split, write_split
from perturbjax.dataset import Dataset, open_dataset
from perturbjax.models.user_networks import code_facts

CONFIG, SPLIT_FILE, LABELS, METRICS = "config.json", "split.parquet", "labels.json", "metrics.jsonl"
LOCK = ".lock"
#: Packages whose version can change the numbers of a run.
RECORDED_VERSIONS = ("perturbjax", "jax", "jaxlib", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Run:
    """An open run directory.

    Attributes:
        path: the directory.
        recipe: settings that determine the numbers of the run.
        data: dataset directories of the training; empty for a network that was imported without a
            dataset.
        class_names: names of the classes, in the order of the logits.
        facts: properties that must stay the same when the run is resumed (label column, split,
            channels, ...).
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
        """Everything besides the arrays that predictions depend on; stored in each checkpoint."""
        return {
            "recipe": recipe_to_dict(self.recipe),
            "classes": self.class_names,
            "facts": self.facts,
        }

    def require_matching_files(self, facts: dict[str, Any], checkpoint: Path) -> None:
        """Check that the readable files of the run agree with the facts of a checkpoint.

        Raises:
            InputError: the message names the file that differs.
        """
        for name, file in (("classes", LABELS), ("recipe", CONFIG), ("facts", CONFIG)):
            stored = facts.get(name)
            if name == "recipe" and isinstance(stored, dict):
                # Adds the defaults of fields that the version that wrote the checkpoint did not
                # have. A recipe that cannot be parsed differs.
                with suppress(KeyError, TypeError, ValueError, AttributeError, InputError):
                    stored = recipe_to_dict(recipe_from_dict(stored))
            if _json(stored) != _json(self.identity[name]):
                raise InputError(
                    f"{self.path / file}: differs from the {name} stored in {checkpoint}. Restore "
                    "the file, or train "
                    "again."
                )

    def manifest(self, index: pd.DataFrame) -> pd.DataFrame:
        """Return the split of the run in the order of `index`.

        A run without a stored split (an imported network) gets the split of its recipe.
        """
        if not (self.path / SPLIT_FILE).is_file():
            return create_manifest(
                index, self.recipe.split, label=self.label_column, seed=self.recipe.seed
            )
        return read_split(self.path / SPLIT_FILE, index)

    def parts(self, site_ids: pd.Series) -> np.ndarray:
        """Return the part of each site: train, validation, test, or new (not in the split)."""
        if not (self.path / SPLIT_FILE).is_file():
            return np.full(len(site_ids), "new", object)
        # Sites that the split does not contain are new, for example those of an appended plate.
        part_of_site = _read_split_file(self.path).set_index("site_id")["part"]
        return site_ids.map(part_of_site).fillna("new").to_numpy()

    def statistics_for(self, dataset: Dataset) -> normalization.Statistics:
        """Return the statistics of the training data that normalize the intensities of a dataset.

        A warning is printed if they are missing or unreliable (see
        `normalization.choose_statistics`).
        """
        stored, trained_on = self.facts.get("normalization"), self.facts.get("index_sha256")
        is_own = trained_on is not None and trained_on == dataset.index_sha256
        return normalization.choose_statistics(
            dataset, self.recipe.input, stored, self.path, is_training_data=is_own
        )

    def open_data(self, paths: tuple[Path, ...] = ()) -> Dataset:
        """Open the datasets at `paths`, or by default those of the training.

        Raises:
            InputError: there is none, or it is not readable.
        """
        if not (chosen := paths or self.data):
            raise InputError(f"--data: {self.path} was imported without a dataset; pass one")
        return open_dataset(chosen)

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to `metrics.jsonl`."""
        with (self.path / METRICS).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def truncate_metrics(self, epoch: int) -> None:
        """Remove rows after `epoch` and incomplete lines."""
        # Later rows belong to epochs that will be trained a second time.
        rows = [row for row in read_metrics(self.path) if row["epoch"] <= epoch]
        # Written to a temporary file first, so that a kill leaves the old or the new file.
        with atomic(self.path / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` of a run, up to the first incomplete or damaged line.

    Returns:
        One row for each epoch and split (train, validation, test) with `epoch`, `step`, `split`,
        `loss`, `accuracy`.
    """
    file = Path(path) / METRICS
    if not file.is_file():
        return []
    rows = []
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
            numbers = [row[name] for name in ("step", "loss", "accuracy")]
            complete = isinstance(row["epoch"], int) and isinstance(row["split"], str)
            complete = complete and all(isinstance(one, int | float) for one in numbers)
        except (ValueError, KeyError, TypeError, RecursionError):
            complete = False
        # A killed process leaves an incomplete last line; all rows after it are ignored.
        if not complete:
            break
        rows.append(row)
    return rows


def require_whole_sites(recipe: Recipe, where: Path) -> None:
    """Check that the network of a recipe takes whole sites.

    Raises:
        InputError: it takes bags of cells.
    """
    if recipe.input.cells:
        raise InputError(
            f"{where}: its network takes bags of cells, not images (preset wells). Use a run on "
            "whole sites."
        )


def dataset_facts(dataset: Dataset, any_size: bool = False) -> dict[str, Any]:
    """Return the properties of a dataset that a network depends on, and its checksum.

    Args:
        dataset: training data.
        any_size: sites may differ in size, because the network gets windows of one size.

    Raises:
        InputError: sites differ in size.
    """
    return {
        "channels": dataset.channel_names,
        "image_dtype": str(dataset.image_dtype),
        "image_size": None if any_size else list(dataset.image_size),
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
    """Create the description of a new run; no files are read or written.

    Args:
        path: run directory.
        recipe: settings of the training.
        dataset: dataset of the training.
        label_column: column that is predicted.
        class_names: names of the classes, in the order of the logits.
        manifest: split of the sites.
        pretrained: provenance of pretrained weights.
    """
    facts = {
        "label_column": label_column,
        "split_fingerprint": fingerprint(manifest),
        **dataset_facts(dataset, any_size=recipe.input.cells > 0),
        "normalization": normalization.fit_statistics(dataset, recipe.input),
    }
    if pretrained is not None:
        facts["pretrained"] = pretrained
    facts |= code_facts(recipe.model.model)
    # Absolute, so that the run can be opened from another working directory.
    data = tuple(path.absolute() for path in dataset.paths)
    return Run(Path(path), recipe, data, class_names, facts)


def start_run(run: Run, manifest: pd.DataFrame | None) -> None:
    """Create the directory of a run, or check that it already contains the same run.

    Args:
        run: description of the run.
        manifest: its split; None for an imported network.

    Raises:
        InputError: the directory contains another run or other files.
    """
    path = run.path
    if (path / CONFIG).is_file():
        _require_same(open_run(path), run)
        return
    require_free(path)
    make_folder(path)
    if manifest is not None:
        write_split(manifest, path / SPLIT_FILE)
    write_json(path / LABELS, run.class_names)
    # config.json is written last, so that a directory with a config.json is a complete run.
    write_json(
        path / CONFIG,
        {
            "recipe": recipe_to_dict(run.recipe),
            "data": _data_to_json(run.data),
            "facts": run.facts,
            "versions": {name: version(name) for name in RECORDED_VERSIONS},
            "begun": {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "on": _machine(),
                **git_commit(),
            },
        },
    )


def _data_to_json(data: tuple[Path, ...]) -> str | list[str] | None:
    return str(data[0]) if len(data) == 1 else [str(path) for path in data] or None


def dataset_paths(config: dict[str, Any]) -> tuple[Path, ...]:
    """Return the dataset directories in the content of a `config.json`."""
    paths = config["data"]
    return tuple(map(Path, [paths] if isinstance(paths, str) else paths or []))


def _machine() -> str:
    import jax

    devices = jax.devices()
    host = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{host}; {len(devices)} × {devices[0].device_kind}"


def git_commit(clone: Path = Path(__file__).parents[2]) -> dict[str, str]:
    """Return the git commit of the program (with -dirty); empty outside a clone."""
    if not (clone / ".git").exists():
        return {}
    # `--exclude=*` ignores tags, so that the result is always a full commit number.
    options = ("--always", "--dirty", "--abbrev=40", "--exclude=*")
    command = ["git", "-C", str(clone), "describe", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or it refuses to read this clone
        return {}
    return {"commit": done.stdout.strip()}


def require_free(path: Path) -> None:
    """Require that a directory does not exist or contains nothing but an unfinished run.

    Raises:
        InputError: it contains other files.
    """
    # A process that was killed while it created the run leaves only these files and temporary
    # files.
    unfinished = (LOCK, SPLIT_FILE, LABELS)
    if path.is_dir() and any(
        file.name not in unfinished and not file.name.startswith(".") for file in path.iterdir()
    ):
        raise InputError(f"{path}: is not empty and contains no run; choose another --out")


def open_run(path: Path) -> Run:
    """Open a run directory.

    Raises:
        InputError: a file is missing or damaged.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise InputError(
            f"{path}: contains no run ({CONFIG} is missing). It {describe_path(path)}. Create a "
            "run with `perturbjax train --out RUN`."
        )
    config, names = read_json(path / CONFIG), read_json(path / LABELS)
    try:
        recipe, facts = recipe_from_dict(config["recipe"]), config["facts"]
        data = dataset_paths(config)
        split, label_column = facts["split_fingerprint"], facts["label_column"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path / CONFIG}: is not the config.json of a run ({error!r})") from error
    if not is_list_of_text(names) or not isinstance(label_column, str):
        raise InputError(f"{path / LABELS}: is not a list of class names. Restore the file.")
    # A changed split could move test sites into the training set.
    if split is not None and fingerprint(_read_split_file(path)) != split:
        raise InputError(_split_changed(path))
    return Run(path, recipe, data, names, facts)


def is_list_of_text(value: object) -> bool:
    """Return whether a value from a JSON file is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _read_split_file(path: Path) -> pd.DataFrame:
    """Read the split of a run without a dataset."""
    table = read_parquet(path / SPLIT_FILE, "restore it")
    if not {"site_id", "part"} <= set(table.columns):
        raise InputError(_split_changed(path))
    return table.assign(site_id=table["site_id"].astype(str), part=table["part"].astype(str))


def _split_changed(path: Path) -> str:
    return (
        f"{path / SPLIT_FILE}: is not the split of this run (checksum differs). Restore the file."
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _require_same(run: Run, other: Run) -> None:
    """Check that a run has the same recipe, dataset, split and labels as another."""
    old, new = _settings(run), _settings(other)
    for name, value in new.items():
        if old.get(name) != value:
            raise InputError(
                f"{run.path}: already contains another run ({name} was {old.get(name)}, is now "
                f"{value}). "
                "Choose another --out, or pass the same flags to resume that run."
            )


def _settings(run: Run) -> dict[str, Any]:
    """Return recipe fields (as section.field), facts and labels as one flat mapping."""
    recipe = recipe_to_dict(run.recipe)
    # A flat mapping names the exact field that differs, for example `optim.epochs`.
    sections = {name: part for name, part in recipe.items() if isinstance(part, dict)}
    fields = {f"{name}.{key}": part[key] for name, part in sections.items() for key in part}
    settings = {**fields, **run.facts, "labels": run.class_names, "seed": run.recipe.seed}
    return json.loads(
        _json(settings)
    )  # lists instead of tuples, as in a run that was read from disk

"""The run directory: what a run was asked to do, and what it wrote.

`config.json` · `split.parquet` · `labels.json` · `metrics.jsonl` · `checkpoints/` · `evaluation/` · `report.html`
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbjax import normalize
from perturbjax.config import Recipe, recipe_from_dict, recipe_to_dict
from perturbjax.console import InputError
from perturbjax.dataset import INDEX, Dataset, open_dataset
from perturbjax.files import atomic, make_folder, read_json, write_json
from perturbjax.splits import fingerprint, read_split, split_for, write_split

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
        data: the dataset directory it was started on; None for a network imported without one.
        class_names: in the order of the logits.
        facts: what must not change between two parts of one run.
    """

    path: Path
    recipe: Recipe
    data: Path | None
    class_names: list[str]
    facts: dict[str, Any]

    @property
    def label_column(self) -> str:
        return self.facts["label_column"]

    def manifest(self, index: pd.DataFrame) -> pd.DataFrame:
        """The run's split, in the order of `index`; where it came without one, what its recipe deals."""
        if not (self.path / SPLIT_FILE).is_file():
            return split_for(index, self.recipe.split, label=self.label_column, seed=self.recipe.seed)
        return read_split(self.path / SPLIT_FILE, index)

    def parts(self, site_ids: pd.Series) -> np.ndarray:
        """The part that each site had in the run: train, test, or new where the run does not know it."""
        if not (self.path / SPLIT_FILE).is_file():
            return np.full(len(site_ids), "new", object)
        known = pd.read_parquet(self.path / SPLIT_FILE).set_index("site_id")["part"]
        return site_ids.map(known).fillna("new").to_numpy()

    def statistics_for(self, dataset: Dataset) -> normalize.Statistics:
        """What intensities of a dataset are normalised by: the statistics that the run was trained with.

        A line is printed where they are not enough (see `normalize.statistics_for`).
        """
        kept, own = self.facts.get("normalization"), self.facts.get("index_sha256")
        is_own = own is not None and own == dataset_facts(dataset)["index_sha256"]
        return normalize.statistics_for(dataset, self.recipe.input, kept, self.path, own=is_own)

    def open_data(self, path: Path | None = None) -> Dataset:
        """The dataset at `path`, or else the one the run was started on.

        Raises:
            InputError: there is neither, or it cannot be opened.
        """
        if path is None and self.data is None:
            raise InputError(f"--data: {self.path} was imported without a dataset; name one")
        return open_dataset(path or self.data)

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
    """The rows of a run's `metrics.jsonl`; a last line that was cut short is left out."""
    file = Path(path) / METRICS
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def dataset_facts(dataset: Dataset) -> dict[str, Any]:
    """What a dataset must share with a model that is applied to it, and what identifies it."""
    return {
        "channels": dataset.channel_names,
        "image_dtype": str(dataset.image_dtype),
        "image_size": list(dataset.image_size),
        "index_sha256": hashlib.sha256((dataset.path / INDEX).read_bytes()).hexdigest(),
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
        "normalization": normalize.fit(dataset, recipe.input),
    }
    if pretrained is not None:
        facts["pretrained"] = pretrained
    return Run(Path(path), recipe, dataset.path.absolute(), class_names, facts)


def start_run(run: Run, manifest: pd.DataFrame | None) -> None:
    """Make the directory of a run, or find there the one that the same recipe, data and split began before.

    Only an imported network may come without a split.

    Raises:
        InputError: the directory holds another run, or something that is no run.
    """
    path = run.path
    if (path / CONFIG).is_file():
        _require_same(open_run(path), run.recipe, run.facts)
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
            "data": None if run.data is None else str(run.data),
            "facts": run.facts,
            "versions": {name: version(name) for name in RECORDED_VERSIONS},
        },
    )


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
    if path.is_dir() and any(file.name != LOCK for file in path.iterdir()):
        raise InputError(f"{path}: is not empty and holds no run; choose another --out")


def open_run(path: Path) -> Run:
    """Open a run directory.

    Raises:
        InputError: it is missing or incomplete.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise InputError(f"{path}: holds no run ({CONFIG} is missing); make one with `perturbjax train --out {path}`")
    config = read_json(path / CONFIG)
    try:
        recipe, facts = recipe_from_dict(config["recipe"]), config["facts"]
        data = None if config["data"] is None else Path(config["data"])
        return Run(path, recipe, data, read_json(path / LABELS), facts)
    except KeyError as error:
        raise InputError(f"{path / CONFIG}: lacks {error}; it was not written by this program") from error


def _require_same(run: Run, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Refuse to go on with a run under another recipe, dataset or split."""
    before, now = recipe_to_dict(run.recipe), recipe_to_dict(recipe)
    old = {
        **{f"{s}.{k}": v for s, part in before.items() if isinstance(part, dict) for k, v in part.items()},
        **run.facts,
    }
    new = {**{f"{s}.{k}": v for s, part in now.items() if isinstance(part, dict) for k, v in part.items()}, **facts}
    old["seed"], new["seed"] = run.recipe.seed, recipe.seed
    if "normalization" not in old:  # begun before runs kept it; it follows from recipe and index, compared below
        new.pop("normalization", None)
    for name in new:
        if _plain(old.get(name)) != _plain(new[name]):
            raise InputError(
                f"{run.path}: already holds another run ({name} was {old.get(name)}, now {new[name]}); "
                "choose another --out, or give the same flags to go on with it"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

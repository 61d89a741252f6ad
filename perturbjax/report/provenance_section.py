"""Inputs and versions of a run, and the commands that reproduce it; without paths of a machine."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from perturbjax.core.config import Recipe
from perturbjax.core.files import read_json
from perturbjax.core.messages import html_text
from perturbjax.core.options import default_of, flag_name
from perturbjax.core.progress import clock
from perturbjax.core.recipe_files import recipe_from_dict
from perturbjax.dataset import PROVENANCE
from perturbjax.report.pages import table
from perturbjax.report.run_results import RunResults
from perturbjax.training.run_directory import dataset_paths


def provenance(results: RunResults) -> str:
    """Return run, recipe, dataset and versions as one folded table."""
    config = results.config
    rows: list[tuple[str, str, Any]] = [
        ("run", name, value) for name, value in config.get("facts", {}).items()
    ]
    for name, value in (config.get("begun") or {}).items():
        rows.append(("run", "commit" if name == "commit" else f"started {name}", value))
    training = (row for row in results.metrics if row["split"] == "train")
    seconds = sum(row.get("seconds") or 0 for row in training)
    if seconds:
        rows.append(("run", "time in training epochs", clock(seconds)))
    rows += [("versions", name, value) for name, value in config.get("versions", {}).items()]
    for section, values in (config.get("recipe") or {}).items():
        if isinstance(values, dict):
            rows += [(f"recipe: {section}", name, value) for name, value in values.items()]
        else:
            rows.append(("recipe", section, values))
    dataset = _dataset_provenance(config)
    rows += [("dataset", name, value) for name, value in dataset.items() if name != "files"]
    if not rows:
        return ""
    values = [(group, name, _text(value)) for group, name, value in rows]
    body = table(
        "provenance-table", pd.DataFrame(values, columns=["group", "name", "value"]), rows="entries"
    )
    return f"<details><summary>{len(rows)} entries</summary>{body}</details>"


def _dataset_provenance(config: dict[str, Any]) -> dict[str, Any]:
    files = [path / PROVENANCE for path in dataset_paths(config)] if config.get("data") else []
    value = read_json(files[0]) if files and files[0].is_file() else {}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """A value as text, with file names instead of absolute paths."""
    text = value if isinstance(value, str) else json.dumps(value)
    # Removes the folders of absolute paths. URLs stay unchanged, since a letter, colon or slash
    # precedes each of their slashes.
    return re.sub(r"(?<![\w:/])/(?:[^/\s\"',]+/)+", "", text)


def reproduce(results: RunResults) -> str:
    """Return the commands from load_data.csv to the evaluation, as far as the files record them."""
    config = results.config
    if "recipe" not in config:
        return ""
    run = results.path.resolve().name
    names = [path.name for path in dataset_paths(config)] if config.get("data") else []
    data = names[0] if names else "dataset"
    command = ["train", "--data", *(names or [data])]
    # Runs from PyTorch checkpoints are reproduced by import instead of training.
    imported = config.get("facts", {}).get("imported")
    if imported:
        file = Path(imported["file"]).name
        command = ["import-torch", "--preset", "paper", "--checkpoint", file]
        command += ["--labels", f"{run}/labels.json"]
    flags = recipe_flags(recipe_from_dict(config["recipe"]), f"{run}/config.json")
    commands = [
        _build(_dataset_provenance(config), data),
        shlex.join(["perturbjax", *command, "--out", run, *flags]),
    ]
    if results.evaluation is not None:
        commands.append(shlex.join(["perturbjax", "evaluate", "--run", run]))
    return f"<pre>{html_text(chr(10).join(filter(None, commands)))}</pre>"


def _build(provenance: dict[str, Any], data: str) -> str:
    """The command that built the dataset; empty if its provenance is incomplete."""
    source, segmenter = provenance.get("source"), provenance.get("segmenter")
    if not isinstance(source, dict) or not isinstance(segmenter, dict) or "engine" not in segmenter:
        return ""
    flags = ["--load-data", str(source.get("name")), "--images", "DIR", "--out", data]
    flags += ["--channels", ",".join(provenance.get("channels", []))]
    flags += ["--aggregate", str(provenance.get("aggregate"))]
    flags += ["--segmenter", str(segmenter["engine"])]
    if segmenter["engine"].startswith("cellpose") and segmenter.get("weights"):
        flags += ["--weights", Path(str(segmenter["weights"])).name]
    channels = segmenter.get("channels") or ["aggregate"]
    if channels != ["aggregate"]:
        flags += ["--segment-channels", ",".join(channels)]
    if isinstance(cells := segmenter.get("cells"), dict):
        flags += ["--cells-channel", str(cells.get("channel"))]
    diameter = (segmenter.get("parameters") or {}).get("diameter")
    if isinstance(diameter, int | float) and diameter:
        flags += ["--diameter", f"{diameter:g}"]
    elif diameter == "per-site":
        flags += ["--diameter", diameter]
    if provenance.get("resize"):
        flags += ["--resize", str(provenance["resize"])]
    flags += ["--label-column", str(provenance.get("label_column"))]
    return shlex.join(["perturbjax", "build", *flags])


def recipe_flags(recipe: Recipe, file: str) -> list[str]:
    """Return command line flags that turn the default recipe into this one.

    Args:
        recipe: recipe of a run.
        file: its `config.json`, used as `--recipe` if a field without a flag differs from its
            default.
    """
    flags: list[str] = []
    # The recipe has fields outside of its sections (the seed), so it is visited last.
    for section in (*vars(recipe).values(), recipe):
        for option in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            value = getattr(section, option.name)
            if dataclasses.is_dataclass(value) or value == default_of(option):
                continue
            # Only a file can set a field that has no flag.
            if not option.metadata.get("flag", True):
                return ["--recipe", file]
            flags += [
                flag_name(option.name),
                *map(str, value if isinstance(value, tuple) else (value,)),
            ]
    return flags

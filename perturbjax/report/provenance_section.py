"""What a run was made of, and the commands that make it again: names, never places on one machine."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from perturbjax.core.config import recipe_flags, recipe_from_dict
from perturbjax.core.files import read_json
from perturbjax.core.messages import html_text
from perturbjax.core.progress import clock
from perturbjax.dataset import PROVENANCE
from perturbjax.report.pages import table
from perturbjax.report.run_results import Evidence


def provenance(found: Evidence) -> str:
    """The run, its recipe, its data and its versions, as one table; empty where nothing is known."""
    config = found.config
    facts: list[tuple[str, str, Any]] = [
        ("run", name, value) for name, value in config.get("facts", {}).items()
    ]
    begun = config.get("begun") or {}
    facts += [
        ("run", "commit" if name == "commit" else f"begun {name}", value)
        for name, value in begun.items()
    ]
    if seconds := sum(row.get("seconds") or 0 for row in found.metrics if row["split"] == "train"):
        facts.append(("run", "time in training epochs", clock(seconds)))
    facts += [("versions", name, value) for name, value in config.get("versions", {}).items()]
    for section, values in (config.get("recipe") or {}).items():
        fields = values.items() if isinstance(values, dict) else [(section, values)]
        facts += [
            (f"recipe: {section}" if isinstance(values, dict) else "recipe", *field)
            for field in fields
        ]
    facts += [
        ("dataset", name, value)
        for name, value in _dataset_facts(config).items()
        if name != "files"
    ]
    if not facts:
        return ""
    rows = pd.DataFrame(
        [(kind, name, _text(value)) for kind, name, value in facts], columns=["of", "what", "value"]
    )
    return f"<details><summary>{len(rows)} facts</summary>{table('provenance-table', rows, rows='facts')}</details>"


def _dataset_facts(config: dict[str, Any]) -> dict[str, Any]:
    file = Path(config.get("data") or "") / PROVENANCE
    return read_json(file) if config.get("data") and file.is_file() else {}


def _text(value: Any) -> str:
    """A value in a line, without the places of files."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"(?<![\w:/])/(?:[^/\s\"',]+/)+", "", text)


def again(found: Evidence) -> str:
    """Commands from the CSV on, as far as the files say how it was done."""
    config = found.config
    if "recipe" not in config:
        return ""
    run, data = found.path.resolve().name, Path(config.get("data") or "dataset").name
    made = ["train", "--data", data]
    if imported := config.get("facts", {}).get("imported"):
        file = Path(imported["file"]).name
        made = [
            "import-torch",
            "--preset",
            "paper",
            "--checkpoint",
            file,
            "--labels",
            f"{run}/labels.json",
        ]
    commands = [_build(_dataset_facts(config), data)]
    flags = recipe_flags(recipe_from_dict(config["recipe"]), f"{run}/config.json")
    commands.append(shlex.join(["perturbjax", *made, "--out", run, *flags]))
    if found.evaluation is not None:
        commands.append(shlex.join(["perturbjax", "evaluate", "--run", run]))
    return f"<pre>{html_text(chr(10).join(filter(None, commands)))}</pre>"


def _build(facts: dict[str, Any], data: str) -> str:
    """The command that built a dataset like this one."""
    source, segmenter = facts.get("source"), facts.get("segmenter")
    if not isinstance(source, dict) or not isinstance(segmenter, dict) or "engine" not in segmenter:
        return ""
    flags = ["--load-data", str(source.get("name")), "--images", "DIR", "--out", data]
    flags += [
        "--channels",
        ",".join(facts.get("channels", [])),
        "--aggregate",
        str(facts.get("aggregate")),
    ]
    flags += ["--segmenter", str(segmenter["engine"])]
    if segmenter["engine"].startswith("cellpose") and segmenter.get("weights"):
        flags += ["--weights", Path(str(segmenter["weights"])).name]
    channels = segmenter.get("channels") or ["aggregate"]
    if channels != ["aggregate"]:
        flags += ["--segment-channels", ",".join(channels)]
    diameter = (segmenter.get("parameters") or {}).get("diameter")
    if isinstance(diameter, int | float) and diameter:
        flags += ["--diameter", f"{diameter:g}"]
    if facts.get("resize"):
        flags += ["--resize", str(facts["resize"])]
    flags += ["--label-column", str(facts.get("label_column"))]
    return shlex.join(["perturbjax", "build", *flags])

"""Run directories and datasets for tests of reports: files of `train` and `evaluate`, without
checkpoints.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from evaluation.conftest import CLASSES, evaluate_run, make_index, make_predictions

from perturbjax import dataset
from perturbjax.core.config import Recipe, SplitConfig
from perturbjax.core.recipe_files import recipe_to_dict
from perturbjax.evaluation.evaluation_result import to_json
from perturbjax.evaluation.retrieval import evaluate_retrieval

HOSTILE = '<script>alert("DMSO")</script>'


def make_run(path: Path, *, first_class: str = "DMSO", images: bool = False) -> dict[str, Any]:
    """Write a run and its dataset (PATH/data); return the content of its `scores.json`."""
    index = make_index()
    predictions = make_predictions(index, skill=1.5)
    test = index["Metadata_Plate"] == "P2"
    predictions["part"] = np.where(test, "test", "train")
    names = [first_class, *CLASSES[1:]]
    for table in (index, predictions):
        table["label"] = table["label"].replace("DMSO", first_class)
    predictions["predicted"] = predictions["predicted"].replace("DMSO", first_class)
    predictions = predictions.rename(columns={"prob_DMSO": f"prob_{first_class}"})
    folder = path / "evaluation"
    evaluation = evaluate_run(
        predictions, index[~test], index[test], class_names=names, out=folder, replicates=100
    )
    predictions.to_parquet(folder / "predictions.parquet", index=False)
    (path / "labels.json").write_text(json.dumps(names))
    facts = {"label_column": "Metadata_pert_iname", "split_fingerprint": "0123abcd"}
    config = {
        "recipe": recipe_to_dict(Recipe(split=SplitConfig(split="plate"), seed=3)),
        "data": str(path / "data"),
        "facts": facts,
        "versions": {"jax": "0.0.test"},
        "begun": {"at": "2026-01-02", "on": "Linux, 2 cores", "commit": "c0ffee"},
    }
    (path / "config.json").write_text(json.dumps(config))
    rows = [
        {
            "epoch": e,
            "step": 2 * e,
            "split": s,
            "loss": 2 / e,
            "accuracy": 1 - 1 / e,
            "learning_rate": 0.01 / e,
            "seconds": 2.0,
        }
        for e in range(1, 6)
        for s in ("train", "test")
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if images:
        write_images(path / "data", index)
        write_features(folder, index, test, names)
    return to_json(evaluation)


def write_images(
    path: Path, index: pd.DataFrame, side: int = 32, label_column: str = "Metadata_pert_iname"
) -> None:
    """Three channels of noise with a square cell in the middle of each site."""
    rng = np.random.default_rng(0)
    mask = np.zeros((side, side), np.uint16)
    mask[side // 4 : -side // 4, side // 4 : -side // 4] = 1
    sites = (
        dataset.SitePixels(rng.integers(100, 9000, (side, side, 3)).astype(np.uint16), mask)
        for _ in range(len(index))
    )
    columns = ["site_id", "Metadata_Plate", "Metadata_Well", "Metadata_Site"]
    table = index[columns].assign(Metadata_pert_iname=index["label"])
    dataset.write_dataset(
        path,
        table,
        sites,
        channel_names=["DNA", "ER", "Mito"],
        image_dtype=np.uint16,
        label_column=label_column,
        facts={
            "source": {"name": "load_data.csv"},
            "channels": ["DNA", "ER", "Mito"],
            "aggregate": "none",
            "segmenter": {
                "engine": "nuclei",
                "channels": ["DNA"],
                "parameters": {"diameter": 30.0},
            },
        },
    )


def write_features(folder: Path, index: pd.DataFrame, test: pd.Series, names: list[str]) -> None:
    """Write features with separated classes, and their retrieval."""
    rng = np.random.default_rng(1)
    values = 2 * np.eye(len(names), 9)[[names.index(name) for name in index["label"]]] + rng.normal(
        size=(len(index), 9)
    )
    metadata = index[["Metadata_Plate", "Metadata_Well", "Metadata_Site"]].assign(
        Metadata_pert_iname=index["label"],
        Metadata_site_id=index["site_id"],
        Metadata_part=np.where(test, "test", "train"),
    )
    table = pd.concat(
        [metadata, pd.DataFrame(values, columns=[f"f_{at}" for at in range(9)])], axis=1
    )
    table.to_parquet(folder / "features.parquet", index=False)
    evaluate_retrieval(table[test], folder, label_column="Metadata_pert_iname")


def check_page(page: Page, text: str) -> None:
    """Check rules of all pages that need no browser.

    Wide tables and charts can scroll, the page explains a click only if it does something, buttons
    name their file, and nouns agree with their numbers.
    """
    assert text.count("<table") == len(re.findall(r'<div class="(?:wide|tall)"[^>]*><table', text))
    for before, width in re.findall(r'(.{24})<svg viewBox="0 0 (\d+)', text):
        assert int(width) < 600 or 'chart" tabindex="0">' in before
    assert ("Click a picture to enlarge it" in page.text) == ("data-layers=" in text)
    assert all(button["data-name"] for button in page.all("button") if "data-csv" in button)
    assert len(re.findall(r"Save [^<]+\.csv</button>", text)) == text.count("data-csv=")
    nouns = "plates|wells|sites|classes|cells|treatments|features"
    assert not re.findall(rf"(?<![\d.,])1 (?:{nouns})\b", page.text)


class Page(HTMLParser):
    """What a page is made of: tags with their attributes, the text of scripts by their id, and
    all text.
    """

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text, self._script = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._script = (dict(attributes).get("id") or "code") if tag == "script" else ""

    def handle_data(self, text: str) -> None:
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + text
            return
        self.text += text

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = ""

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        """Attributes of every such tag with that class."""
        return [
            attributes
            for name, attributes in self.tags
            if name == tag and (not css or css in (attributes.get("class") or "").split())
        ]

    def data(self, name: str) -> dict[str, Any]:
        """A figure's data, as its CSV would be."""
        columns = json.loads(self.scripts[f"{name}-data"])
        return {
            column: [values["levels"][code] for code in values["codes"]]
            if isinstance(values, dict)
            else values
            for column, values in columns.items()
        }

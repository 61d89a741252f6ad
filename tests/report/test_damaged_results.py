"""Damaged files of an evaluation are one line that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.evaluation.attribution import read_maps
from perturbjax.report.class_section import read_confusion
from perturbjax.report.result_files import SCORE_TABLES
from perturbjax.report.run_results import read_run_results

from .screens import make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    make_run(path, images=True)
    return path


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def read_everything(run: Path) -> None:
    results = read_run_results(run)
    for name in SCORE_TABLES:
        results.csv(name)
    read_confusion(results)
    read_maps(results.folder, "attention")
    assert results.test is not None


DAMAGE = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "binary": lambda content: b"\xff\xfe\x00" + content,
    "other header": lambda content: b"a,b\n" + content,
    "short row": lambda content: content.rpartition(b",")[0],
    "words": lambda content: content.replace(b"0.", b"x."),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["per_class.csv", "confusion.csv", "retrieval_per_class.csv"])
def test_damaged_table_is_one_line(run, name, damage):
    read_everything(run)
    file = run / "evaluation" / name
    content = file.read_bytes()
    damaged = DAMAGE[damage](content)
    if damaged == content:
        pytest.skip("the table has no such cell")
    file.write_bytes(damaged)
    with pytest.raises(InputError, match=str(file)) as refused:
        read_everything(run)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["predictions.parquet", "features.parquet"])
def test_damaged_parquet_is_one_line(run, name):
    file = run / "evaluation" / name
    table = pd.read_parquet(file)
    for wrong in (
        table.drop(columns=[column for column in table if column.endswith("site_id")]),
        table.assign(**{table.columns[-1]: "text"}),
        table.iloc[:, :1],
    ):
        wrong.to_parquet(file)
        with pytest.raises(InputError, match=str(file)):
            read_everything(run)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError, match=str(file)):
        read_everything(run)


@pytest.mark.parametrize("value", [[], {"recipe": 3}, {"facts": []}, {"data": {"a": 1}}])
def test_config_of_another_type_is_one_line(run, value):
    (run / "config.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"config\.json: is not the config\.json of a run"):
        read_everything(run)


def test_scores_of_another_type_are_one_line(run):
    file = run / "evaluation/scores.json"
    text = file.read_text()
    for old, new in (('"value": 0', '"value": "x'), ('"levels": {', '"levels": [{')):
        assert old in text
        scores = text.replace(old, new, 1)
        file.write_text(scores)
        with pytest.raises(InputError, match=str(file)):
            read_everything(run)

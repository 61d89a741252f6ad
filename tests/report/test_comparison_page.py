"""The page that compares runs: order, same test sites, different settings and links."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from perturbjax import cli
from perturbjax.core.errors import InputError
from perturbjax.report.comparison_page import write_reports

from .screens import Page, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs of one split: the second with another seed and one score raised."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "first")
    shutil.copytree(folder / "first", folder / "second")
    scores = json.loads((folder / "second" / "evaluation" / "scores.json").read_text())
    scores["levels"]["site"]["model"]["balanced_accuracy"] = {
        "value": 0.875,
        "low": 0.8,
        "high": 0.95,
    }
    (folder / "second" / "evaluation" / "scores.json").write_text(json.dumps(scores))
    config = json.loads((folder / "second" / "config.json").read_text())
    config["recipe"]["seed"] = 4
    (folder / "second" / "config.json").write_text(json.dumps(config))
    return [folder / "first", folder / "second"]


@pytest.fixture(scope="module")
def page(runs) -> Page:
    return Page(write_reports(runs, runs[0].parent / "pages" / "comparison.html").read_text())


def test_best_run_comes_first_and_links_to_its_report(runs, page):
    assert (
        "Highest balanced accuracy of 2 runs: second with 0.88 (0.80 to 0.95) by site" in page.text
    )
    links = [link["href"] for link in page.all("a") if not link["href"].startswith("#")]
    assert links == ["../second/report.html", "../first/report.html"]
    assert all((run / "report.html").is_file() for run in runs)


def test_different_settings_are_listed_without_warning(page):
    assert "the same sites" not in page.text
    text = page.text[page.text.index("Different settings") :]
    assert "seed" in text and "learning_rate" not in text


def test_runs_with_different_test_sites_give_a_warning(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    file = other / "evaluation" / "predictions.parquet"
    table = pd.read_parquet(file)
    table[table["site_id"] != table["site_id"].iloc[-1]].to_parquet(file)
    text = write_reports([runs[0], other], tmp_path / "c.html").read_text()
    assert "not evaluated on the same sites" in text and "may only mean easier sites" in text


def test_classifiers_are_compared_in_their_folder(runs, tmp_path):
    for model in ("lda", "ridge"):
        shutil.copytree(runs[0] / "evaluation", tmp_path / "classified" / "evaluation" / model)
    out = write_reports([tmp_path / "classified"], tmp_path / "unused.html")
    assert out == tmp_path / "classified" / "report.html"
    page = Page(out.read_text())
    assert {"evaluation/lda/report.html", "evaluation/ridge/report.html"} <= {
        link["href"] for link in page.all("a")
    }
    assert (tmp_path / "classified" / "evaluation" / "lda" / "report.html").is_file()


def test_single_run_has_a_report_only(runs, tmp_path):
    assert write_reports(runs[:1], tmp_path / "c.html") == runs[0] / "report.html"
    assert not (tmp_path / "c.html").exists()


def test_repeated_or_unevaluated_run_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="first: is given twice"):
        write_reports([runs[0], runs[0]], tmp_path / "c.html")
    (tmp_path / "trained").mkdir()
    shutil.copy(runs[0] / "metrics.jsonl", tmp_path / "trained" / "metrics.jsonl")
    with pytest.raises(InputError, match="trained: was not evaluated"):
        write_reports([runs[0], tmp_path / "trained"], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_command_names_a_missing_run(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        cli.main(["report"])
    assert left.value.code == 2 and "report" in capsys.readouterr().err

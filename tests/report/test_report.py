"""The report says first whether it worked, holds every number and the cells, shows text as
text, and asks nobody.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.config import Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.report.overview_page import Overview
from perturbjax.report.provenance_section import recipe_flags
from perturbjax.report.run_page import write_report

from .screens import HOSTILE, Page, check_page, make_run

FIGURES = ("curves", "scores", "confusion", "recall", "calibration", "plates")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    result = make_run(path, first_class=HOSTILE, images=True)
    text = write_report(path).read_text()
    return path, result, text, Page(text)


def test_headline_and_facts_come_first(run):
    text = run[2]
    head = text[text.index("<body") : text.index("<nav")]
    assert '<p class="verdict">Balanced accuracy ' in head
    for name in ("Task", "Result", "Test set", "Reliability", "Classes", "Cells"):
        assert f"<dt>{name}</dt>" in head
    assert 'href="#gallery"' in head
    assert "<b>Next:</b> Train the recipe on every fold" in head
    name = run[0].name
    assert f"<code>perturbjax audit --run {name} --train --out {name}/audit</code>" in head


def test_scores_have_intervals_and_baselines(run):
    _, result, text, _ = run
    for level in ("site", "well"):
        for subject, scores in result["levels"][level].items():
            assert f">{subject}</td>" in text
            for metric, score in scores.items():
                if metric != "top5":  # not shown for eight classes
                    assert f"{score['value']:.3f} [{score['low']:.2f}, {score['high']:.2f}]" in text
    assert "top-5" not in text


def test_provenance_is_complete_and_commands_have_no_paths(run):
    path, _, text, page = run
    for fact in (
        "0123abcd",
        "0.0.test",
        "Metadata_pert_iname",
        "learning_rate",
        "content_sha256",
        "Linux, 2 cores",
        "c0ffee",
        "0:10",
    ):
        assert fact in page.text
    assert "--split plate" in text and "--seed 3" in text
    assert "perturbjax build --load-data load_data.csv --images DIR --out data" in page.text
    assert "--segmenter nuclei --segment-channels DNA --diameter 30" in page.text
    assert str(path.parent) not in text


def test_text_from_data_is_escaped(run):
    _, _, text, page = run
    assert "<script>alert" not in text
    assert HOSTILE in page.text, "shown unchanged"
    assert HOSTILE in page.data("confusion")["true"], "unchanged in the data"
    code = page.scripts["code"]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = next(
        one["content"]
        for one in page.all("meta")
        if one.get("http-equiv") == "Content-Security-Policy"
    )
    assert f"script-src 'sha256-{digest}'" in policy, "the browser runs no other script"


def test_report_loads_nothing_from_a_network(run):
    for tag, attributes in run[3].tags:
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), f"{tag} {name} {value[:60]}"


def test_page_follows_the_rules_of_all_pages(run):
    check_page(run[3], run[2])


def test_links_inside_the_page_have_targets(run):
    page = run[3]
    targets = {attributes["id"] for _, attributes in page.tags if attributes.get("id")}
    links = {link["href"][1:] for link in page.all("a")}
    assert links <= targets and len(links) > 10


def test_every_class_has_framed_pictures(run):
    _, result, _, page = run
    assert len(page.all("details", "class")) == result["n"]["test_classes"]
    shots = page.all("figure", "shot")
    assert any("right" in shot["class"].split() for shot in shots)
    assert any("wrong" in shot["class"].split() for shot in shots)
    for image in page.all("img"):
        assert image["src"].startswith("data:image/webp;base64,") and image["alt"].startswith(
            "cells of class "
        )


def test_drawings_have_descriptions(run):
    page = run[3]
    assert all(one["aria-label"] for one in page.all("svg"))
    assert all(one["data-label"] for one in page.all("div") if "data-widget" in one)


def test_data_of_every_figure_is_embedded(run):
    _, result, _, page = run
    matrix = page.data("confusion")
    assert sum(matrix["sites"]) == result["n"]["site"]
    plates = page.data("plates")
    assert len(plates["well"]) == 72 and set(plates["part"]) == {"train", "test"}
    assert plates["part"].count("test") == result["n"]["well"]
    assert all(0 <= value <= 1 for value in plates["probability of the true class"])
    points = page.data("embedding")
    assert (
        len(points["x"]) == 216 and max(points["picture"]) == 215 and np.isfinite(points["x"]).all()
    )
    assert sum(page.data("calibration")["sites"]) == result["n"]["site"]
    assert page.data("coverage")["fraction"][-1] == 1


def test_accuracy_of_the_confident_half_is_one_number(run):
    _, _, _, page = run
    (sentence,) = re.findall(r"more confident half of the sites: ([0-9.]+)%", page.text)
    curve = page.data("coverage")
    half = max(at for at, fraction in enumerate(curve["fraction"]) if fraction <= 0.5)
    assert f"{curve['accuracy'][half]:.1%}" == f"{sentence}%"
    labels = [one["aria-label"] for one in page.all("svg")]
    (label,) = [text for text in labels if "more confident half" in text]
    assert f"{float(sentence) / 100:.2f} of the more confident half" in label
    errors = re.findall(r"[Cc]alibration error ([0-9.]*[0-9])", page.text)
    assert len(errors) == 2 and len(set(errors)) == 1


def test_figures_are_written_as_png(run):
    for name in FIGURES:
        data = (run[0] / "evaluation" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and min(struct.unpack(">II", data[16:24])) > 200


def test_sections_without_files_are_left_out(tmp_path):
    make_run(tmp_path)
    for name in (
        "config.json",
        "labels.json",
        "metrics.jsonl",
        "evaluation/predictions.parquet",
        "evaluation/per_class.csv",
        "evaluation/confusion.csv",
    ):
        (tmp_path / name).unlink()
    page = write_report(tmp_path).read_text()
    assert 'id="scores"' in page and 'id="classes"' not in page and 'id="reproduce"' not in page


def test_missing_dataset_is_explained(tmp_path):
    make_run(tmp_path)
    page = Page(write_report(tmp_path).read_text())
    assert "No pictures: the dataset data was moved or changed" in page.text and not page.all("img")


def test_run_without_evaluation_shows_training_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"epoch": 1, "step": 4, "split": "train", "loss": 2.0, "accuracy": 0.5}\n'
    )
    page = write_report(tmp_path).read_text()
    assert "not evaluated yet" in page and 'id="curves"' in page


def test_classifier_folder_has_a_report(tmp_path):
    make_run(tmp_path / "once")
    (tmp_path / "many" / "predictions").mkdir(parents=True)
    (tmp_path / "many" / "evaluation").mkdir()
    ridge = (tmp_path / "once" / "evaluation").rename(tmp_path / "many" / "evaluation" / "ridge")
    (ridge / "predictions.parquet").rename(tmp_path / "many" / "predictions" / "ridge.parquet")
    page = Page(write_report(ridge).read_text())
    assert "balanced accuracy" in page.text and page.data("plates")["well"]


def test_overview_reads_the_verdict_of_a_network_or_a_classifier(tmp_path):
    make_run(tmp_path / "run")
    expected = Overview(tmp_path, (), {}).verdict
    assert "alanced accuracy" in expected
    (tmp_path / "run" / "evaluation").rename(tmp_path / "linear")
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "linear").rename(tmp_path / "run" / "evaluation" / "linear")
    assert Overview(tmp_path, (), {}).verdict == expected


def test_metadata_with_reserved_names_are_left_out(tmp_path):
    make_run(tmp_path)
    file = tmp_path / "evaluation" / "predictions.parquet"
    table = pd.read_parquet(file)
    table["Metadata_part"], table["Metadata_cells"] = table["part"], table["Metadata_Well"]
    table.to_parquet(file, index=False)
    page = Page(write_report(tmp_path).read_text())
    assert set(page.data("plates")["part"]) == {"train", "test"} and "cells" not in page.data(
        "plates"
    )


def test_folder_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="perturbjax evaluate"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_recipe_flags_list_differences_from_the_default():
    assert recipe_flags(Recipe(), "run/config.json") == []
    recipe = Recipe(split=SplitConfig(split="plate", fold=2), seed=1)
    flags = ["--split", "plate", "--fold", "2", "--seed", "1"]
    assert recipe_flags(recipe, "run/config.json") == flags


def test_headline_below_a_baseline_shows_no_advantage(tmp_path):
    make_run(tmp_path)
    file = tmp_path / "evaluation" / "scores.json"
    scores = json.loads(file.read_text())
    for level in scores["leads"].values():
        level["position"]["balanced_accuracy"] = {"value": -0.2, "low": -0.3, "high": -0.1}
    file.write_text(json.dumps(scores))
    assert "so image features show no advantage over it." in write_report(tmp_path).read_text()


def test_headline_of_an_audit_comes_first(tmp_path):
    make_run(tmp_path)
    (tmp_path / "audit").mkdir()
    file = tmp_path / "audit" / "audit.json"
    file.write_text(
        json.dumps(
            {
                "verdict": {
                    "headline": "No.",
                    "sentences": ["No effect.", "And <b> text."],
                    "advice": ["Image `A01` again."],
                }
            }
        )
    )
    text = write_report(tmp_path).read_text()
    assert '<p class="verdict">No.</p><p>No effect.</p><p>And &lt;b&gt; text.</p>' in text
    assert '<p class="next"><b>Next:</b> Image <code>A01</code> again.</p>' in text
    file.write_text("[]")
    with pytest.raises(InputError, match="is not an audit"):
        write_report(tmp_path)


def test_q_column_exists_only_with_p_values(tmp_path):
    make_run(tmp_path, images=True)
    file = tmp_path / "evaluation" / "retrieval_per_class.csv"
    rows = pd.read_csv(file)
    for q in (0.01, np.nan):
        rows.loc[rows["against"] == "controls", "q"] = q
        rows.to_csv(file, index=False)
        page = write_report(tmp_path).read_text()
        table = page[page.index('id="class-table"') :]
        table = table[: table.index("</table>")]
        assert (">q</button>" in table) == (q == 0.01) and "nan" not in table


def test_occlusion_maps_are_next_to_their_cells(tmp_path):
    make_run(tmp_path, images=True)
    test_sites = pd.read_parquet(tmp_path / "evaluation" / "predictions.parquet").query(
        "part == 'test'"
    )
    sites = test_sites["site_id"].tolist()[:3]
    maps = pd.DataFrame({"site_id": sites, "height": 2, "width": 2})
    maps["occlusion"] = [[0.0, -0.1, 0.2, 0.4]] * 3
    maps.to_parquet(tmp_path / "evaluation" / "occlusion.parquet")
    numbers = {"largest": 0.4, "on_cells": 0.75, "cells": 0.5}
    (tmp_path / "evaluation" / "looked.json").write_text(
        json.dumps({"sites": 3, "occlusion": numbers})
    )
    text = write_report(tmp_path).read_text()
    assert (
        "lowers the predicted probability by <b>0.40</b>" in text
        and "<b>75%</b> of the total loss" in text
    )
    assert "loss of probability when hidden, from -0.10 to 0.40" in text
    assert '<p class="legend">loss of probability 0<span class="ramp"></span>0.40' in text

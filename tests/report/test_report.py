"""The report says first whether it worked, holds every number and the cells, shows text as text, and asks nobody."""

from __future__ import annotations

import base64
import hashlib
import json
import struct

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.config import Recipe, SplitConfig, recipe_flags
from perturbjax.core.errors import InputError
from perturbjax.report.run_page import write_report

from .screens import HOSTILE, Page, make_run

FIGURES = ("curves", "scores", "confusion", "recall", "calibration", "plates")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    result = make_run(path, first_class=HOSTILE, images=True)
    text = write_report(path).read_text()
    return path, result, text, Page(text)


def test_the_verdict_and_the_five_answers_come_first(run):
    text = run[2]
    head = text[text.index("<body") : text.index("<nav")]
    assert '<p class="verdict">Balanced accuracy ' in head
    for question in ("Did it work?", "On what?", "Can I trust it?", "Which classes?", "Show me"):
        assert f"<dt>{question}</dt>" in head
    assert 'href="#gallery"' in head
    assert "<b>Next:</b> Compare with the technical controls" in head
    assert f"<code>perturbjax audit --run {run[0].name} --out {run[0].name}/audit</code>" in head


def test_every_score_stands_with_its_interval_beside_the_baselines(run):
    _, result, text, _ = run
    for level in ("site", "well"):
        for subject, scores in result["levels"][level].items():
            assert f">{subject}</td>" in text
            for metric, found in scores.items():
                if metric != "top5":  # of eight classes it says nothing
                    assert f"{found['value']:.3f} [{found['low']:.2f}, {found['high']:.2f}]" in text
    assert "top-5" not in text


def test_provenance_is_whole_and_the_same_again_names_no_place(run):
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


def test_text_from_the_data_is_shown_and_never_run(run):
    _, _, text, page = run
    assert "<script>alert" not in text
    assert HOSTILE in page.text, "shown as it is"
    assert HOSTILE in page.data("confusion")["true"], "and whole in the data"
    code = page.scripts["code"]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = next(
        one["content"]
        for one in page.all("meta")
        if one.get("http-equiv") == "Content-Security-Policy"
    )
    assert f"script-src 'sha256-{digest}'" in policy, "the browser runs no script but ours"


def test_the_report_asks_nothing_of_a_network(run):
    for tag, attributes in run[3].tags:
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), f"{tag} {name} {value[:60]}"


def test_links_inside_the_page_lead_somewhere(run):
    page = run[3]
    there = {found["id"] for _, found in page.tags if found.get("id")}
    links = {link["href"][1:] for link in page.all("a")}
    assert links <= there and len(links) > 10


def test_every_class_has_its_cells_framed_by_right_and_wrong(run):
    _, result, _, page = run
    assert len(page.all("details", "class")) == result["n"]["test_classes"]
    shots = page.all("figure", "shot")
    assert any("right" in shot["class"].split() for shot in shots)
    assert any("wrong" in shot["class"].split() for shot in shots)
    for image in page.all("img"):
        assert image["src"].startswith("data:image/webp;base64,") and image["alt"].startswith(
            "cells given "
        )


def test_every_drawing_says_in_words_what_is_seen(run):
    page = run[3]
    assert all(one["aria-label"] for one in page.all("svg"))
    assert all(one["data-label"] for one in page.all("div") if "data-widget" in one)


def test_the_data_of_every_figure_is_in_the_page(run):
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
    assert page.data("coverage")["answered"][-1] == 1


def test_figures_are_also_files(run):
    for name in FIGURES:
        data = (run[0] / "evaluation" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and min(struct.unpack(">II", data[16:24])) > 200


def test_the_report_does_without_what_is_missing(tmp_path):
    make_run(tmp_path)
    for name in ("config.json", "labels.json", "metrics.jsonl", "evaluation/predictions.parquet",
                 "evaluation/per_class.csv", "evaluation/confusion.csv"):  # fmt: skip
        (tmp_path / name).unlink()
    page = write_report(tmp_path).read_text()
    assert 'id="scores"' in page and 'id="classes"' not in page and 'id="again"' not in page


def test_without_its_dataset_a_report_says_why_it_shows_no_cells(tmp_path):
    make_run(tmp_path)
    page = Page(write_report(tmp_path).read_text())
    assert "No pictures: the dataset data is not where it was" in page.text and not page.all("img")


def test_a_run_that_was_only_trained_shows_its_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"epoch": 1, "step": 4, "split": "train", "loss": 2.0, "accuracy": 0.5}\n'
    )
    page = write_report(tmp_path).read_text()
    assert "not evaluated yet" in page and 'id="curves"' in page


def test_one_of_several_evaluated_models_is_reported_from_its_own_folder(tmp_path):
    make_run(tmp_path / "once")
    (tmp_path / "many" / "predictions").mkdir(parents=True)
    (tmp_path / "many" / "evaluation").mkdir()
    ridge = (tmp_path / "once" / "evaluation").rename(tmp_path / "many" / "evaluation" / "ridge")
    (ridge / "predictions.parquet").rename(tmp_path / "many" / "predictions" / "ridge.parquet")
    page = Page(write_report(ridge).read_text())
    assert "balanced accuracy" in page.text and page.data("plates")["well"]


def test_metadata_that_are_called_as_what_the_maps_say_do_not_stand_for_it(tmp_path):
    make_run(tmp_path)
    file = tmp_path / "evaluation" / "predictions.parquet"
    table = pd.read_parquet(file)
    table["Metadata_part"], table["Metadata_cells"] = table["part"], table["Metadata_Well"]
    table.to_parquet(file, index=False)
    page = Page(write_report(tmp_path).read_text())
    assert set(page.data("plates")["part"]) == {"train", "test"} and "cells" not in page.data(
        "plates"
    )


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="perturbjax evaluate"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_flags_name_exactly_what_differs_from_the_default_recipe():
    assert recipe_flags(Recipe(), "run/config.json") == []
    recipe = Recipe(split=SplitConfig(split="plate", fold=2), seed=1)
    assert recipe_flags(recipe, "run/config.json") == [
        "--seed",
        "1",
        "--split",
        "plate",
        "--fold",
        "2",
    ]


def test_a_verdict_below_a_baseline_is_no(tmp_path):
    make_run(tmp_path)
    file = tmp_path / "evaluation" / "scores.json"
    scores = json.loads(file.read_text())
    for level in scores["leads"].values():
        level["position"]["balanced_accuracy"] = {"value": -0.2, "low": -0.3, "high": -0.1}
    file.write_text(json.dumps(scores))
    assert "so image features show no advantage over it." in write_report(tmp_path).read_text()


def test_the_verdict_of_an_audit_of_the_run_stands_on_top(tmp_path):
    make_run(tmp_path)
    (tmp_path / "audit").mkdir()
    file = tmp_path / "audit" / "audit.json"
    file.write_text(
        json.dumps(
            {
                "verdict": {
                    "headline": "No.",
                    "sentences": ["Nothing is there.", "And <b> no more."],
                    "advice": ["Image `A01` again."],
                }
            }
        )
    )
    text = write_report(tmp_path).read_text()
    assert '<p class="verdict">No.</p><p>Nothing is there.</p><p>And &lt;b&gt; no more.</p>' in text
    assert '<p class="next"><b>Next:</b> Image <code>A01</code> again.</p>' in text
    file.write_text("[]")
    with pytest.raises(InputError, match="is no audit"):
        write_report(tmp_path)


def test_false_alarms_have_a_column_only_where_a_p_can_be_had(tmp_path):
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


def test_what_is_lost_where_a_site_is_hidden_stands_beside_its_cells(tmp_path):
    make_run(tmp_path, images=True)
    judged = pd.read_parquet(tmp_path / "evaluation" / "predictions.parquet").query(
        "part == 'test'"
    )
    sites = judged["site_id"].tolist()[:3]
    maps = pd.DataFrame({"site_id": sites, "height": 2, "width": 2})
    maps["occlusion"] = [[0.0, -0.1, 0.2, 0.4]] * 3
    maps.to_parquet(tmp_path / "evaluation" / "occlusion.parquet")
    told = {"largest": 0.4, "on_cells": 0.75, "cells": 0.5}
    (tmp_path / "evaluation" / "looked.json").write_text(
        json.dumps({"sites": 3, "occlusion": told})
    )
    text = write_report(tmp_path).read_text()
    assert (
        "<b>0.40</b> of the probability of its answer" in text
        and "<b>75%</b> of all that is lost" in text
    )
    assert "what is lost where it is hidden, from -0.10 to 0.40" in text
    assert '<p class="legend">lost 0<span class="ramp"></span>0.40' in text

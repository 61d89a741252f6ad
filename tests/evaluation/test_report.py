"""The report holds the numbers, shows text as text, and does with what there is; figures are real PNGs."""

from __future__ import annotations

import json
import struct

import numpy as np
import pandas as pd
import pytest

from perturbjax.config import Recipe, SplitConfig, recipe_to_dict
from perturbjax.console import InputError
from perturbjax.evaluation import figures
from perturbjax.evaluation.judgement import to_json
from perturbjax.evaluation.report import recipe_flags, write_report
from perturbjax.evaluation.scores import per_class

from .conftest import CLASSES, judge_run, make_index, make_predictions

HOSTILE = '<script>alert("DMSO")</script>'


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def make_run(path, *, first_class: str = "DMSO"):
    """A run directory as `train` and `evaluate` leave it, without checkpoints."""
    index = make_index()
    predictions = make_predictions(index, skill=1.5)
    test = index["Metadata_Plate"] == "P2"
    predictions["part"] = np.where(test, "test", "train")
    names = [first_class, *CLASSES[1:]]
    for table in (index, predictions):
        table["label"] = table["label"].replace("DMSO", first_class)
    predictions = predictions.rename(columns={"prob_DMSO": f"prob_{first_class}"})
    evaluation = path / "evaluation"
    judgement = judge_run(predictions, index[~test], index[test], class_names=names, out=evaluation, replicates=100)
    predictions.to_parquet(evaluation / "predictions.parquet", index=False)
    (path / "labels.json").write_text(json.dumps(names))
    facts = {"label_column": "Metadata_pert_iname", "split_fingerprint": "0123abcd"}
    config = {"recipe": recipe_to_dict(Recipe(split=SplitConfig(split="plate"), seed=3)), "data": str(path / "data"),
              "facts": facts, "versions": {"jax": "0.0.test"}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    rows = [{"epoch": e, "step": 2 * e, "split": s, "loss": 2 / e, "accuracy": 1 - 1 / e, "learning_rate": 0.01 / e}
            for e in range(1, 6) for s in ("train", "test")]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to_json(judgement)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    result = make_run(path, first_class=HOSTILE)
    write_report(path)
    return path, result, (path / "report.html").read_text()


def test_the_report_holds_scores_intervals_baselines_and_provenance(run):
    path, result, page = run
    for level in ("site", "well"):
        for subject, scores in result["levels"][level].items():
            for found in scores.values():
                assert f"{found['value']:.3f} <small>[{found['low']:.2f}, {found['high']:.2f}]</small>" in page
            assert f"<td>{subject}</td>" in page
    for text in ("Metadata_pert_iname", "0123abcd", "0.0.test", "--split plate", "--seed 3", f"--run {path}"):
        assert text in page
    for name, found in result["train"].items():
        assert f"<td>{found:.3f}</td>" in page, name


def test_text_from_the_data_is_shown_and_never_run(run):
    page = run[2]
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;DMSO&quot;)&lt;/script&gt;" in page


def test_the_report_is_one_file_with_every_figure_inside(run):
    page = run[2]
    for name in ("curves", "scores", "confusion", "recall", "calibration", "plates"):
        assert f'<img alt="{name}" src="data:image/png;base64,' in page
        assert min(png_size(run[0] / "evaluation" / f"{name}.png")) > 200
    assert "http" not in page.replace("http-equiv", "")


def test_the_report_does_without_what_is_missing(tmp_path):
    make_run(tmp_path)
    for name in ("config.json", "labels.json", "metrics.jsonl", "evaluation/predictions.parquet",
                 "evaluation/per_class.csv", "evaluation/confusion.csv"):  # fmt: skip
        (tmp_path / name).unlink()
    page = write_report(tmp_path).read_text()
    assert "Scores" in page and "By class" not in page and "The same again" not in page


def test_a_run_that_was_only_trained_shows_its_curves(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 4, "split": "train", "loss": 2.0, "accuracy": 0.5}\n')
    page = write_report(tmp_path).read_text()
    assert "not evaluated yet" in page and 'alt="curves"' in page


def test_one_of_several_evaluated_models_is_reported_from_its_own_folder(tmp_path):
    make_run(tmp_path / "once")
    (tmp_path / "many" / "predictions").mkdir(parents=True)
    (tmp_path / "many" / "evaluation").mkdir()
    ridge = (tmp_path / "once" / "evaluation").rename(tmp_path / "many" / "evaluation" / "ridge")
    (ridge / "predictions.parquet").rename(tmp_path / "many" / "predictions" / "ridge.parquet")
    page = write_report(ridge).read_text()
    assert "Balanced accuracy by well" in page and 'alt="plates"' in page
    with pytest.raises(InputError, match=r"several evaluated models; choose one, as --run .*ridge"):
        write_report(tmp_path / "many")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="perturbjax evaluate"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_flags_name_exactly_what_differs_from_the_default_recipe():
    assert recipe_flags(Recipe()) == []
    recipe = Recipe(split=SplitConfig(split="plate", fold=2), seed=1)
    assert recipe_flags(recipe) == ["--seed", "1", "--split", "plate", "--fold", "2"]


def test_curves_need_something_to_draw(tmp_path):
    with pytest.raises(InputError, match="no epoch"):
        figures.plot_curves([{"epoch": 1, "split": "train"}], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_figures_grow_with_the_classes_but_stay_on_a_screen(tmp_path):
    rng = np.random.default_rng(0)
    for classes in (3, 13, 300):
        names = [f"a compound with a long name {i}" for i in range(classes)]
        labels, probabilities = rng.integers(classes, size=900), rng.dirichlet(np.ones(classes), size=900)
        matrix = np.zeros((classes, classes), dtype=int)
        np.add.at(matrix, (labels, probabilities.argmax(axis=1)), 1)
        table = per_class(labels, probabilities, np.arange(900) // 3, names)
        for path in (
            figures.plot_confusion(matrix, names, tmp_path / "confusion.png"),
            figures.plot_recall(table, tmp_path / "recall.png"),
        ):
            assert min(png_size(path)) > 200 and max(png_size(path)) < 3000


def test_a_plate_map_needs_wells_named_as_on_a_plate(tmp_path):
    index = pd.DataFrame({"Metadata_Plate": ["P"], "Metadata_Well": ["well 7"]})
    with pytest.raises(InputError, match="not named like A01"):
        figures.plot_plates(index, np.array([0]), np.ones((1, 1)), tmp_path / "plates.png")

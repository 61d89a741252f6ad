"""`perturbjax run`: order of the steps, resuming, skipped steps, and the whole workflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.simulate import SimulateConfig, simulate
from perturbjax.cli import workflow
from perturbjax.cli.workflow import WorkflowConfig, run_workflow
from perturbjax.core.errors import InputError


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Names of the commands that ran. A command writes its outputs; `hits` is refused."""
    ran: list[str] = []

    def run_step(step):
        ran.append(step.name)
        if step.name == "hits":
            raise InputError("no well is a negative control")
        for output in step.outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(step.command)

    class Overview:
        def __init__(self, folder: Path, commands: tuple[str, ...], skipped: dict[str, str]):
            self.skipped = skipped

        def sentences(self):
            return [f"skipped {name}: {why}" for name, why in self.skipped.items()]

    monkeypatch.setattr(workflow, "_run_step", run_step)
    monkeypatch.setattr(workflow, "_build_words", lambda options: ("--images", "images"))
    monkeypatch.setattr(workflow, "Overview", Overview)
    monkeypatch.setattr(workflow, "write_overview", lambda overview: tmp_path / "index.html")
    return ran


def options(tmp_path, **values):
    table = tmp_path / "load_data.csv"
    if not table.is_file():
        table.write_text("Metadata_Plate\nP1\n")
    return WorkflowConfig(images="images", load_data=table, out=tmp_path / "out", **values)


def test_repeated_run_skips_finished_steps_and_repeats_refused_ones(tmp_path, commands, capsys):
    run_workflow(options(tmp_path))
    assert commands == ["inspect", "build", "train", "evaluate", "hits", "audit"]
    assert "skipped hits: no well is a negative control" in capsys.readouterr().out
    commands.clear()
    run_workflow(options(tmp_path))
    assert commands == ["build", "hits"]


def test_changed_output_repeats_its_step_and_later_ones(tmp_path, commands):
    run_workflow(options(tmp_path))
    commands.clear()
    (tmp_path / "out/run/metrics.jsonl").write_text("trained again")
    run_workflow(options(tmp_path))
    assert commands == ["build", "train", "hits"]
    commands.clear()
    (tmp_path / "out/dataset/provenance.json").unlink()
    (tmp_path / "load_data.csv").write_text("Metadata_Plate\nP2\n")
    run_workflow(options(tmp_path))
    assert commands[:2] == ["inspect", "build"]


def test_linear_preset_fits_a_classifier_in_place_of_a_network(tmp_path, commands):
    run_workflow(options(tmp_path, preset="linear"))
    assert commands == ["inspect", "build", "classify", "report", "hits", "audit"]


@pytest.mark.slow  # trains a network on features of 96 sites
def test_demo_ends_with_a_lead_over_every_baseline(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PERTURBJAX_FEATURE_CACHE", str(tmp_path / "cache"))
    plates, out = tmp_path / "plates", tmp_path / "results"
    simulate(SimulateConfig(plates, plates=2, wells=72, sites=1, design="screen", effect=3.0))
    capsys.readouterr()
    run_workflow(
        WorkflowConfig(images=plates, load_data=plates / "load_data.csv", out=out, preset="demo")
    )
    lines = capsys.readouterr().out.splitlines()[-5:]
    scores = json.loads((out / "run/evaluation/scores.json").read_text())
    assert scores["split"] == "well"
    assert all(lead["balanced_accuracy"]["low"] > 0 for lead in scores["leads"]["well"].values())
    assert "no difference was found for inactive" in lines[2] and "toxic" in lines[2]
    page = (out / "index.html").read_text()
    for name in ("dataset/preview.html", "run/report.html", "hits/hits.csv", "audit/audit.html"):
        assert f'href="{name}"' in page and (out / name).is_file()

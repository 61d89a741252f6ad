"""The notebooks of the documentation run from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest
from notebooks import execute

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs/notebooks"


def output_text(cells) -> str:
    """All output of the code cells as text."""
    outputs = [
        output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]
    ]
    parts = (o.get("text", o.get("data", {}).get("text/plain", "")) for o in outputs)
    return "".join("".join(part) for part in parts)


@pytest.mark.slow
def test_notebook_from_a_plate_to_a_result_runs(tmp_path):
    text = output_text(execute(NOTEBOOKS / "from_a_plate_to_a_result.ipynb", tmp_path))
    assert "9 classes of Metadata_pert_iname" in text and "best baseline" in text


@pytest.mark.shared
@pytest.mark.slow
def test_notebook_evaluating_profiles_runs(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILES", str(shared / "data/cpjump1_profiles"))
    text = output_text(execute(NOTEBOOKS / "evaluating_profiles.ipynb", tmp_path))
    assert "303 classes" in text and "position" in text


@pytest.mark.shared
@pytest.mark.slow
def test_notebook_dose_response_runs(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("ORGANOIDS", str(shared / "data/organoid_doses"))
    text = output_text(execute(NOTEBOOKS / "dose_response.ipynb", tmp_path))
    assert "3 of 4 treatments respond" in text and "64 wells" in text


@pytest.mark.shared
@pytest.mark.slow
def test_notebook_from_images_to_hits_runs(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("SIRNA", str(shared / "data/sirna_plate"))
    text = output_text(execute(NOTEBOOKS / "from_images_to_hits.ipynb", tmp_path))
    assert "of 16 treatments are active" in text

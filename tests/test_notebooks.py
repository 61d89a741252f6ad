"""The notebooks run from top to bottom, and what they show is what a reader is promised."""

from __future__ import annotations

from pathlib import Path

import pytest
from notebooks import execute

NOTEBOOKS = Path(__file__).resolve().parents[1] / "docs/notebooks"


def shown(cells):
    """All that was shown, as text."""
    outputs = [
        output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]
    ]
    return "".join(
        "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        for output in outputs
    )


@pytest.mark.slow
def test_from_a_simulated_plate_to_a_verdict(tmp_path):
    text = shown(execute(NOTEBOOKS / "from_a_plate_to_a_verdict.ipynb", tmp_path))
    assert "4 classes of Metadata_pert_iname" in text and "lead over the best baseline" in text


@pytest.mark.shared
@pytest.mark.slow
def test_judging_cellprofiler_profiles(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("PROFILES", str(shared / "data/cpjump1_profiles"))
    text = shown(execute(NOTEBOOKS / "judging_profiles.ipynb", tmp_path))
    assert "303 classes" in text and "position" in text

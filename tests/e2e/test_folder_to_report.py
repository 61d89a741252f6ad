"""From a folder of images without a table to a report, by the script of the documentation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples/folder_to_report.sh"
#: Short trainings; the script has the defaults.
FLAGS = {
    "BUILD": "--segmenter watershed --resize 64 --workers 1",
    "TRAIN": "--preset paper --crop 16 --batch-size 16 --epochs 2 --split well --folds 3",
}


def run_script(environment: dict[str, str], *arguments: object) -> str:
    """Run the script with the `perturbjax` of this Python; return its standard output."""
    folders = [str(Path(sys.executable).parent), environment["PATH"]]
    path = {"PATH": os.pathsep.join(folders), "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        env={**environment, **FLAGS, **path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


# Five processes, each of which imports its libraries: about a minute of processor time.
@pytest.mark.slow
def test_script_leads_from_simulated_images_to_a_report(environment, plates, tmp_path):
    table = pd.read_csv(plates / "load_data.csv", dtype=str)
    wells = table.drop_duplicates(["Metadata_Plate", "Metadata_Well"])
    columns = {"Metadata_Plate": "Plate", "Metadata_Well": "Well", "Metadata_pert_iname": "Drug"}
    wells[list(columns)].rename(columns=columns).to_csv(tmp_path / "map.csv", index=False)
    images = shutil.copytree(plates / "images", tmp_path / "images")
    pattern = "{plate}_{well}_s{site}_{channel}.tiff"
    printed = run_script(environment, images, tmp_path / "map.csv", tmp_path / "out", pattern)
    assert "4 negative control wells (DMSO)" in printed
    report = (tmp_path / "out/run/report.html").read_text()
    assert "balanced accuracy" in report.lower() and "compound-01" in report


@pytest.mark.slow
@pytest.mark.shared
def test_script_leads_from_real_images_to_a_report(environment, shared, tmp_path):
    """A technical example: the labels are odd and even columns, not treatments."""
    images = tmp_path / "images"
    images.mkdir()
    for path in (shared / "data/sbs_transfluor").glob("*f0[01]d2.TIF"):
        shutil.copy(path, images)
    rows = [f"O{n:02d},{'even' if n % 2 == 0 else 'odd'} column" for n in range(1, 25)]
    (tmp_path / "map.csv").write_text("\n".join(["well,treatment", *rows]))
    printed = run_script(environment, images, tmp_path / "map.csv", tmp_path / "out")
    assert "ArrayScan or CellInsight (Cellomics), 48 images" in printed
    assert "no negative control wells" in printed
    assert "odd column" in (tmp_path / "out/run/report.html").read_text()

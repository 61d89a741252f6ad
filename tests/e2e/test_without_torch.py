"""Tests that `build --segmenter cellpose` works without the packages torch and cellpose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from perturbjax.dataset import open_dataset

#: A `sitecustomize` that blocks imports in all Python processes with its folder in PYTHONPATH.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "cellpose"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


def build_without_torch(tmp_path: Path, *arguments: object) -> str:
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "block"), root])}
    probe = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True
    )
    assert "torch is blocked" in probe.stderr
    command = [sys.executable, "-m", "data_prep", "build", *arguments]
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.shared
def test_build_of_single_cells_without_torch(shared, tmp_path):
    data = shared / "data/bbbc021_cells"
    table = pd.read_csv(data / "load_data.csv", dtype=str, keep_default_na=False)
    table[::200].to_csv(tmp_path / "load_data.csv", index=False)
    weights = shared / "data/weights/nuclei_dsb2018"
    stderr = build_without_torch(
        tmp_path,
        *(
            "--load-data",
            tmp_path / "load_data.csv",
            "--images",
            data,
            "--out",
            tmp_path / "dataset",
        ),
        *(
            "--segmenter",
            "cellpose",
            "--weights",
            weights,
            "--segment-channels",
            "DNA",
            "--diameter",
            45,
        ),
    )
    assert "info: time spent in segmentation" in stderr
    dataset = open_dataset(tmp_path / "dataset")
    assert len(dataset) == len(table[::200])
    facts = json.loads((tmp_path / "dataset/provenance.json").read_text())["segmenter"]
    assert (facts["engine"], facts["weights"], facts["precision"]) == (
        "cellpose",
        "nuclei_dsb2018",
        "float32",
    )


@pytest.mark.slow
@pytest.mark.shared
def test_build_of_field_of_view_without_torch(shared, tmp_path):
    """The cellpose package segments the same 306 nuclei."""
    row = {"FileName_OrigDNA": "r01c02f01p01-ch4sk1fk1fl1.tiff", "PathName_OrigDNA": "."}
    row |= {
        "Metadata_Plate": "P",
        "Metadata_Well": "A02",
        "Metadata_Site": "1",
        "Metadata_pert_iname": "DMSO",
    }
    pd.DataFrame([row]).to_csv(tmp_path / "load_data.csv", index=False)
    build_without_torch(
        tmp_path,
        *("--load-data", tmp_path / "load_data.csv", "--images", shared / "data/jump_fov"),
        *("--out", tmp_path / "dataset", "--segmenter", "cellpose"),
        *("--weights", shared / "data/weights/nuclei_dsb2018"),
    )
    assert json.loads((tmp_path / "dataset/provenance.json").read_text())["n_cells"] == 306

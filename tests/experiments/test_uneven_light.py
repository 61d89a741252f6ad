"""The experiment on illumination correction, on a third of the images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from experiments.illumination import Config, run

SHARED = Path(os.environ.get("PERTURBJAX_SHARED", "nowhere")) / "data" / "sbs_transfluor"


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the images of SBS Transfluor")
def test_run_makes_the_illumination_of_real_images_more_uniform(tmp_path):
    (tmp_path / "images").mkdir()
    for path in sorted(SHARED.glob("*.TIF"))[::3]:
        shutil.copy(path, tmp_path / "images")
    ratios = run(Config(tmp_path / "images", tmp_path / "out"))
    assert len(ratios) == 24 and ratios["before"].median() < 0.65
    assert ratios["after"].median() > 0.85 and ratios["after, other half"].median() > 0.85
    assert (tmp_path / "out" / "ratios.png").stat().st_size > 10_000

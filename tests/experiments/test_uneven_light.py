"""The experiment on uneven light, on images of which a few stand for all."""

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
def test_the_light_of_real_images_is_more_even_after_than_before(tmp_path):
    (tmp_path / "images").mkdir()
    for path in sorted(SHARED.glob("*.TIF"))[::3]:
        shutil.copy(path, tmp_path / "images")
    ratios = run(Config(tmp_path / "images", tmp_path / "out"))
    assert len(ratios) == 24 and ratios["before"].median() < 0.65
    assert ratios["after"].median() > 0.85 and ratios["after, by the other half"].median() > 0.85
    assert (tmp_path / "out" / "ratios.png").stat().st_size > 10_000

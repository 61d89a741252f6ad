"""Figures are PNG files of moderate size."""

from __future__ import annotations

import struct

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.errors import InputError
from perturbjax.evaluation import figures
from perturbjax.evaluation.scores import per_class


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_figure_size_is_bounded(tmp_path):
    rng = np.random.default_rng(0)
    for classes in (3, 13, 300):
        names = [f"a compound with a long name {i}" for i in range(classes)]
        labels, probabilities = (
            rng.integers(classes, size=900),
            rng.dirichlet(np.ones(classes), size=900),
        )
        matrix = np.zeros((classes, classes), dtype=int)
        np.add.at(matrix, (labels, probabilities.argmax(axis=1)), 1)
        table = per_class(labels, probabilities, np.arange(900) // 3, names)
        for path in (
            figures.plot_confusion(matrix, names, tmp_path / "confusion.png"),
            figures.plot_recall(table, tmp_path / "recall.png"),
        ):
            assert min(png_size(path)) > 200 and max(png_size(path)) < 3000
            assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_plot_plates_requires_well_names(tmp_path):
    index = pd.DataFrame({"Metadata_Plate": ["P"], "Metadata_Well": ["well 7"]})
    with pytest.raises(InputError, match="not named like A01"):
        figures.plot_plates(index, np.array([0]), np.ones((1, 1)), tmp_path / "plates.png")

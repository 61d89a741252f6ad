"""The benchmark of features per cell, on small fields."""

from __future__ import annotations

import pytest

from experiments.bench import cells
from perturbjax.dataset import open_dataset


def test_fields_have_the_stated_number_of_complete_cells(tmp_path):
    dataset = open_dataset(cells.write_fields(tmp_path / "data", sites=1, size=270, cells=9))
    assert dataset.index["n_cells"].tolist() == [9] and len(dataset.channel_names) == 5
    mask = dataset.pixels(0)[1]
    assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()


@pytest.mark.slow
def test_run_measures_rate_and_memory():
    *_, rows = cells.run(quick=True)
    assert [row["cells"] for row in rows] == [18, 18]
    assert all(row["cells/s"] > 0 and row["peak MB"] > row["private MB"] > 0 for row in rows)

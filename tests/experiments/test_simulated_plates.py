"""Datasets of simulated plates, one per aspect."""

from __future__ import annotations

import pytest

from experiments.simulated_plates import Config, main
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset

pytestmark = pytest.mark.full


def test_main_builds_datasets_and_prints_the_value_of_data(tmp_path, capfd):
    options = Config(tmp_path, aspects=("count",), plates=1, wells=4, compounds=2)
    main(options)
    assert (
        capfd.readouterr().out.splitlines()[-1]
        == f"--data simulated_fields_count={tmp_path / 'fields_count'}"
    )
    assert len(open_dataset(tmp_path / "fields_count").index) == 8
    assert not (tmp_path / "cells_count").exists()  # single cells do not differ in number


def test_config_refuses_count_for_single_cells(tmp_path):
    with pytest.raises(InputError, match=r"--aspects .*more than count"):
        Config(tmp_path, aspects=("count",), units=("cells",))

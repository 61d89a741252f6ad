"""Datasets of simulated plates, one an aspect."""

from __future__ import annotations

import pytest

from experiments.simulated_plates import Config, main
from perturbjax.core.errors import InputError
from perturbjax.dataset import open_dataset


def test_a_dataset_an_aspect_and_unit_is_built_and_named_for_the_next_command(tmp_path, capfd):
    options = Config(tmp_path, aspects=("count",), plates=1, wells=4, compounds=2)
    main(options)
    assert (
        capfd.readouterr().out.splitlines()[-1]
        == f"--data simulated_fields_count={tmp_path / 'fields_count'}"
    )
    assert len(open_dataset(tmp_path / "fields_count").index) == 8
    assert not (tmp_path / "cells_count").exists()  # of one cell the number tells nothing


def test_the_number_of_single_cells_alone_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--aspects .*one besides count"):
        Config(tmp_path, aspects=("count",), units=("cells",))

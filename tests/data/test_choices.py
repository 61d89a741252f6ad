"""A choice of `core.choices` is complete with its record: all parts of the program accept it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from tiny_dataset import write_dataset

from perturbjax.core import choices
from perturbjax.core.config import SPLIT_CHOICES, InputConfig, SplitConfig
from perturbjax.data.normalization import site_intensities
from perturbjax.dataset import open_dataset

pytestmark = pytest.mark.full

TABLES = (choices.SPLIT_POLICIES, choices.NORMALIZATIONS, choices.MASK_ENCODINGS)


def test_new_choices_work_in_help_training_evaluation_export_audit_and_report(tmp_path):
    script = Path(__file__).with_name("new_choices.py")
    code = f"import sys; sys.path[:0] = [{str(script.parents[1])!r}]; import runpy, pathlib; "
    code += f"runpy.run_path({str(script)!r})['main'](pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_options_accept_the_names_of_the_tables():
    for kind, field, table in (
        (SplitConfig, "split", SPLIT_CHOICES),
        (InputConfig, "normalize", choices.NORMALIZATIONS),
        (InputConfig, "mask_encoding", choices.MASK_ENCODINGS),
    ):
        assert get_args(get_type_hints(kind)[field]) == tuple(table)


@pytest.mark.parametrize(("name", "inputs"), [("dtype", "shift"), ("site", ""), ("plate", "")])
def test_normalization_choice_describes_exported_inputs_if_needed(name, inputs):
    with pytest.raises(ValueError, match="required if and only if"):
        dataclasses.replace(choices.NORMALIZATIONS[name], inputs=inputs)


def test_normalization_cannot_read_undeclared_statistics(monkeypatch, tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "data", sites=6, size=16, channels=["DNA"]))
    wrong = dataclasses.replace(choices.NORMALIZATIONS["site"], depends_on="run", inputs="")
    monkeypatch.setitem(choices.NORMALIZATIONS, "dtype", wrong)
    with pytest.raises(TypeError, match="its record does not say so"):
        site_intensities(dataset, InputConfig(normalize="dtype"))


def test_help_describes_every_choice():
    for field, table in zip(("split", "normalize", "mask_encoding"), TABLES, strict=True):
        described = choices.describe_options()[field]
        assert described == {name: choice.help for name, choice in table.items()}
        assert not any(text.endswith(".") for text in described.values())

"""Every part of the program accepts a choice that is only a record in a table of `core.choices`."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import numpy as np
import pytest
from tiny_dataset import write_dataset

from perturbjax.audit.split_designs import deal
from perturbjax.cli import help
from perturbjax.core import choices, config, options
from perturbjax.core.config import AugmentConfig, InputConfig, OptimConfig, Recipe, SplitConfig
from perturbjax.dataset import open_dataset
from perturbjax.evaluation.apply import ApplyConfig, EvaluateConfig, evaluate
from perturbjax.export import StableHLOConfig, export
from perturbjax.report.comparison_page import ReportConfig, report
from perturbjax.training.checkpoint import CheckpointConfig
from perturbjax.training.fit import TrainConfig, fit

NEW_SPLIT = choices.SplitChoice(
    help="all sites of a half plate",
    groups=lambda index: index["Metadata_Plate"] + index["Metadata_Well"].str[-1:].gt("4").map(str),
    meaning="halves of plates are not divided",
    test_set="on held-out halves of plates",
)
NEW_NORMALIZATION = choices.NormalizationChoice(
    help="subtract the mean of the image",
    shift_scale=lambda s: (s.site_mean, s.zeros + 1e-4),
    depends_on="image",
    inputs="shift: mean of the image; scale: 1e-4",
)
NEW_ENCODING = choices.MaskEncodingChoice(
    help="0 in cells", encode=lambda mask: mask == 0, stored="1 for background", scale=0.5
)


@pytest.fixture
def new_choices(monkeypatch):
    """One more entry in each table."""
    for table, name, record, hint in (
        (choices.SPLIT_POLICIES, "half", NEW_SPLIT, "SplitPolicy"),
        (choices.NORMALIZATIONS, "centered", NEW_NORMALIZATION, "Normalization"),
        (choices.MASK_ENCODINGS, "inverse", NEW_ENCODING, "MaskEncoding"),
    ):
        monkeypatch.setitem(table, name, record)
        # `config` reads the names from the tables when it is imported.
        monkeypatch.setattr(config, hint, Literal[tuple(table)])
    options._choices.cache_clear()
    yield
    options._choices.cache_clear()


def test_new_choices_work_in_help_training_evaluation_export_audit_and_report(
    new_choices, tmp_path
):
    text = " ".join(help.render(Recipe, "perturbjax train", "Train.", everything=True).split())
    assert "centered" in text and "inverse" in text and "half" in text

    data = write_dataset(tmp_path / "data", sites=48, size=16, channels=["DNA"])
    recipe = Recipe(
        input=InputConfig(normalize="centered", mask_encoding="inverse"),
        augment=AugmentConfig(crop=16),
        optim=OptimConfig(epochs=1, batch_size=16),
        split=SplitConfig(split="half", folds=2),
    )
    run = fit(TrainConfig(out=tmp_path / "run", data=(data,), recipe=recipe))
    chosen = CheckpointConfig(run.path)
    evaluate(EvaluateConfig(ApplyConfig(chosen)))
    assert NEW_SPLIT.meaning in report(ReportConfig((run.path,))).read_text()

    description = json.loads(
        (export(StableHLOConfig(chosen, tmp_path / "exported")) / "description.json").read_text()
    )
    assert [one["name"] for one in description["inputs"]] == ["image", "mask", "shift", "scale"]
    assert description["mask"] == NEW_ENCODING.stored
    assert description["normalisation"]["shift and scale"] == NEW_NORMALIZATION.inputs

    designs, _ = deal(open_dataset(data).index, label="Metadata_pert_iname", folds=2)
    assert "half" in [design.policy for design in designs]


@pytest.mark.parametrize("depends_on", ["run", "image", "plate"])
def test_normalization_choice_requires_inputs_for_export(depends_on):
    with pytest.raises(ValueError, match="required if and only if"):
        dataclasses.replace(
            NEW_NORMALIZATION, depends_on=depends_on, inputs="" if depends_on != "run" else "shift"
        )


def test_undeclared_image_statistics_cannot_be_read(monkeypatch, tmp_path):
    from perturbjax.data.normalization import site_intensities

    dataset = open_dataset(write_dataset(tmp_path / "data", sites=6, size=16, channels=["DNA"]))
    wrong = dataclasses.replace(NEW_NORMALIZATION, depends_on="run", inputs="")
    monkeypatch.setitem(choices.NORMALIZATIONS, "dtype", wrong)
    with pytest.raises(TypeError, match="its record does not say so"):
        site_intensities(dataset, InputConfig(normalize="dtype"))


@pytest.mark.parametrize(
    "table", [choices.SPLIT_POLICIES, choices.NORMALIZATIONS, choices.MASK_ENCODINGS]
)
def test_descriptions_name_every_choice(table):
    text = choices.describe_choices(table)
    assert all(f"{name}: {record.help}" in text for name, record in table.items())
    assert np.all([not record.help.endswith(".") for record in table.values()])

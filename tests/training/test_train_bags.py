"""Training on bags of cells: learning, resumption, evaluation and report."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fields import write_fields
from published import write_resnet18

from perturbjax.cli.evaluate import ApplyConfig, EvaluateConfig, PredictConfig, evaluate, predict
from perturbjax.core.config import (
    AugmentConfig,
    InputConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SplitConfig,
    TransferConfig,
    preset,
)
from perturbjax.core.errors import InputError
from perturbjax.core.recipe_files import read_recipe
from perturbjax.dataset import open_dataset
from perturbjax.export import StableHLOConfig, export
from perturbjax.inference import load_network
from perturbjax.report.run_page import write_report
from perturbjax.training import fit as training
from perturbjax.training.checkpoint import CheckpointConfig, Checkpoints
from perturbjax.training.devices import ComputeConfig
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.run_directory import open_run
from perturbjax.training.setup import prepare_experiment

pytestmark = pytest.mark.full

ONE = ComputeConfig(devices="1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bags")
    # The first two sites have no cells; sites have different sizes.
    cells = [0, 0, *([6, 5, 9, 4] * 12)]
    write_fields(folder / "data", cells=cells, sizes=[96, 100], wells=25)
    return folder


def config(folder, name: str, crop: int = 16, **changes) -> TrainConfig:
    recipe = Recipe(
        input=InputConfig(normalize="log", cells=6, cells_per_step=4),
        augment=AugmentConfig(crop=crop, crop_scale=(0.8, 1.0), crop_ratio=(1.0, 1.0)),
        optim=OptimConfig(epochs=2, batch_size=8, learning_rate=0.005, decoupled=True),
        split=SplitConfig(split="well", folds=3),
    )
    changes = {"recipe": recipe, "checkpoint_every": 1, **changes}
    return TrainConfig(out=folder / name, data=(folder / "data",), compute=ONE, **changes)


@pytest.fixture(scope="module")
def run(folder):
    return fit(config(folder, "run")).path


def arrays(run) -> dict[str, np.ndarray]:
    with Checkpoints(run) as checkpoints:
        return checkpoints.load("latest", None)[0]


def predictions(folder, run, batch_size: int, feed: str = "auto") -> pd.DataFrame:
    apply = ApplyConfig(CheckpointConfig(run), batch_size=batch_size, feed=feed, compute=ONE)
    return pd.read_parquet(
        predict(PredictConfig(apply, (folder / "data",), folder / f"{batch_size}.parquet"))
    )


@pytest.mark.slow
def test_network_learns_a_change_of_half_of_the_cells(folder):
    fields = config(folder, "learned", crop=32)
    optim = replace(fields.recipe.optim, epochs=8, least_steps=160)
    learned = fit(replace(fields, recipe=replace(fields.recipe, optim=optim))).path
    table = predictions(folder, learned, 16)
    test = table[(table["part"] == "test") & (open_dataset(folder / "data").index["n_cells"] > 0)]
    assert (test["label"] == test["predicted"]).mean() > 0.85


def test_predictions_do_not_depend_on_batches_and_pipeline(folder, run):
    # The size of the windows is stored, so that other datasets are read at the same scale.
    assert open_run(run).recipe.input.cell_size == 32
    first, second = predictions(folder, run, 16), predictions(folder, run, 5, "streamed")
    columns = [name for name in first if name.startswith("prob_")]
    np.testing.assert_allclose(first[columns], second[columns], atol=1e-5)
    dataset = open_dataset(folder / "data")
    # Arrays of images give the same predictions as the dataset, for all cells in a bag.
    image, mask = dataset.pixels(5)
    assert dataset.index["n_cells"][5] <= 6
    np.testing.assert_allclose(
        load_network(run).predict(image[None], mask[None])[0], first[columns].iloc[5], atol=1e-5
    )


@pytest.mark.parametrize("feed", ["resident", "streamed"])
def test_resume_is_bit_identical(folder, run, monkeypatch, feed):
    again = config(folder, feed, feed=feed)

    def track_until_stop(epochs, **_):
        for epoch in epochs:
            if epoch == 1:
                raise KeyboardInterrupt
            yield epoch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "track", track_until_stop)
        fit(again)
    fit(again)
    expected, resumed = arrays(run), arrays(again.out)
    assert expected.keys() == resumed.keys()
    assert all(value.tobytes() == resumed[name].tobytes() for name, value in expected.items())


def test_cell_size_in_micrometers_becomes_pixels(folder, monkeypatch):
    file = folder / "recipe.toml"
    file.write_text('[input]\ncell_size = "20um"\n')
    recipe, data = read_recipe(file, preset("wells")), (folder / "data",)
    with pytest.raises(InputError, match=r"--cell-size 20um: the pixel size of .* is unknown"):
        prepare_experiment(recipe, data)
    monkeypatch.setattr(type(open_dataset(data)), "pixel_sizes", {"P1": 0.65})
    # 20 µm are 31 pixels, rounded up to a multiple of 16.
    assert prepare_experiment(recipe, data).recipe.input.cell_size == 32
    with pytest.raises(InputError, match="--cell-size 20mm: must be 0, a multiple of 16 pixels"):
        InputConfig(cells=4, cell_size="20mm")


def test_evaluation_and_report_show_the_cells_with_most_attention(folder, run):
    evaluate(EvaluateConfig(ApplyConfig(CheckpointConfig(run), compute=ONE), replicates=20))
    attention = pd.read_parquet(run / "evaluation" / "cell_attention.parquet")
    dataset = open_dataset(folder / "data")
    sums = attention.groupby("site_id")["attention"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-5)
    assert attention.groupby("site_id").size().max() == 6
    for row in attention.head(5).to_dict("records"):
        mask = dataset.pixels(dataset.positions([row["site_id"]])[0])[1]
        assert mask[round(row["row"]), round(row["column"])] == row["object"]
    summary = json.loads((run / "evaluation" / "attribution.json").read_text())["cell_attention"]
    assert 1 < summary["effective"] <= summary["cells"] <= 6
    page = write_report(run).read_text()
    assert "Cells of test sites with the highest attention" in page
    assert page.count("cell with attention") >= 10


@pytest.mark.slow
def test_frozen_pretrained_backbone_sees_cells(folder):
    write_resnet18(folder / "resnet18.safetensors")
    recipe = Recipe(
        model=ModelConfig(model="resnet18"),
        input=InputConfig(normalize="site", cells=4),
        augment=AugmentConfig(crop=32),
        optim=OptimConfig(epochs=2, batch_size=8, learning_rate=1e-3),
        split=SplitConfig(split="well", folds=3),
        transfer=TransferConfig(
            weights=str(folder / "resnet18.safetensors"), head="attention", freeze_epochs=1
        ),
    )
    # Networks of ImageNet take one size of image.
    trained = fit(config(folder, "frozen", recipe=recipe, checkpoint_every=1)).path
    with Checkpoints(trained) as checkpoints:
        first, second = (checkpoints.load("latest", epoch)[0] for epoch in (1, 2))
    backbone = next(name for name in first if name.startswith("params/cells/backbone"))
    gate = next(name for name in first if name.startswith("params/attention/gate"))
    assert first[backbone].tobytes() != second[backbone].tobytes()
    assert first[gate].tobytes() != second[gate].tobytes()
    (folder / "resnet18.safetensors").unlink()
    assert len(predictions(folder, trained, 8)) == 50


def test_unusable_settings_are_refused(folder, run):
    wells = preset("wells")
    with pytest.raises(InputError, match="--head channels: must be dense or attention"):
        Recipe(input=wells.input, transfer=TransferConfig(weights="package:x", head="channels"))
    with pytest.raises(InputError, match="--cell-size 20: must be 0, a multiple of 16 pixels"):
        InputConfig(cells=4, cell_size=20)
    with pytest.raises(InputError, match="--model: this network cannot be applied to single cells"):
        other = Recipe(model=ModelConfig(model="masked_cnn"), input=wells.input)
        fit(config(folder, "other", recipe=other))
    with pytest.raises(InputError, match="its network takes bags of cells"):
        export(StableHLOConfig(CheckpointConfig(run), folder / "exported"))
    assert not (folder / "other").exists() and not (folder / "exported").exists()
    write_fields(folder / "empty", cells=[0] * 24)
    with pytest.raises(InputError, match="none of 16 sites has a cell"):
        fit(TrainConfig(out=folder / "none", data=(folder / "empty",), recipe=wells, compute=ONE))

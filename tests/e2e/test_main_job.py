"""Tests of the main workflow: simulate, build, train, evaluate and predict with the public
commands. Refused uses of the trained run are here too, so that one process trains it.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from commands import SMALL, assert_same_parameters

from data_prep.__main__ import main as build
from perturbjax.cli import main as perturbjax
from perturbjax.dataset import PLATE, SITE, WELL, open_dataset


def test_run_directory_contains_documented_files(run):
    names = {path.name for path in run.iterdir()}
    assert {
        "config.json",
        "split.parquet",
        "labels.json",
        "metrics.jsonl",
        "checkpoints",
        "report.html",
    } <= names
    scores = json.loads((run / "evaluation/scores.json").read_text())
    assert {"model", "majority", "chance", "position", "cell count"} <= set(
        scores["levels"]["site"]
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["split"] == "train"] == [1, 2]


def test_predictions_contain_probabilities_of_all_sites(run, dataset):
    table = pd.read_parquet(run / "evaluation/predictions.parquet")
    names = json.loads((run / "labels.json").read_text())
    probabilities = table[[f"prob_{name}" for name in names]].to_numpy()
    assert len(table) == len(open_dataset(dataset)) and set(table["part"]) == {"train", "test"}
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert list(table["predicted"]) == [names[i] for i in probabilities.argmax(1)]
    assert table.columns[0].startswith("Metadata_")


def test_predict_and_evaluate_give_the_same_probabilities(command, run, dataset, tmp_path):
    command(
        "predict",
        "--run",
        run,
        "--data",
        dataset,
        "--out",
        tmp_path / "p.parquet",
        "--batch-size",
        7,
    )
    again = pd.read_parquet(tmp_path / "p.parquet").set_index("site_id")
    first = (
        pd.read_parquet(run / "evaluation/predictions.parquet")
        .set_index("site_id")
        .loc[again.index]
    )
    columns = [column for column in first if column.startswith("prob_")]
    np.testing.assert_allclose(again[columns], first[columns], atol=2e-6)


def test_resident_and_streamed_batches_train_same_network(command, run, dataset, tmp_path):
    command(
        "train", "--data", dataset, "--out", tmp_path / "streamed", "--feed", "streamed", *SMALL
    )
    assert_same_parameters(run, tmp_path / "streamed")


def test_finished_run_is_not_changed(command, run, dataset):
    before = (run / "metrics.jsonl").read_bytes()
    command("train", "--data", dataset, "--out", run, *SMALL)
    command("train", "--out", run, "--resume")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_init_from_loads_parameters_of_another_run(command, run, dataset, tmp_path):
    done = command(
        "train", "--data", dataset, "--out", tmp_path / "next", "--init-from", run, *SMALL
    )
    assert f"initial parameters from {run}" in done.stderr


def test_split_command_writes_same_split_as_train(command, run, dataset, tmp_path):
    command(
        "split",
        "--data",
        dataset,
        "--split",
        "well",
        "--folds",
        3,
        "--out",
        tmp_path / "split.parquet",
    )
    manifest = pd.read_parquet(tmp_path / "split.parquet")
    used = pd.read_parquet(run / "split.parquet")
    pd.testing.assert_frame_equal(manifest, used)


def test_predictions_do_not_need_labels(run, plates, tmp_path):
    table = pd.read_csv(plates / "load_data.csv", dtype=str)
    columns = [
        name for name in table if name.startswith(("FileName", "PathName", PLATE, WELL, SITE))
    ]
    table[columns].to_csv(tmp_path / "load_data.csv", index=False)
    paths = (
        "--load-data",
        tmp_path / "load_data.csv",
        "--images",
        plates,
        "--out",
        tmp_path / "data",
    )
    for command, *arguments in (
        (build, "build", *paths, "--workers", 1, "--label-column", "none"),
        (
            perturbjax,
            "predict",
            "--run",
            run,
            "--data",
            tmp_path / "data",
            "--out",
            tmp_path / "p.parquet",
        ),
    ):
        with pytest.raises(SystemExit, match="0"):
            command([str(argument) for argument in arguments])
    unlabeled = pd.read_parquet(tmp_path / "p.parquet").set_index("site_id")
    assert set(unlabeled["label"]) == {""}
    evaluated = pd.read_parquet(run / "evaluation" / "predictions.parquet").set_index("site_id")
    names = [name for name in evaluated if name.startswith("prob_")]
    np.testing.assert_allclose(unlabeled.loc[evaluated.index, names], evaluated[names], atol=1e-6)


def test_train_does_not_overwrite_another_run(refused, run, dataset):
    before = (run / "config.json").read_bytes()
    line = refused("train", "--data", dataset, "--out", run, *SMALL, "--learning-rate", "0.5")
    assert "already contains another run" in line and "learning_rate" in line
    assert (run / "config.json").read_bytes() == before


def test_unwritable_output_is_named(refused, dataset, run, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("train", "--data", dataset, "--out", tmp_path / "file" / "run", *SMALL)
    assert str(tmp_path / "file") in line
    line = refused(
        "predict", "--run", run, "--data", dataset, "--out", tmp_path / "file" / "p.parquet"
    )
    assert str(tmp_path / "file") in line


def test_dataset_with_other_channels_is_refused(command, refused, run, plates, tmp_path):
    csv = pd.read_csv(plates / "load_data.csv").head(4)
    csv.to_csv(tmp_path / "few.csv", index=False)
    command(
        "data_prep build",
        *("--load-data", tmp_path / "few.csv", "--images", plates, "--out", tmp_path / "d"),
        *("--aggregate", "none", "--segment-channels", "DNA", "--workers", 1),
    )
    line = refused(
        "predict", "--run", run, "--data", tmp_path / "d", "--out", tmp_path / "p.parquet"
    )
    assert "channels" in line and not (tmp_path / "p.parquet").exists()


@pytest.mark.slow  # test_devices.py checks the step itself
@pytest.mark.parametrize("kind", ["pmap", "sharded"])
def test_eight_devices_train_same_network_as_one(command, run, dataset, tmp_path, kind):
    devices, out = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, tmp_path / kind
    flags = ("--data", dataset, "--out", out, "--devices", kind, *SMALL)
    done = command("train", *flags, environment=devices)
    assert "on 8 cpu device(s)" in done.stderr
    assert_same_parameters(run, out, tolerance=2e-4)

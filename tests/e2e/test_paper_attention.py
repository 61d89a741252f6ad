"""Test of the experiment of the paper on another dataset."""

import subprocess
import sys

import pandas as pd
import pytest

from perturbjax.core.recipe_files import recipe_to_dict
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.run_directory import open_run


@pytest.mark.slow
def test_paper_experiment_writes_figures_and_published_scores(environment, dataset, tmp_path):
    flags = (
        "--data",
        dataset,
        "--out",
        tmp_path / "run",
        "--epochs",
        11,
        "--crop",
        16,
        "--batch-size",
        32,
    )
    line = [sys.executable, "-m", "experiments.paper_attention", *map(str, flags)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "0.381" in done.stdout and "0.330" in done.stdout and "epoch 11 of 11" in done.stdout
    for name in ("curves.png", "example.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    assert Checkpoints(tmp_path / "run").epochs() == [10, 11]

    run = open_run(tmp_path / "run")
    recipe = recipe_to_dict(run.recipe)
    assert (
        recipe["augment"]["legacy_augmentation"] and recipe["input"]["mask_encoding"] == "instance"
    )
    assert (
        recipe["optim"] | {"learning_rate": 0.005, "weight_decay": 1e-4, "label_smoothing": 0.1}
        == recipe["optim"]
    )
    split = pd.read_parquet(run.path / "split.parquet")
    assert 0.15 < (split["part"] == "test").mean() < 0.25

"""Tests of the validation set: training groups that choose the best checkpoint instead of the test
sites.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny_dataset import write_dataset

from perturbjax.core.config import AugmentConfig, OptimConfig, Recipe, SplitConfig
from perturbjax.core.errors import InputError
from perturbjax.data.splits import hold_out_validation
from perturbjax.inference import load_network
from perturbjax.training.apply_network import score_sites
from perturbjax.training.checkpoint import Checkpoints
from perturbjax.training.fit import TrainConfig, fit
from perturbjax.training.run_directory import read_metrics

pytestmark = pytest.mark.full

SPLIT = SplitConfig(split="well", folds=3, validation_fraction=0.4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    write_dataset(folder / "data", sites=48, size=24, channels=["DNA"])
    recipe = Recipe(
        augment=AugmentConfig(crop=16), optim=OptimConfig(epochs=4, batch_size=8), split=SPLIT
    )
    config = TrainConfig(
        out=folder / "run", data=(folder / "data",), recipe=recipe, evaluate_every=1
    )
    return fit(config)


def test_best_checkpoint_maximizes_balanced_accuracy_on_validation_sites(run):
    rows = [row for row in read_metrics(run.path) if row["split"] == "validation"]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    highest = max(row["balanced_accuracy"] for row in rows)
    best = load_network(run, "best").facts["epoch"]
    assert rows[best - 1]["balanced_accuracy"] == highest
    with Checkpoints(run.path) as checkpoints:
        assert checkpoints.epochs("best") == [best]


def test_validation_groups_are_disjoint_from_training_and_test_groups(run):
    manifest = pd.read_parquet(run.path / "split.parquet")
    assert set(manifest["part"]) == {"train", "validation", "test"}
    assert (manifest.groupby("group")["part"].nunique() == 1).all()
    assert set(run.parts(manifest["site_id"])) == {"train", "validation", "test"}


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.95])
def test_hold_out_validation_is_stratified_and_keeps_a_group_of_each_label(fraction):
    labels = np.repeat(["DMSO", "taxol", "rare"], [40, 20, 1])
    sites = pd.Series([f"s{number}" for number in range(61)])
    manifest = pd.DataFrame({"site_id": sites, "group": sites, "part": "train"})
    label_of_site = pd.Series(labels, sites)
    result = hold_out_validation(manifest, label_of_site, fraction, seed=1)
    counts = Counter(labels[result["part"] == "validation"])
    assert sum(counts.values()) == min(round(61 * fraction), 58) and not counts["rare"]
    assert abs(counts["DMSO"] - 2 * counts["taxol"]) <= 3
    again = hold_out_validation(manifest, label_of_site, fraction, seed=1)
    pd.testing.assert_frame_equal(result, again)
    assert not result.equals(hold_out_validation(manifest, label_of_site, fraction, seed=2)) or (
        fraction > 0.9
    )


def test_hold_out_validation_rejects_fraction_without_groups():
    manifest = pd.DataFrame({"site_id": ["a", "b"], "group": ["a", "b"], "part": "train"})
    labels = pd.Series(["DMSO", "taxol"], ["a", "b"])
    with pytest.raises(InputError, match=r"--validation-fraction 0\.5: holds out none of 2"):
        hold_out_validation(manifest, labels, 0.5, seed=0)
    with pytest.raises(InputError, match="--validation-fraction 1"):
        replace(SPLIT, validation_fraction=1.0)


def test_score_sites_averages_recall_of_classes_with_sites():
    probabilities = np.eye(3, dtype=np.float32)[[0, 0, 0, 0, 1]]
    scores = score_sites(probabilities, np.array([0, 0, 0, 1, 1]))
    assert scores.accuracy == pytest.approx(0.8)
    assert scores.balanced_accuracy == pytest.approx((1 + 0.5) / 2)

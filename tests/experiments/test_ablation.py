"""The ablation runner and its ablations, on simulated tables and small datasets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from sklearn.metrics import balanced_accuracy_score
from tiny_dataset import write_dataset

from experiments.ablation import Config, load_ablation, main, summary
from experiments.ablations import head, limits, linear, members
from experiments.ablations.inner_folds import INNER, inner_folds, score
from perturbjax.core.errors import InputError
from perturbjax.data.splits import TEST, make_split
from perturbjax.models import Mode
from perturbjax.models.ensemble_head import BRANCH_WEIGHT, EnsembleHead
from perturbjax.profiles.preparation import preparation
from perturbjax.profiles.profile_options import CLASSIFY_PRESETS
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.profile_table import Profiles
from perturbjax.profiles.table_steps import as_table

pytestmark = pytest.mark.full

PLATES, SITES = 20, 36


def test_summary_counts_folds_better_than_the_reference() -> None:
    rows = [("reference", 0, 0.5), ("other", 0, 0.6), ("reference", 1, 0.5), ("other", 1, 0.4)]
    table = pd.DataFrame(rows, columns=["variant", "fold", "balanced_accuracy"])
    table["accuracy"] = table["balanced_accuracy"]
    assert summary(table, "reference").to_numpy().tolist() == [
        ["reference", 2, "0.500", "0.500", ""],
        ["other", 2, "0.500", "0.500", "1"],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ablation": "none"}, "--ablation none: must be one of linear"),
        ({"folds": (5,)}, "--folds 5: must be"),
        ({"data": None}, "--data None: must be a dataset"),
        ({"ablation": "members"}, "--runs : must be one or more run"),
    ],
)
def test_config_names_the_wrong_flag(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(**{"ablation": "linear", "data": tmp_path, "out": tmp_path / "out", **changes})


@pytest.mark.parametrize("name", ["linear", "head", "members", "limits"])
def test_main_lists_variants_if_one_does_not_exist(tmp_path: Path, name: str) -> None:
    settings = {"ablation": name, "data": tmp_path, "runs": ("run",), "variants": ("no such",)}
    options = Config(out=tmp_path / "out", **settings)
    with pytest.raises(InputError, match="--variants no such: unknown; choose among"):
        main(options)
    assert load_ablation(name).REFERENCE and not (tmp_path / "out").exists()


@pytest.mark.parametrize("fold", [0, 4])
def test_inner_folds_exclude_test_plates(fold: int) -> None:
    metadata = pd.DataFrame(
        {
            "site_id": [f"s{i}" for i in range(180)],
            "Metadata_Plate": np.repeat([f"P{i}" for i in range(15)], 12),
            "Metadata_Well": "A01",
            "moa": list("abc") * 60,
        }
    )
    outer = make_split(metadata, "plate", label="moa", folds=5, fold=fold, seed=0)
    outer_test = set(np.flatnonzero(outer["part"] == TEST))
    folds = list(inner_folds(metadata, "moa", fold))
    assert len(folds) == INNER
    plates = metadata["Metadata_Plate"]
    for train, test, groups in folds:
        assert not outer_test & (set(train) | set(test))
        assert not set(plates.iloc[train]) & set(plates.iloc[test])
        assert list(groups) == list(plates.iloc[train])
    tested = np.concatenate([test for _, test, _ in folds])
    assert sorted(tested) == sorted(set(range(180)) - outer_test)


def test_linear_varies_the_last_steps_of_the_preset() -> None:
    steps = [name for name, _ in preparation(CLASSIFY_PRESETS["linear"]["preparation"]).steps]
    assert tuple(steps[-len(linear.VARIED_STEPS) :]) == linear.VARIED_STEPS


def test_measurements_replace_or_join_the_features_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classes are visible in the measurements only, whose rows have another order."""
    rng = np.random.default_rng(0)
    sites = np.arange(120)
    metadata = pd.DataFrame(
        {
            "Metadata_Plate": [f"P{number // 12}" for number in sites],
            "Metadata_Well": [f"A{number % 12 + 1:02}" for number in sites],
            "Metadata_Site": "1",
            "Metadata_pert_iname": np.array(["a", "b"])[sites % 2],
        }
    )
    file = tmp_path / "measured.parquet"
    measured = metadata.assign(Cells_Area=sites % 2 + rng.normal(size=120) / 100)
    measured.iloc[::-1].to_parquet(file)
    noise = metadata.assign(**{f"network_{k}": rng.normal(size=120) for k in range(4)})
    loaded = (read_profiles([noise]), np.zeros(120, bool), "Metadata_pert_iname")
    monkeypatch.setattr(linear, "load_profiles", lambda _: loaded)
    names = ("reference", "CellProfiler", "EfficientNet-Lite0 and CellProfiler")
    options = Config("linear", tmp_path / "out", tmp_path, variants=names, folds=(0,))
    with pytest.raises(InputError, match="--measurements: is required for variant CellProfiler"):
        main(options)
    main(dataclasses.replace(options, measurements=file))
    scores = pd.read_csv(tmp_path / "out/scores.csv").groupby("variant")["accuracy"].mean()
    assert scores["reference"] < 0.7 < 0.99 < scores[list(names[1:])].min()
    measured[1:].to_parquet(file)
    with pytest.raises(InputError, match=f"--measurements {file}: has no row of site P0_A01_1"):
        main(dataclasses.replace(options, measurements=file))


def test_score_equals_scikit_learn() -> None:
    truth, predicted = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 1, 1, 0, 2])
    expected = pytest.approx(balanced_accuracy_score(truth, predicted))
    assert score(truth, predicted)["balanced_accuracy"] == expected


@pytest.mark.parametrize("name", ["reference", "MLP, no mixup", "logistic regression"])
@pytest.mark.parametrize("present", [2, 3])
def test_fit_and_predict_classifies_new_sites(name: str, present: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(240) % present
    z = 2 * rng.normal(size=(present, 20))[labels] + rng.normal(size=(240, 20))
    z = z.astype(np.float32)
    logits = head.fit_and_predict(
        head._VARIANTS[name], z[:160], labels[:160], np.arange(160) // 40, z[160:], classes=5
    )
    assert logits.shape == (80, 5)
    assert (logits.argmax(1) == labels[160:]).mean() > 0.9


@pytest.mark.slow  # trains a network
def test_head_and_branch_are_evaluated_on_inner_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "data", sites=360, size=24, channels=["DNA"])
    small = dataclasses.replace(
        head.PRESET,
        augment=dataclasses.replace(head.PRESET.augment, crop=32),
        optim=dataclasses.replace(head.PRESET.optim, epochs=1),
        transfer=dataclasses.replace(head.PRESET.transfer, symmetries=1),
    )
    monkeypatch.setattr(head, "PRESET", small)
    name = "MLP, one view"
    main(
        Config(
            "head", tmp_path / "out", tmp_path / "data", variants=(name,), folds=(1,), branch=True
        )
    )
    counts = pd.read_csv(tmp_path / "out" / "scores.csv").groupby("variant").size()
    assert counts[name] == 3
    assert all(counts[f"branch weight {weight:g}"] == 1 for weight in head.BRANCH_WEIGHTS)


def test_separate_members_recovers_the_attention_branch() -> None:
    model, rng = EnsembleHead(20, 4, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    features = rng.normal(size=(30, 20)).astype(np.float32)
    branch = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(30, 4))))
    both = jax.nn.log_softmax(model(jnp.asarray(features), Mode()))
    ensemble = jax.nn.softmax((1 - BRANCH_WEIGHT) * both + BRANCH_WEIGHT * branch)
    parts = members.separate_members(model, features, np.asarray(ensemble))
    np.testing.assert_allclose(jax.nn.log_softmax(parts["attention branch"]), branch, atol=1e-4)
    np.testing.assert_allclose(parts["MLP and logistic regression"], both, atol=1e-6)
    np.testing.assert_array_equal(
        [parts["MLP"], parts["logistic regression"]],
        model.log_probabilities(jnp.asarray(features), Mode()),
    )


def test_members_refuses_a_pattern_without_runs(tmp_path: Path) -> None:
    pattern = str(tmp_path / "none*")
    with pytest.raises(InputError, match="no such directory"):
        main(Config("members", tmp_path / "out", runs=(pattern,)))


@pytest.fixture(scope="module")
def baseline() -> limits.Baseline:
    """Simulate three mechanisms. Two look the same; one compound of the third is on one plate
    and looks like the other two."""
    rng = np.random.default_rng(0)
    n = PLATES * SITES
    plates = np.repeat(np.arange(PLATES), SITES)
    kind = np.tile(np.repeat(np.arange(3), 4), n // 12)
    rare = (kind == 2) & (plates == 0)
    centers = np.array([[4.0, 0, 0], [4.0, 0, 0], [0, 4.0, 0]])
    values = rng.normal(size=(n, 12)).astype(np.float32)
    values[:, :3] += np.where(rare[:, None], [4.0, 0, 0], centers[kind])
    metadata = pd.DataFrame(
        {
            "site_id": [f"s{i}" for i in range(n)],
            "Metadata_Plate": [f"P{plate:02d}" for plate in plates],
            "Metadata_Well": [f"A{1 + (i % SITES) // 4:02d}" for i in range(n)],
            "Metadata_pert_iname": np.where(rare, "rare", np.array(["a", "b", "c"])[kind]),
            "Metadata_moa": np.array(["one", "two", "three"])[kind],
        }
    ).astype(str)
    profiles = Profiles(metadata, values, tuple(f"f{i}" for i in range(12)))
    return limits.Baseline(as_table(profiles, np.zeros(n, bool)), metadata, "Metadata_moa")


@pytest.fixture(scope="module")
def learned(baseline: limits.Baseline) -> tuple[pd.DataFrame, np.ndarray]:
    by_plate = np.zeros((PLATES * SITES, 3))
    return pd.DataFrame(limits.learning_curve(baseline, by_plate)), by_plate


def test_learning_curve_predicts_every_site_from_other_plates(learned) -> None:
    table, by_plate = learned
    np.testing.assert_allclose(by_plate.sum(1), 1, rtol=1e-6)
    means = table.groupby("variant", sort=False).mean()
    assert [name.split(" of")[0] for name in means.index] == ["25 %", "50 %", "100 %"]
    assert means.index[-1] == limits.REFERENCE
    assert list(means["training plates"]) == [4, 8, 16]
    assert list(means["training sites"]) == [4 * SITES, 8 * SITES, 16 * SITES]
    assert means["accuracy"].iloc[-1] > 0.6


def test_by_compound_separates_compounds_without_training_sites(baseline, learned) -> None:
    table = pd.DataFrame(limits.by_compound(baseline, learned[1])).set_index("variant")
    unknown = table.loc["compound on no training plate"]
    assert unknown["test sites"] == 12 and unknown["accuracy"] < 0.2
    several = table.loc["compound on several training plates"]
    assert several["test sites"] == PLATES * SITES - 12 and several["accuracy"] > 0.6
    assert table.loc["all compounds", "test sites"] == PLATES * SITES


def test_by_split_mean_of_the_well_is_not_worse(baseline, learned) -> None:
    table = pd.DataFrame(limits.by_split(baseline, learned[1])).set_index("variant")["accuracy"]
    assert list(table.index[::2]) == ["split by plate", "split by well", "split by site"]
    assert (table.to_numpy()[1::2] >= table.to_numpy()[::2] - 0.02).all()

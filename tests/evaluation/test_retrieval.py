"""Retrieval detects simulated clusters and equals scikit-learn's average precision."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from perturbjax.core.errors import InputError
from perturbjax.core.plates import plate_layouts
from perturbjax.evaluation.ranking import _distinct_numbers, average_precision, unit_rows
from perturbjax.evaluation.retrieval import (
    evaluate_retrieval,
    match_mechanisms,
    negative_controls,
    replicate_retrieval,
    well_profiles,
)


def screen(strength: float, *, plates: int = 4, seed: int = 0) -> pd.DataFrame:
    """Simulate plates of eight DMSO wells and six compounds of three mechanisms."""
    rng = np.random.default_rng(seed)
    compounds = ["DMSO"] * 8 + [f"compound {i}" for i in range(6)]
    mechanisms = ["DMSO"] * 8 + [f"mechanism {i // 2}" for i in range(6)]
    tables = []
    for plate in range(plates):
        tables.append(
            pd.DataFrame(
                {
                    "Metadata_Plate": f"P{plate}",
                    "Metadata_Well": [f"A{i + 1:02d}" for i in range(14)],
                    "Metadata_pert_iname": compounds,
                    "Metadata_moa": mechanisms,
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)
    effects = {name: rng.normal(size=20) for name in sorted(set(mechanisms))} | {
        "DMSO": np.zeros(20)
    }
    own = {name: 0.7 * rng.normal(size=20) for name in sorted(set(compounds))} | {
        "DMSO": np.zeros(20)
    }
    signal = [
        effects[m] + own[c]
        for m, c in zip(table["Metadata_moa"], table["Metadata_pert_iname"], strict=True)
    ]
    features = strength * np.array(signal) + 0.5 * rng.normal(size=(len(table), 20))
    return pd.concat([table, pd.DataFrame(features, columns=[f"f{i}" for i in range(20)])], axis=1)


def test_average_precision_equals_scikit_learn():
    rng = np.random.default_rng(0)
    similarity, kind = rng.random((30, 30)), rng.integers(3, size=(30, 30))
    result = average_precision(similarity, kind == 0, kind == 1)
    for row in range(30):
        used = kind[row] < 2
        assert result[row] == pytest.approx(
            average_precision_score(kind[row][used] == 0, similarity[row][used])
        )


def test_average_precision_ranks_ties_last():
    positives = np.array([[False, True, False, True, False]])
    negatives = ~positives
    similarity = np.array([[0.1, 0.9, 0.8, 0.7, 0.0]])  # positive, negative, positive, ...
    assert average_precision(similarity, positives, negatives)[0] == pytest.approx(
        (1 / 1 + 2 / 3) / 2
    )
    all_equal = np.zeros((1, 5))
    assert average_precision(all_equal, positives, negatives)[0] == pytest.approx(
        (1 / 4 + 2 / 5) / 2
    )
    assert np.isnan(average_precision(similarity, positives, np.zeros_like(positives))[0])


def test_unit_rows_handles_zeros():
    unit = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]]))
    np.testing.assert_allclose(unit @ unit.T, [[1, 0, -1], [0, 0, 0], [-1, 0, 1]])


@pytest.mark.parametrize("against", ["controls", "others"])
def test_replicate_retrieval_separates_effects_from_noise(against):
    for strength, fraction in ((3.0, 1.0), (0.0, 0.0)):
        metadata, features = well_profiles(screen(strength))
        result = replicate_retrieval(
            features, metadata, negative_controls(metadata), against=against, draws=2000
        )
        assert list(result["label"]) == [f"compound {i}" for i in range(6)]
        assert (result["wells"] == 4).all()
        assert (result["q"] < 0.05).mean() == fraction
    assert result["map"].mean() == pytest.approx(result["chance"].mean(), abs=0.12)


def test_chance_is_mean_over_all_rankings():
    """Two positives among four negatives: mean average precision of all 15 rankings."""
    metadata = pd.DataFrame(
        {"Metadata_Plate": "P", "Metadata_pert_iname": ["a"] * 3 + ["DMSO"] * 4}
    )
    features = np.random.default_rng(1).normal(size=(7, 5))
    result = replicate_retrieval(features, metadata, negative_controls(metadata))
    exact = np.mean(
        [(1 / first + 2 / second) / 2 for first, second in itertools.combinations(range(1, 7), 2)]
    )
    assert result["chance"].iloc[0] == pytest.approx(exact, abs=0.01)


def test_replicate_retrieval_ignores_controls_of_other_plates():
    metadata = pd.DataFrame(
        {"Metadata_Plate": ["P", "Q", "R"], "Metadata_pert_iname": ["a", "a", "DMSO"]}
    )
    assert replicate_retrieval(np.eye(3), metadata, negative_controls(metadata)).empty


def test_match_mechanisms_excludes_same_compound():
    table = screen(2.0)
    table = table[table["Metadata_pert_iname"] != "DMSO"]
    metadata, features = well_profiles(table)
    compounds, mechanisms = (
        metadata[c].to_numpy() for c in ("Metadata_pert_iname", "Metadata_moa")
    )
    result = match_mechanisms(features, compounds, mechanisms)
    assert (
        result["accuracy"] > 0.9 and result["rows"] == 24 and result["chance"] == pytest.approx(0.2)
    )
    assert (
        match_mechanisms(features, compounds, compounds)["rows"] == 0
    )  # every mechanism has one compound


def test_match_mechanisms_excludes_same_batch():
    """The only match of the mechanism on another batch is far; the near one shares the batch."""
    features = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    compounds, mechanisms = np.array(["a", "b", "c", "d"]), np.array(["m", "m", "m", "other"])
    batches = np.array(["1", "1", "2", "2"])
    assert match_mechanisms(features[:3], compounds[:3], mechanisms[:3])["rows"] == 3
    within, across = (match_mechanisms(features, compounds, mechanisms, b) for b in (None, batches))
    assert within["accuracy"] == pytest.approx(2 / 3)
    assert across["accuracy"] == pytest.approx(1 / 3) and across["rows"] == 3


def test_well_profiles_average_and_standardize():
    wells = ["A01", "A01", "A02"]
    table = pd.DataFrame(
        {"Metadata_Plate": "P", "Metadata_Well": wells, "x": [1.0, 3.0, 4.0], "constant": 5.0}
    )
    metadata, features = well_profiles(table)
    assert metadata["Metadata_Well"].tolist() == ["A01", "A02"]
    np.testing.assert_allclose(features, [[-1.0], [1.0]])


def by_hand(features, metadata, controls, restriction) -> pd.DataFrame:
    """Compute mAP and recall at 1 % of each perturbation pair by pair."""
    unit, rows = unit_rows(features), []
    similarity = unit @ unit.T
    layouts = plate_layouts(metadata)
    for query, candidate in itertools.product(range(len(metadata)), repeat=2):
        one, other = metadata.iloc[query], metadata.iloc[candidate]
        allowed = {
            "NR": True,
            "NSB": one["Metadata_Plate"] != other["Metadata_Plate"],
            "NSS": one["Metadata_Well"] != other["Metadata_Well"],
            "NSL": layouts[one["Metadata_Plate"]] != layouts[other["Metadata_Plate"]],
        }[restriction]
        if query != candidate and allowed and not controls[query] and not controls[candidate]:
            right = one["Metadata_pert_iname"] == other["Metadata_pert_iname"]
            rows.append((query, one["Metadata_pert_iname"], right, similarity[query, candidate]))
    pairs = pd.DataFrame(rows, columns=["query", "label", "right", "similarity"])
    result = []
    for (_, label), pool in pairs.groupby(["query", "label"]):
        if 0 < pool["right"].sum() < len(pool):
            nearest = pool.nlargest(int(np.ceil(0.01 * len(pool))), "similarity")
            recall = nearest["right"].sum() / pool["right"].sum()
            result.append(
                (label, average_precision_score(pool["right"], pool["similarity"]), recall)
            )
    return pd.DataFrame(result, columns=["label", "map", "recall"]).groupby("label").mean()


@pytest.mark.parametrize("restriction", ["NR", "NSB", "NSS", "NSL"])
def test_replicate_retrieval_obeys_restriction(restriction):
    """Compare with a loop over all pairs, on plates of two layouts."""
    rng = np.random.default_rng(3)
    table = screen(0.6, plates=4, seed=3)
    for plates in (["P0", "P1"], ["P2"], ["P3"]):
        order = rng.permutation(14)
        for plate in plates:
            at = table["Metadata_Plate"] == plate
            table.loc[at, "Metadata_Well"] = [f"A{place + 1:02d}" for place in order]
    metadata, features = well_profiles(table)
    controls = negative_controls(metadata)
    options = {"against": "others", "restriction": restriction, "draws": 200}
    result = replicate_retrieval(features, metadata, controls, **options).set_index("label")
    expected = by_hand(features, metadata, controls, restriction)
    pd.testing.assert_frame_equal(result[["map", "recall"]], expected, check_names=False)


def test_replicate_retrieval_requires_enough_rankings(tmp_path):
    """With two wells per compound, a query ranks one replicate among three wells."""
    table = screen(3.0, plates=2)
    few = table[table["Metadata_pert_iname"].isin(["compound 0", "compound 1"])]
    metadata, features = well_profiles(few)
    result = replicate_retrieval(features, metadata, np.zeros(4, dtype=bool), against="others")
    assert (result["wells"] == 2).all() and result["p"].isna().all() and result["q"].isna().all()
    summary = evaluate_retrieval(few, tmp_path)
    assert "fraction retrieved against others (q < 0.05): too few replicates for a p-value" in list(
        summary["measure"]
    )


def test_distinct_numbers_are_uniform():
    for count, limit in ((2, 50), (9, 12)):
        numbers = _distinct_numbers(count, limit, 4000, np.random.default_rng(0))
        assert all(len(set(row)) == count for row in numbers)
        assert np.bincount(numbers.ravel(), minlength=limit).std() < 0.15 * 4000 * count / limit


@pytest.mark.slow
def test_evaluate_retrieval_memory_of_nine_thousand_wells(tmp_path):
    """Run 24 plates of 384 wells in a separate process."""
    code = f"""
import resource, sys
import numpy as np, pandas as pd
from perturbjax.evaluation.retrieval import evaluate_retrieval
rng = np.random.default_rng(0)
compounds = ["DMSO"] * 64 + [f"c{{n}}" for n in range(320)]
wells = [f"{{'ABCDEFGHIJKLMNOP'[n // 24]}}{{n % 24 + 1:02d}}" for n in range(384)]
tables = []
for plate in range(24):
    kinds = rng.permutation(compounds)
    moa = ["" if k == "DMSO" else f"m{{int(k[1:]) % 40}}" for k in kinds]
    columns = {{"Metadata_Plate": f"P{{plate}}", "Metadata_Well": wells}}
    columns |= {{"Metadata_pert_iname": kinds, "Metadata_moa": moa}}
    tables.append(pd.DataFrame(columns))
table = pd.concat(tables, ignore_index=True)
features = pd.DataFrame(rng.normal(size=(len(table), 384)), columns=[f"f{{n}}" for n in range(384)])
evaluate_retrieval(pd.concat([table, features], axis=1), {str(tmp_path)!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=500
    )
    assert int(done.stdout) < 2e6  # kilobytes


def test_negative_controls_use_column_or_vehicle_name():
    table = pd.DataFrame(
        {"Metadata_pert_iname": ["DMSO", "taxol", "x"], "Metadata_control_type": ["", "", "negcon"]}
    )
    assert negative_controls(table).tolist() == [False, False, True]
    assert negative_controls(table.drop(columns="Metadata_control_type")).tolist() == [
        True,
        False,
        False,
    ]


def test_evaluate_retrieval_omits_unavailable_measures(tmp_path):
    table = screen(3.0)
    result = evaluate_retrieval(table, tmp_path)
    # One layout, every compound in the same well: NSS and NSL are not available.
    assert list(result["measure"]) == [
        "replicates, mAP against controls",
        "fraction retrieved against controls (q < 0.05)",
        *(
            f"{measure} against others{setting}{suffix}"
            for setting in ("", ", NSB")
            for measure, suffix in (
                ("replicates, mAP", ""),
                ("replicates, recall at 1 %", ""),
                ("fraction retrieved", " (q < 0.05)"),
            )
        ),
        "mechanism of the nearest well, NSC",
        "mechanism of the nearest well, NSCB, a batch a plate",
    ]
    assert len(pd.read_csv(tmp_path / "retrieval.csv")) == len(result)
    per_class = pd.read_csv(tmp_path / "retrieval_per_class.csv", keep_default_na=False)
    assert set(per_class["against"]) == {"controls", "others"} and set(
        per_class["restriction"]
    ) == {"NR", "NSB"}
    single = table[table["Metadata_Plate"] == "P0"].drop(columns="Metadata_moa")
    assert evaluate_retrieval(single, tmp_path).empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="Metadata_Well"), "no column Metadata_Well"),
        (lambda t: t.drop(columns=[f"f{i}" for i in range(20)]), "no numeric column"),
        (lambda t: t.assign(f3=np.nan), "row 0, column 'f3' is not finite"),
        (lambda t: t.drop(columns="Metadata_pert_iname"), "no column Metadata_pert_iname"),
    ],
)
def test_well_profiles_rejects_unusable_features(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        evaluate_retrieval(change(screen(1.0)), tmp_path)


@pytest.mark.shared
def test_replicate_retrieval_equals_copairs_on_real_profiles(shared):
    """Four CPJUMP1 plates. Reference: copairs 0.5.2 on the same standardized profiles and
    controls: mean 0.502096, fraction of compounds with corrected p < 0.05 0.513245."""
    files = sorted((shared / "data" / "cpjump1_profiles").glob("*.csv.gz"))
    table = pd.concat([pd.read_csv(file) for file in files], ignore_index=True).dropna(
        axis=1, how="all"
    )
    features = [c for c in table.columns if not c.startswith("Metadata_")]
    table = table.drop(columns=[c for c in features if not np.isfinite(table[c]).all()])
    metadata, profiles = well_profiles(table)
    result = replicate_retrieval(profiles, metadata, negative_controls(metadata))
    assert result["map"].mean() == pytest.approx(0.502096, abs=1e-6)
    assert (result["q"] < 0.05).mean() == pytest.approx(0.513245, abs=0.02)

"""Inner folds look at training plates alone, and every variant is judged on all of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments.inner_folds import INNER, PRESET, as_markdown, inner_parts, scores
from perturbjax.data.splits import TEST, make_split


@pytest.fixture
def metadata() -> pd.DataFrame:
    plates = np.repeat([f"P{i}" for i in range(15)], 12)
    site = [f"s{i}" for i in range(180)]
    return pd.DataFrame(
        {"site_id": site, "Metadata_Plate": plates, "Metadata_Well": "A01", "moa": list("abc") * 60}
    )


@pytest.mark.parametrize("fold", [0, 4])
def test_plates_that_judge_outside_are_never_seen_inside(metadata, fold):
    outer = make_split(metadata, "plate", label="moa", folds=5, fold=fold, seed=0)
    judges = np.flatnonzero(outer["part"] == TEST)
    parts = list(inner_parts(metadata, "moa", fold))
    assert len(parts) == INNER
    for fit, held, groups in parts:
        assert not set(judges) & (set(fit) | set(held))
        assert not set(metadata["Metadata_Plate"].iloc[fit]) & set(
            metadata["Metadata_Plate"].iloc[held]
        )
        assert list(groups) == list(metadata["Metadata_Plate"].iloc[fit])
    assert sorted(np.concatenate([held for _, held, _ in parts])) == sorted(
        set(range(180)) - set(judges)
    )


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score

    truth, said = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0, 1, 1, 0, 2])
    assert scores(truth, said)["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(truth, said)
    )


def test_the_table_counts_where_a_variant_is_better():
    rows = [(PRESET, 0, 0.5), ("other", 0, 0.6), (PRESET, 1, 0.5), ("other", 1, 0.4)]
    found = pd.DataFrame(
        [{"variant": v, "part": p, "accuracy": s, "balanced_accuracy": s} for v, p, s in rows]
    )
    assert as_markdown(found).splitlines()[-1] == "| other | 2 | 0.500 | 0.500 | 1 |"

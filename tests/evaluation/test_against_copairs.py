"""mAP and p-values equal copairs (Kalinin et al. 2025) under every restriction."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from copairs.map import average_precision, mean_average_precision

from perturbjax.evaluation.retrieval import replicate_retrieval

PERT, PLATE, WELL, LAYOUT, CONTROL = (
    f"Metadata_{name}" for name in ("pert_iname", "Plate", "Well", "layout", "own")
)
#: Restrictions as column lists of copairs.
DIFFERENT = {"NR": [], "NSB": [PLATE], "NSS": [WELL], "NSL": [LAYOUT]}


@pytest.fixture(scope="module")
def wells() -> tuple[pd.DataFrame, np.ndarray]:
    """Simulate two plates of each of two layouts, with weak effects."""
    rng = np.random.default_rng(1)
    rows = []
    for plate in range(4):
        names = ["DMSO"] * 4 + [f"c{i}" for i in range(8)] + [f"c{i}" for i in range(3)]
        order = np.random.default_rng(plate // 2).permutation(len(names))
        rows += [
            (f"P{plate}", f"A{spot + 1:02d}", names[number], f"L{plate // 2}")
            for spot, number in enumerate(order)
        ]
    table = pd.DataFrame(rows, columns=[PLATE, WELL, PERT, LAYOUT])
    effects = {
        name: rng.normal(size=12) * (name != "DMSO") for name in sorted(table[PERT].unique())
    }
    features = np.array([effects[name] for name in table[PERT]]) * 0.6 + rng.normal(
        size=(len(table), 12)
    )
    return table, features


def run_copairs(
    table: pd.DataFrame, features: np.ndarray, same: list[str], **pairs: list[str]
) -> pd.DataFrame:
    """Compute mAP and p of each compound with copairs."""
    result = average_precision(
        table, features, same, distance="cosine", progress_bar=False, **pairs
    )
    result = result[(result[PERT] != "DMSO") & (result["n_pos_pairs"] > 0)]
    options = {"null_size": 10_000, "threshold": 0.05, "seed": 0, "progress_bar": False}
    return mean_average_precision(result, [PERT], **options).set_index(PERT).sort_index()


def check(own: pd.DataFrame, theirs: pd.DataFrame) -> None:
    own = own.set_index("label").sort_index()
    assert list(own.index) == list(theirs.index)
    np.testing.assert_allclose(own["map"], theirs["mean_average_precision"], rtol=1e-5)
    tested = own["p"].notna()  # copairs has no minimum number of rankings
    assert tested.any()
    np.testing.assert_allclose(own["p"][tested], theirs["p_value"][tested], atol=0.02)


def test_replicate_retrieval_against_controls_equals_copairs(wells):
    table, features = wells
    control = table[PERT] == "DMSO"
    table = table.assign(**{CONTROL: np.where(control, np.arange(len(table)), -1)})
    pairs = {"pos_diffby": [], "neg_sameby": [PLATE], "neg_diffby": [PERT, CONTROL]}
    check(
        replicate_retrieval(features, table, control.to_numpy()),
        run_copairs(table, features, [PERT, CONTROL], **pairs),
    )


@pytest.mark.parametrize("restriction", DIFFERENT)
def test_replicate_retrieval_against_others_equals_copairs(wells, restriction):
    table, features = wells
    treated = (table[PERT] != "DMSO").to_numpy()
    restricted = DIFFERENT[restriction]
    own = replicate_retrieval(features, table, ~treated, against="others", restriction=restriction)
    pairs = {"pos_diffby": restricted, "neg_sameby": [], "neg_diffby": [PERT, *restricted]}
    check(own, run_copairs(table[treated], features[treated], [PERT], **pairs))


def test_mechanism_consistency_equals_copairs(wells):
    """Replicates of a mechanism are its compounds, one profile each."""
    table, features = wells
    treated = (table[PERT] != "DMSO").to_numpy()
    profiles = pd.DataFrame(features[treated]).groupby(table[PERT][treated].to_numpy()).mean()
    mechanism = [f"m{int(name[1:]) // 3}" for name in profiles.index]
    compounds = pd.DataFrame({PERT: mechanism, PLATE: "all", WELL: profiles.index})
    own = replicate_retrieval(
        profiles.to_numpy(), compounds, np.zeros(len(compounds), dtype=bool), against="others"
    )
    theirs = run_copairs(
        compounds, profiles.to_numpy(), [PERT], pos_diffby=[], neg_sameby=[], neg_diffby=[PERT]
    )
    own = own.set_index("label").sort_index()
    np.testing.assert_allclose(own["map"], theirs["mean_average_precision"], rtol=1e-5)

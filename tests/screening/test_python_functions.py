"""`perturbjax.hits`, `doses`, `similar` and `differences` on tables, AnnData and files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import perturbjax
from perturbjax import cli
from perturbjax.core.errors import InputError
from perturbjax.profiles import cell_tables
from screening.simulated_wells import simulate_wells


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    effects = {"strong": 4.0, "also strong": 4.0, "inactive": 0.0}
    wells = simulate_wells(treatments=effects, plates=2, replicates=4, controls=12)
    profiles = pd.DataFrame(wells.values, columns=list(wells.features))
    dose = np.where(wells.control, "", np.resize(["10 nM", "1 uM"], len(profiles)))
    return pd.concat([wells.metadata.assign(Metadata_dose=dose), profiles], axis=1)


def to_anndata(table: pd.DataFrame):
    import anndata

    names = [name for name in table if name.startswith("feature")]
    obs = table.drop(columns=names).set_index(table.index.astype(str))
    return anndata.AnnData(table[names].to_numpy(), obs=obs, var=pd.DataFrame(index=names))


def test_hits_gives_one_result_for_table_anndata_and_file(table, tmp_path):
    table.to_parquet(tmp_path / "profiles.parquet", index=False)
    sources = (table, to_anndata(table), tmp_path / "profiles.parquet")
    results = [perturbjax.hits(source, permutations=999) for source in sources]
    assert results[0].equals(results[1]) and results[0].equals(results[2])
    active = results[0].set_index("treatment")["active"].to_dict()
    assert active == {"strong": True, "also strong": True, "inactive": False}


def test_hits_counts_cells_as_one_well(table):
    """Rows of cells are no replicates: copies of every row do not change the result."""
    cells = pd.concat([table, table, table], ignore_index=True)
    columns = ["map", "energy_distance", "mahalanobis", "mahalanobis_p"]
    one, many = (perturbjax.hits(t, permutations=999) for t in (table, cells))
    pd.testing.assert_frame_equal(one[columns], many[columns])
    assert (many["cell_count_ratio"] == 1).all()


def test_large_cell_tables_are_aggregated_by_blocks_of_columns(table, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    cells = pd.concat([table] * 5, ignore_index=True).sample(frac=1, random_state=0)
    names = [name for name in cells if name.startswith("feature")]
    cells[names] += rng.normal(size=(len(cells), len(names)))
    cells.iloc[3, -1] = np.inf
    cells.to_parquet(tmp_path / "cells.parquet", index=False, row_group_size=20)
    whole = perturbjax.differences(tmp_path / "cells.parquet", treatments=("strong",))
    monkeypatch.setattr(cell_tables, "MAX_ROWS", 50)
    monkeypatch.setattr(cell_tables, "BLOCK_VALUES", 3 * len(cells))
    blocks = perturbjax.differences(tmp_path / "cells.parquet", treatments=("strong",))
    pd.testing.assert_frame_equal(whole, blocks)


def test_doses_similar_and_differences_return_tables(table):
    doses = perturbjax.doses(table, "Metadata_dose", response="feature_1")
    assert set(doses["treatment"]) == {"strong", "also strong", "inactive"}
    neighbors = perturbjax.similar(table, neighbors=1).set_index("treatment")
    assert neighbors.loc["strong", "neighbor"] == "also strong"
    features = perturbjax.differences(table, treatments=("strong",))
    assert features["feature"].iloc[0] == "feature_1"


def test_hits_refuses_other_objects_and_wells_with_two_treatments(table):
    with pytest.raises(InputError, match="table: is list"):
        perturbjax.hits([1, 2])
    twice = table.assign(Metadata_Site=[str(n % 2) for n in range(len(table))])
    twice.loc[1, ["Metadata_Plate", "Metadata_Well"]] = twice.loc[
        0, ["Metadata_Plate", "Metadata_Well"]
    ].to_numpy()
    twice.loc[1, "Metadata_pert_iname"] = "other"
    with pytest.raises(InputError, match="has several values"):
        perturbjax.hits(twice)


@pytest.mark.parametrize(
    "command",
    [
        "hits --permutations 999",
        "doses --dose-column Metadata_dose --response feature_1",
        "similar --neighbors 1",
        "differences",
    ],
)
def test_command_writes_one_anndata_file(table, tmp_path, command):
    import anndata

    table.to_parquet(tmp_path / "profiles.parquet", index=False)
    out = tmp_path / "result.h5ad"
    words = [*command.split(), "--features", str(tmp_path / "profiles.parquet"), "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    result = anndata.read_h5ad(out)
    assert set(result.obs_names) == {"strong", "also strong", "inactive"}
    assert np.isfinite(result.X).all() and result.n_vars > 0

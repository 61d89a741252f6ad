"""Write the tables of the screening commands: CSV files in a folder, or one AnnData file.

AnnData has one row per treatment. Text and numbers of the main table are `obs`, further tables are
`uns`. X has the profile relative to the controls (hits, doses), the similarities (similar) or
the effect of every feature (differences).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.core.files import atomic, make_folder, write_csv, write_json, write_parquet
from perturbjax.profiles.feature_files import require_anndata
from perturbjax.screening.results import (
    DifferencesResult,
    DosesResult,
    HitsResult,
    SimilarResult,
)
from perturbjax.screening.wells import Wells, scale_to_controls


def write_hits(result: HitsResult, out: Path) -> None:
    """Write hits.csv, hits.parquet and summary.json, or one AnnData file.

    Args:
        result: result of `find_hits`.
        out: folder or `.h5ad` file.
    """
    summary = {
        "verdict": result.sentences()[0],
        "fdr": result.fdr,
        "controls": result.control_rates,
    }
    if out.suffix == ".h5ad":
        values, features = _treatment_profiles(result.wells, result.table["treatment"])
        return _write_anndata(out, result.table, values, features, {"summary": summary})
    make_folder(out)
    write_csv(out / "hits.csv", result.table)
    write_parquet(out / "hits.parquet", result.table)
    write_json(out / "summary.json", summary)


def write_doses(result: DosesResult, out: Path) -> None:
    """Write doses.csv and wells.csv, or one AnnData file.

    Args:
        result: result of `fit_doses`.
        out: folder or `.h5ad` file.
    """
    if out.suffix == ".h5ad":
        values, features = _treatment_profiles(result.wells, result.table["treatment"])
        return _write_anndata(out, result.table, values, features, {"wells": result.values})
    make_folder(out)
    write_csv(out / "doses.csv", result.table)
    write_csv(out / "wells.csv", result.values)


def write_similar(result: SimilarResult, out: Path) -> None:
    """Write neighbors.csv, similarity.csv and enrichment.csv, or one AnnData file.

    Args:
        result: result of `find_similar`.
        out: folder or `.h5ad` file.
    """
    if out.suffix == ".h5ad":
        table = pd.DataFrame({"treatment": result.matrix.index})
        table["mechanism"] = [result.mechanism.get(name, "") for name in table["treatment"]]
        tables = {"neighbors": result.neighbors, "enrichment": result.enrichment}
        return _write_anndata(out, table, result.matrix.to_numpy(), result.matrix.columns, tables)
    make_folder(out)
    write_csv(out / "neighbors.csv", result.neighbors)
    write_csv(out / "similarity.csv", result.matrix.rename_axis("treatment").reset_index())
    if len(result.enrichment):
        write_csv(out / "enrichment.csv", result.enrichment)


def write_differences(result: DifferencesResult, out: Path) -> None:
    """Write differences.csv, groups.csv and summary.csv, or one AnnData file.

    Args:
        result: result of `find_differences`.
        out: folder or `.h5ad` file.
    """
    if out.suffix == ".h5ad":
        wide = {
            column: result.features.pivot(index="treatment", columns="feature", values=column).loc[
                result.summary["treatment"], list(result.wells.features)
            ]
            for column in ("effect", "ratio", "p", "q")
        }
        layers = {name: wide[name].to_numpy() for name in ("ratio", "p", "q")}
        effect = wide["effect"]
        return _write_anndata(
            out,
            result.summary,
            effect.to_numpy(),
            effect.columns,
            {"groups": result.groups},
            layers,
        )
    make_folder(out)
    write_csv(out / "differences.csv", result.features)
    write_csv(out / "groups.csv", result.groups)
    write_csv(out / "summary.csv", result.summary)


def _treatment_profiles(wells: Wells, names: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Mean well profile of each treatment, in standard deviations of the controls."""
    treated = ~wells.control
    means = pd.DataFrame(scale_to_controls(wells)[treated]).groupby(
        wells.treatment[treated].to_numpy()
    )
    return means.mean().loc[names].to_numpy(), list(wells.features)


def _write_anndata(
    path: Path,
    table: pd.DataFrame,
    values: np.ndarray,
    names: pd.Index | list[str],
    tables: dict[str, object],
    layers: dict[str, np.ndarray] | None = None,
) -> None:
    require_anndata("--out")
    import anndata

    obs = table.set_index("treatment")
    # AnnData stores neither mixed types nor pd.NA.
    obs = obs.apply(lambda c: c.fillna("").astype(str) if c.dtype == object else c)
    uns = {
        name: one.set_axis(one.index.astype(str)) if isinstance(one, pd.DataFrame) else one
        for name, one in tables.items()
    }
    var = pd.DataFrame(index=pd.Index([str(name) for name in names]))
    content = anndata.AnnData(
        np.asarray(values, dtype=np.float32), obs=obs, var=var, uns=uns, layers=layers or {}
    )
    with atomic(path) as temporary:
        content.write_h5ad(temporary)

"""The commands `hits`, `doses`, `similar` and `differences`: read wells, compute, write files."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.files import make_folder, write_csv, write_json, write_parquet
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE, WELL
from perturbjax.core.progress import track
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.screening import doses as dose_response
from perturbjax.screening import hits as hit_calling
from perturbjax.screening.differences import (
    describe,
    difference_table,
    feature_spread,
    group_table,
)
from perturbjax.screening.screen_inputs import load_wells
from perturbjax.screening.screen_options import (
    DifferencesConfig,
    DosesConfig,
    HitsConfig,
    SimilarConfig,
)
from perturbjax.screening.similarity import (
    cluster_order,
    mechanism_enrichment,
    neighbor_table,
    relative_to_controls,
    similarity_matrix,
)
from perturbjax.screening.wells import Wells, parse_doses


def find_hits(config: HitsConfig) -> pd.DataFrame:
    """Test every treatment and write the hit list.

    Args:
        config: input, output folder, false discovery rate and permutations.

    Returns:
        The table of `hits.hit_table`.

    Raises:
        InputError: the input cannot be read, or no treatment can be tested.
    """
    wells = load_wells(config.screen, dose_column=config.dose_column)
    settings = hit_calling.Settings(config.permutations, config.fdr, config.seed)
    table = hit_calling.hit_table(wells, settings)
    # 999 permutations are enough to compare p with 0.05.
    rates = hit_calling.control_test(wells, dataclasses.replace(settings, permutations=999))
    sentence = hit_calling.verdict(table, config.fdr)
    console.print(sentence)
    console.print(describe_calibration(rates))
    out = make_folder(config.out)
    write_csv(out / "hits.csv", table)
    write_parquet(out / "hits.parquet", table)
    summary = {"verdict": sentence, "fdr": config.fdr, "controls": rates}
    write_json(out / "summary.json", summary)
    return table


def describe_calibration(rates: dict[str, float]) -> str:
    """State how often random control wells were called different."""
    count = int(rates["draws"])
    if not count:
        return "info: too few controls to check the calibration on this screen"
    parts = [
        f"{name.replace('_', ' ')} {rates[name]:.0%}"
        for name in hit_calling.METHODS
        if math.isfinite(rates[name])
    ]
    return (
        f"info: calibration on {count} random sets of control wells: p <= 0.05 in "
        f"{', '.join(parts)} (expected 5%)"
    )


def fit_doses(config: DosesConfig) -> pd.DataFrame:
    """Analyze the dose response of every treatment and write table and well values.

    Args:
        config: input, output folder, dose column and response.

    Returns:
        One row per treatment: `treatment`, `wells`, `doses`, `outcome`, `trend`, `p`, `q`
        (Benjamini-Hochberg), `ec50_text`, `ec50`, `ec50_low`, `ec50_high`, `bottom`, `top`,
        `slope`, `max_effect`, `lowest_effective_dose`. Doses are in micromolar.

    Raises:
        InputError: the input cannot be read, or no treatment has two doses.
    """
    wells = load_wells(config.screen)
    values = well_responses(wells, config)
    values = values[np.isfinite(values["response"])]
    treated = values[~values["control"] & (values["dose"] > 0)]
    names = [n for n, rows in treated.groupby("treatment") if rows["dose"].nunique() >= 2]
    if not names:
        raise InputError(
            f"--dose-column {config.dose_column}: no treatment has two doses greater than 0"
        )
    rows, results = [], {}
    for name in track(names, total=len(names), label="Fitting curves", unit="treatments"):
        own = values[(values["treatment"] == name) & (values["dose"] > 0)]
        # Negative controls on the plates of this treatment count as dose 0.
        zero = values[
            values["control"] & ~(values["dose"] > 0) & values["plate"].isin(own["plate"])
        ]
        # Doses of controls are empty or 0 and are filled with 0 below.
        both = pd.concat([own, zero])
        results[name] = dose_response.analyze_dose_response(
            both["dose"].fillna(0).to_numpy(),
            both["response"].to_numpy(),
            pd.factorize(both["plate"])[0],
            seed=config.seed,
        )
        rows.append({"treatment": name, "wells": results[name].wells, "doses": results[name].doses})
    table = pd.DataFrame(rows)
    table["p"] = [results[name].p for name in names]
    # One trend test per treatment, corrected over all treatments.
    table["q"] = dose_response.adjust(table["p"])
    ranges = [_dose_range(values, name) for name in names]
    ordered = list(zip(names, ranges, table["q"], strict=True))
    table["outcome"] = [dose_response.outcome(results[n], r, q) for n, r, q in ordered]
    table["ec50_text"] = [
        dose_response.describe_ec50(results[n], r) if text.startswith("response") else ""
        for (n, r, _), text in zip(ordered, table["outcome"], strict=True)
    ]
    for column in ("trend", "ec50_low", "ec50_high", "max_effect", "lowest_effective_dose"):
        table[column] = [getattr(results[name], column) for name in names]
    for column in ("bottom", "top", "ec50", "slope"):
        table[column] = [getattr(results[name].curve, column, math.nan) for name in names]
    out = make_folder(config.out)
    write_csv(out / "doses.csv", table)
    write_csv(out / "wells.csv", values)
    responding = int(table["outcome"].str.startswith("response").sum())
    console.print(f"{responding} of {len(table)} treatments respond to the dose (FDR 5%).")
    return table


def _dose_range(values: pd.DataFrame, name: str) -> tuple[float, float]:
    dose = values.loc[(values["treatment"] == name) & (values["dose"] > 0), "dose"]
    return float(dose.min()), float(dose.max())


def well_responses(wells: Wells, config: DosesConfig) -> pd.DataFrame:
    """Return plate, well, treatment, dose, control and response of every well.

    Args:
        wells: profiles of the screen.
        config: dose column, response, and the table before treatment.

    Raises:
        InputError: the response is no feature of the profiles, or a well is missing before
            treatment.
    """
    metadata = wells.metadata
    if config.dose_column not in metadata.columns:
        shown = ", ".join(c for c in metadata.columns if c.startswith("Metadata_"))
        raise InputError(f"--dose-column {config.dose_column}: not found (available: {shown})")
    table = pd.DataFrame(
        {
            "plate": metadata[PLATE],
            "well": metadata[WELL],
            "treatment": wells.treatment,
            "dose": parse_doses(metadata[config.dose_column]),
            "control": wells.control,
            "response": _response(wells, config.response),
        }
    )
    if config.baseline is not None:
        before = read_profiles([config.baseline], "median")
        if config.response not in before.names:
            raise InputError(f"--baseline {config.baseline}: has no feature {config.response}")
        keys = before.metadata[PLATE] + "\n" + before.metadata[WELL]
        start = pd.Series(before.values[:, before.names.index(config.response)], index=keys)
        own = table["plate"] + "\n" + table["well"]
        missing = ~own.isin(start.index)
        if missing.any():
            first = table[missing].iloc[0]
            raise InputError(
                f"--baseline {config.baseline}: plate {first['plate']}, well {first['well']} is "
                "missing"
            )
        # Relative to the same well before treatment.
        table["response"] /= start.reindex(own).to_numpy()
    return table


def _response(wells: Wells, name: str) -> np.ndarray:
    if name == "cell_count":
        if wells.cell_count is None:
            raise InputError("--response cell_count: the profiles have no cell count")
        return wells.cell_count
    if name == "distance":
        relative = relative_to_controls(wells)
        spread = relative[wells.control].std(axis=0, ddof=1)
        keep = spread > 1e-9
        # Root mean square over components, in standard deviations of the controls.
        return np.sqrt(((relative[:, keep] / spread[keep]) ** 2).mean(axis=1))
    if name not in wells.features:
        shown = ", ".join(wells.features[:5])
        raise InputError(
            f"--response {name}: not found. Pass distance, cell_count or a feature ({shown}, ...)."
        )
    return wells.values[:, wells.features.index(name)]


def find_similar(config: SimilarConfig) -> pd.DataFrame:
    """Compute neighbors, similarities and enrichment of mechanisms, and write the tables.

    Args:
        config: input, output folder and restriction.

    Returns:
        The table of `similarity.neighbor_table`.

    Raises:
        InputError: the input cannot be read.
    """
    wells = load_wells(config.screen)
    table = neighbor_table(
        wells, restriction=config.restriction, top=config.neighbors, seed=config.seed
    )
    matrix = similarity_matrix(wells, config.restriction)
    order = cluster_order(matrix)
    out = make_folder(config.out)
    write_csv(out / "neighbors.csv", table)
    write_csv(
        out / "similarity.csv", matrix.loc[order, order].rename_axis("treatment").reset_index()
    )
    if config.mechanism_column in wells.metadata.columns:
        column = wells.metadata[config.mechanism_column]
        named = ~wells.control & (column != "").to_numpy()
        mechanism = dict(zip(wells.treatment[named], column[named], strict=True))
        enrichment = mechanism_enrichment(table, mechanism)
        write_csv(out / "enrichment.csv", enrichment)
        own = [
            mechanism.get(t) == mechanism.get(n)
            for t, n in table.loc[table["rank"] == 1, ["treatment", "neighbor"]].itertuples(
                index=False
            )
            if t in mechanism and n in mechanism
        ]
        if own:
            console.print(
                f"{np.mean(own):.0%} of {len(own)} treatments have a nearest neighbor with the "
                "same mechanism."
            )
    pairs = int((table["q"] <= 0.05).sum())
    console.print(f"{pairs} neighbor pairs are more similar than random controls (FDR 5%).")
    return table


def find_differences(config: DifferencesConfig) -> pd.DataFrame:
    """Compare every treatment with its controls feature by feature, and write the tables.

    Args:
        config: input, output folder and treatments.

    Returns:
        One row per treatment: `treatment`, `changed` (fraction of features with q <= 0.05) and
        `description`.

    Raises:
        InputError: the input cannot be read, or a treatment does not exist.
    """
    wells = load_wells(config.screen)
    names = config.treatments or tuple(sorted(wells.treatment[~wells.control].unique()))
    # The spread is the same for all treatments, so compute it once.
    spread = feature_spread(wells)
    tables, groups, rows = [], [], []
    for name in track(names, total=len(names), label="Comparing treatments", unit="treatments"):
        table = difference_table(wells, name, spread)
        tables.append(table.assign(treatment=name))
        groups.append(group_table(table).assign(treatment=name))
        changed = float((table["q"] <= 0.05).mean())
        rows.append({"treatment": name, "changed": changed, "description": describe(table)})
    summary = pd.DataFrame(rows).sort_values("changed", ascending=False, ignore_index=True)
    out = make_folder(config.out)
    write_csv(out / "differences.csv", pd.concat(tables))
    write_csv(out / "groups.csv", pd.concat(groups))
    write_csv(out / "summary.csv", summary)
    for row in summary.head(10).itertuples():
        console.print(f"{row.treatment}: {row.description}")
    return summary

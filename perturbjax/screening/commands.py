"""The commands `hits`, `doses`, `similar` and `differences`: read wells and compute results."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.core.errors import InputError
from perturbjax.core.plates import BATCH, PLATE, WELL
from perturbjax.core.progress import track
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.profile_table import METADATA
from perturbjax.screening import doses as dose_response
from perturbjax.screening import hits as hit_calling
from perturbjax.screening.differences import (
    describe,
    difference_table,
    feature_spread,
    group_table,
)
from perturbjax.screening.permutations import adjust
from perturbjax.screening.results import (
    DifferencesResult,
    DosesResult,
    HitsResult,
    SimilarResult,
)
from perturbjax.screening.screen_inputs import add_reference, load_measured_wells, load_wells
from perturbjax.screening.screen_options import (
    DifferencesConfig,
    DosesConfig,
    HitsConfig,
    SimilarConfig,
)
from perturbjax.screening.similarity import (
    cluster_tree,
    match_mechanisms,
    mechanism_enrichment,
    mechanism_scores,
    neighbor_table,
    relative_to_controls,
    similarity_matrix,
)
from perturbjax.screening.wells import Wells, metadata_column, parse_doses, treatment_values


def find_hits(config: HitsConfig) -> HitsResult:
    """Read the wells and test every treatment.

    Args:
        config: input, false discovery rate and permutations.

    Raises:
        InputError: the input cannot be read, or no treatment can be tested.
    """
    wells = load_wells(config.screen, dose_column=config.dose_column, poscon=config.poscon)
    settings = hit_calling.Settings(config.permutations, config.fdr, config.seed)
    return compute_hits(wells, settings)


def compute_hits(wells: Wells, settings: hit_calling.Settings) -> HitsResult:
    """Test every treatment, and check the calibration with control wells.

    Args:
        wells: profiles of a screen.
        settings: permutations, false discovery rate and seed.
    """
    screen = hit_calling.Screen(wells, settings)
    table = hit_calling.call_hits(screen)
    # 999 permutations are enough to compare p with 0.05.
    rates = hit_calling.rate_controls(screen.with_permutations(999))
    return HitsResult(wells, table, rates, settings.fdr)


def fit_doses(config: DosesConfig) -> DosesResult:
    """Read the wells and analyze the dose response of every treatment.

    Args:
        config: input, dose column and response.

    Raises:
        InputError: the input cannot be read, or no treatment has two doses.
    """
    # Only the distance needs negative controls.
    wells = load_wells(config.screen, needs_controls=config.response == "distance")
    return compute_doses(
        wells,
        dose_column=config.dose_column,
        response=config.response,
        baseline=config.baseline,
        seed=config.seed,
    )


def compute_doses(
    wells: Wells,
    *,
    dose_column: str,
    response: str = "distance",
    baseline: Path | str | pd.DataFrame | None = None,
    seed: int = 0,
) -> DosesResult:
    """Analyze the dose response of every treatment.

    Args:
        wells: profiles of a screen.
        dose_column: column with the concentration.
        response: distance, cell_count, or the name of a feature.
        baseline: table of the same wells before treatment.
        seed: of permutations and resamples.

    Returns:
        The result. Its table has one row per treatment: `treatment`, `wells`, `doses`, `outcome`,
        `trend`, `p`, `q` (Benjamini-Hochberg), `ec50_text`, `ec50`, `ec50_low`, `ec50_high`,
        `bottom`, `top`, `slope`, `max_effect`, `lowest_effective_dose`. Doses are in micromolar.

    Raises:
        InputError: no treatment has two doses, or a column, response or well is missing.
    """
    values = well_responses(wells, dose_column, response, baseline)
    values = values[np.isfinite(values["response"])]
    treated = values[values["dose"] > 0]
    names = [n for n, rows in treated.groupby("treatment") if rows["dose"].nunique() >= 2]
    if not names:
        raise InputError(f"--dose-column {dose_column}: no treatment has two doses greater than 0")
    rows, results = [], {}
    for name in track(names, total=len(names), label="Fitting curves", unit="treatments"):
        own = values[(values["treatment"] == name) & (values["dose"] > 0)]
        # Negative controls on the plates of this treatment have dose 0.
        zero = values[values["control"] & values["plate"].isin(own["plate"])]
        both = pd.concat([own, zero])
        results[name] = dose_response.analyze_dose_response(
            both["dose"].to_numpy(),
            both["response"].to_numpy(),
            pd.factorize(both["plate"])[0],
            seed=seed,
        )
        rows.append({"treatment": name, "wells": results[name].wells, "doses": results[name].doses})
    table = pd.DataFrame(rows)
    table["p"] = [results[name].p for name in names]
    # One trend test per treatment, corrected over all treatments.
    table["q"] = adjust(table["p"])
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
    return DosesResult(wells, table, values.reset_index(drop=True), results, response)


def _dose_range(values: pd.DataFrame, name: str) -> tuple[float, float]:
    dose = values.loc[(values["treatment"] == name) & (values["dose"] > 0), "dose"]
    return float(dose.min()), float(dose.max())


def well_responses(
    wells: Wells, dose_column: str, response: str, baseline: Path | str | pd.DataFrame | None
) -> pd.DataFrame:
    """Return plate, well, treatment, dose, control and response of every well.

    Args:
        wells: profiles of the screen.
        dose_column: column with the concentration.
        response: distance, cell_count, or the name of a feature.
        baseline: table of the same wells before treatment.

    Raises:
        InputError: the response is no feature of the profiles, or a well is missing before
            treatment.
    """
    metadata = wells.metadata
    table = pd.DataFrame(
        {
            "plate": metadata[PLATE],
            "well": metadata[WELL],
            "treatment": wells.treatment,
            "dose": parse_doses(metadata_column(metadata, dose_column, "dose-column")),
            "control": wells.control,
            "response": _response(wells, response),
        }
    )
    # Controls with a series of doses are analyzed like treatments; other controls have dose 0.
    doses = table[table["dose"] > 0].groupby("treatment")["dose"].nunique()
    table["control"] &= ~table["treatment"].isin(doses.index[doses >= 2])
    table.loc[table["control"], "dose"] = 0.0
    if baseline is not None:
        before = read_profiles([baseline], "median")
        where = (
            "baseline: table" if isinstance(baseline, pd.DataFrame) else f"--baseline {baseline}"
        )
        if response not in before.names:
            raise InputError(f"{where}: has no feature {response}")
        keys = before.metadata[PLATE] + "\n" + before.metadata[WELL]
        start = pd.Series(before.values[:, before.names.index(response)], index=keys)
        own = table["plate"] + "\n" + table["well"]
        missing = ~own.isin(start.index)
        if missing.any():
            first = table[missing].iloc[0]
            raise InputError(f"{where}: plate {first['plate']}, well {first['well']} is missing")
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
        examples = ", ".join(wells.features[:5])
        raise InputError(
            f"--response {name}: not found. Pass distance, cell_count or a feature "
            f"({examples}, ...)."
        )
    return wells.values[:, wells.features.index(name)]


def find_similar(config: SimilarConfig) -> SimilarResult:
    """Read the wells and compute neighbors, similarities and enrichment of mechanisms.

    Args:
        config: input, restriction, reference and mechanism column.

    Raises:
        InputError: the input cannot be read.
    """
    wells = load_wells(config.screen, dose_column=config.dose_column)
    reference = None
    if config.reference:
        wells, reference = add_reference(wells, config.reference, config)
    return compute_similar(
        wells,
        restriction=config.restriction,
        neighbors=config.neighbors,
        mechanism_column=config.mechanism_column,
        seed=config.seed,
        reference=reference,
    )


def compute_similar(
    wells: Wells,
    *,
    restriction: str = "none",
    neighbors: int = 5,
    mechanism_column: str = "Metadata_moa",
    seed: int = 0,
    reference: np.ndarray | None = None,
) -> SimilarResult:
    """Compute neighbors, similarities, a dendrogram and enrichment of mechanisms.

    Args:
        wells: profiles of a screen.
        restriction: see `similarity.similarity_matrix`.
        neighbors: neighbors per treatment.
        mechanism_column: column with the mechanism; may be missing.
        seed: of the random control profiles.
        reference: wells of a reference table; neighbors then come only from it.
    """
    matrix = similarity_matrix(wells, restriction, reference)
    table = neighbor_table(
        wells, restriction=restriction, top=neighbors, seed=seed, reference=reference
    )
    tree, order = cluster_tree(matrix) if reference is None else (None, list(matrix.index))
    columns = order if reference is None else list(matrix.columns)
    mechanism: dict[str, str] = {}
    scores: dict[str, tuple[int, float, float]] = {}
    enrichment = pd.DataFrame()
    if mechanism_column in wells.metadata.columns:
        named = ~wells.control & (wells.metadata[mechanism_column] != "").to_numpy()
        mechanism = treatment_values(wells, mechanism_column, named)
        enrichment = mechanism_enrichment(table, mechanism, list(matrix.columns))
        if reference is None:
            scores = mechanism_scores(wells, mechanism, _batch_column(wells, restriction))
        else:
            scores = {"Reference": match_mechanisms(matrix, mechanism, has_reference=True)}
    return SimilarResult(
        wells=wells,
        neighbors=table,
        matrix=matrix.loc[order, columns],
        tree=tree,
        mechanism=mechanism,
        enrichment=enrichment,
        scores=scores,
        restriction=restriction,
        has_reference=reference is not None,
    )


def _batch_column(wells: Wells, restriction: str) -> str:
    """Return the column of the batch: that of the restriction, else Metadata_Batch, else none."""
    if restriction.startswith(METADATA):
        return restriction
    return BATCH if BATCH in wells.metadata.columns else ""


def find_differences(config: DifferencesConfig) -> DifferencesResult:
    """Read the wells and compare every treatment with its controls feature by feature.

    Args:
        config: input and treatments.

    Raises:
        InputError: the input cannot be read, or a treatment does not exist.
    """
    return compute_differences(load_measured_wells(config.screen), config.treatments)


def compute_differences(wells: Wells, treatments: tuple[str, ...] = ()) -> DifferencesResult:
    """Compare treatments with their controls feature by feature.

    Args:
        wells: profiles of a screen.
        treatments: names of treatments; by default all.

    Raises:
        InputError: a treatment has no well on a plate with controls.
    """
    names = treatments or tuple(sorted(wells.treatment[~wells.control].unique()))
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
    features, grouped = (pd.concat(parts, ignore_index=True) for parts in (tables, groups))
    return DifferencesResult(wells, summary, features, grouped)

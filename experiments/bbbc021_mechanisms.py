"""Match the mechanisms of BBBC021 treatments by nearest neighbors, on published profiles.

    python -m experiments.bbbc021_mechanisms --data DIR/bbbc021_profiles --out runs/mechanisms
    python -m experiments.bbbc021_mechanisms --features cells.parquet --out runs/mechanisms_cells

Each treatment (compound and concentration, without DMSO) has one profile. A treatment is matched if
its nearest neighbor by cosine similarity has the same mechanism. Neighbors are treatments of other
compounds (NSC, not same compound), or of other compounds imaged in other weeks (NSCB, not same
compound or batch). The batch is the week: the part of the plate name before `_`. Treatments without
a possible match are not counted. The 95 % intervals resample compounds, because concentrations of
one compound are correlated.

No constant was chosen on these treatments. Features of position and orientation are dropped by
name, standard deviations are those of the DMSO wells of a plate, and sphering uses the
regularization of `perturbjax classify`. The best of several pipelines on 103 treatments is biased
upwards by the choice.

Cost: seconds. Result: docs/audit.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.cli import parse_options
from perturbjax.core.errors import InputError, run_command
from perturbjax.core.messages import console
from perturbjax.core.options import require, require_output, require_sound
from perturbjax.core.plates import PLATE, WELL
from perturbjax.evaluation.retrieval import nearest_mechanisms
from perturbjax.profiles.profile_reader import read_profiles
from perturbjax.profiles.profile_table import Profiles, aggregate_to_wells

COMPOUND, CONCENTRATION, MOA, WEEK = (
    "Metadata_pert_iname",
    "Metadata_concentration_uM",
    "Metadata_moa",
    "week",
)
VEHICLE = "DMSO"
WELLS, IMAGES, MECHANISMS = (
    "ljosa_jbiomolscreen_2013_per_well_mean.csv.gz",
    "BBBC021_v1_image.csv.gz",
    "BBBC021_v1_moa.csv",
)
#: Name parts of CellProfiler features of position in the image and of orientation.
POSITION_FEATURES = ("Center_X", "Center_Y", "Orientation")


@dataclass(frozen=True)
class Config:
    """Match the mechanisms of BBBC021 treatments."""

    out: Path
    """Folder for mechanisms.csv and nearest.csv (one row per treatment)."""
    data: Path | None = None
    """Folder of the published profiles."""
    features: Path | None = None
    """Instead of --data: table of features with compound, concentration and mechanism."""
    replicates: int = 2000
    """Bootstrap replicates of each interval."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        one = (self.data is None) != (self.features is None)
        require("data", self.data, one, "given if --features is not, and only then")
        require("replicates", self.replicates, self.replicates >= 1, "at least one")


def main(options: Config) -> None:
    """Match the treatments with every pipeline; write and print the table."""
    profiles = read_published(options.data) if options.data else read_table(options.features)
    rows, nearest = [], []
    for name, pipeline in PIPELINES.items():
        try:
            treatments, values = pipeline(profiles)
        except InputError as error:
            console.print(f"info: {name}: skipped ({error})")
            continue
        for measure in ("NSC", "NSCB"):
            matches = match(treatments, values, other_week=measure == "NSCB")
            counted = matches[matches["chance"] > 0]
            if counted.empty:  # no two compounds of one mechanism, or not in two weeks
                continue
            low, high = interval(counted, options.replicates)
            scores = {
                "matched": counted["right"].mean(),
                "low": low,
                "high": high,
                "chance": counted["chance"].mean(),
            }
            rows.append(
                {"pipeline": name, "measure": measure, "treatments": len(counted), **scores}
            )
            nearest.append(matches.assign(pipeline=name, measure=measure))
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "mechanisms.csv", index=False)
    pd.concat(nearest).to_csv(options.out / "nearest.csv", index=False)
    print(table.round(3).to_string(index=False))


def read_published(data: Path) -> Profiles:
    """Read the CellProfiler means of each well with its treatment and mechanism."""
    for name in (WELLS, IMAGES, MECHANISMS):
        if not (data / name).is_file():
            raise InputError(f"--data {data}: has no {name}. Pass the folder of bbbc021_profiles.")
    wells = pd.read_csv(data / WELLS).rename(
        columns={"Image_Metadata_Plate": PLATE, "Image_Metadata_Well": WELL}
    )
    images = pd.read_csv(data / IMAGES).rename(
        columns={
            "Image_Metadata_Plate_DAPI": PLATE,
            "Image_Metadata_Well_DAPI": WELL,
            "Image_Metadata_Compound": COMPOUND,
            "Image_Metadata_Concentration": CONCENTRATION,
        }
    )
    treatments = images[[PLATE, WELL, COMPOUND, CONCENTRATION]].drop_duplicates([PLATE, WELL])
    mechanisms = pd.read_csv(data / MECHANISMS).set_axis([COMPOUND, CONCENTRATION, MOA], axis=1)
    metadata = wells[[PLATE, WELL]].merge(treatments, how="left").merge(mechanisms, how="left")
    names = [column for column in wells.columns if column not in (PLATE, WELL)]
    metadata = metadata.fillna({MOA: ""}).astype({CONCENTRATION: str})
    metadata.insert(0, "site_id", metadata[PLATE] + "_" + metadata[WELL])
    return Profiles(metadata, wells[names].to_numpy(np.float32), tuple(names))


def read_table(path: Path | None) -> Profiles:
    """Read a table of features and average the rows of each well."""
    assert path is not None
    profiles = read_profiles([path])
    for column in (COMPOUND, CONCENTRATION, MOA):
        profiles.column(column)
    if "Metadata_part" in profiles.metadata.columns:
        console.print(
            f"warning: {path}: has a column Metadata_part, so the features are from a trained "
            "network. If it was trained on these mechanisms, the features contain the labels, and "
            "the score is not valid."
        )
    return aggregate_to_wells(profiles, "mean")


#: Compound, mechanism and weeks of each treatment, and the profiles (treatments, features).
Treatments = tuple[pd.DataFrame, Float[np.ndarray, "n d"]]


def z_score_all(profiles: Profiles) -> Treatments:
    """Use z-scores relative to the DMSO wells of each plate."""
    return to_treatments(profiles, z_scores(profiles, profiles.values.astype(float)))


def z_score(profiles: Profiles) -> Treatments:
    """Use z-scores, without features of position and orientation."""
    return to_treatments(profiles, z_scores(profiles, drop_position(profiles)))


def drop_position(profiles: Profiles) -> Float[np.ndarray, "n d"]:
    """Return the values without features of position and orientation."""
    keep = [not any(part in name for part in POSITION_FEATURES) for name in profiles.names]
    return profiles.values[:, keep].astype(float)


def correct(profiles: Profiles, names: Sequence[str], *, scaled: bool = True) -> Treatments:
    """Apply steps of `perturbjax classify` that are fitted to the DMSO wells.

    Args:
        profiles: one row per well.
        names: steps in this order. sphere: whiten by the covariance of all DMSO wells. coral: match
            the covariances of the DMSO wells of all plates. combat: match mean and scale.
        scaled: start from z-scores per plate. Otherwise divide the result by the standard deviation
            of all DMSO wells.
    """
    from perturbjax.profiles.batch_correction import Combat, Coral
    from perturbjax.profiles.preparation import FeatureCleaner, Sphering
    from perturbjax.profiles.table_steps import NEGCON

    values = drop_position(profiles)
    values = z_scores(profiles, values) if scaled else values
    table = profiles.metadata[[PLATE, WELL]].assign(**{NEGCON: is_vehicle(profiles)})
    table = pd.concat([table, pd.DataFrame(values).add_prefix("f")], axis=1)
    steps = {"sphere": Sphering("negcon"), "coral": Coral(), "combat": Combat()}
    for step in ([] if scaled else [FeatureCleaner()]) + [steps[name] for name in names]:
        table = step.fit(table).transform(table)
    values = table[[c for c in table.columns if c.startswith("f")]].to_numpy()
    if not scaled:
        values = values / values[is_vehicle(profiles)].std(axis=0)
    return to_treatments(profiles, values)


def z_score_to_all_wells(profiles: Profiles) -> Treatments:
    """Use z-scores relative to all wells, for tables with few controls."""
    values = profiles.values.astype(float)
    std = values.std(axis=0)
    keep = std > 0
    return to_treatments(profiles, (values[:, keep] - values[:, keep].mean(axis=0)) / std[keep])


def as_in_similar(profiles: Profiles) -> Treatments:
    """Use the consensus profiles of `perturbjax similar`: means over plates of the plate means."""
    from perturbjax.screening.screen_inputs import make_wells
    from perturbjax.screening.similarity import relative_to_controls

    wells = make_wells(profiles, COMPOUND, "", None, dose_column=CONCENTRATION)
    means = pd.DataFrame(relative_to_controls(wells)).groupby([wells.treatment, wells.plates])
    consensus = means.mean().groupby(level=0).mean()
    # The median of `to_treatments` leaves the consensus, which is equal in all wells.
    return to_treatments(profiles, consensus.loc[wells.treatment].to_numpy())


PIPELINES: dict[str, Callable[[Profiles], Treatments]] = {
    "z-scores to DMSO of the plate": z_score_all,
    "no position features": z_score,
    "sphered to DMSO": partial(correct, names=["sphere"]),
    "sphered and aligned to DMSO (TVN)": partial(correct, names=["sphere", "coral"]),
    "ComBat to DMSO": partial(correct, names=["combat"], scaled=False),
    "z-scores to all wells": z_score_to_all_wells,
    "consensus of perturbjax similar": as_in_similar,
}


def is_vehicle(profiles: Profiles) -> np.ndarray:
    """Return a boolean array that marks the DMSO wells."""
    return (profiles.column(COMPOUND) == VEHICLE).to_numpy()


def z_scores(profiles: Profiles, values: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Center and scale each plate by mean and standard deviation of its DMSO wells.

    Features that are constant in the DMSO wells of some plate are dropped.

    Raises:
        InputError: a plate has fewer than two DMSO wells.
    """
    plates, vehicle = profiles.column(PLATE).to_numpy(), is_vehicle(profiles)
    out, varies = np.empty_like(values), np.isfinite(values).all(axis=0)
    for plate in np.unique(plates):
        reference = values[(plates == plate) & vehicle]
        if len(reference) < 2:
            raise InputError(f"plate {plate} has {len(reference)} DMSO wells; at least 2 needed")
        std = reference.std(axis=0)
        varies &= std > 1e-9 * np.abs(reference).max(axis=0)
        centered = values[plates == plate] - reference.mean(axis=0)
        out[plates == plate] = centered / np.where(std > 0, std, 1)
    return out[:, varies]


def to_treatments(profiles: Profiles, values: Float[np.ndarray, "n d"]) -> Treatments:
    """Compute the median over the wells of each treatment that has a mechanism."""
    metadata = profiles.metadata.assign(**{WEEK: profiles.column(PLATE).str.split("_").str[0]})
    annotated = (
        ~is_vehicle(profiles)
        & (metadata[MOA] != "").to_numpy()
        & (metadata[MOA] != VEHICLE).to_numpy()
    )
    metadata = metadata[annotated].reset_index(drop=True)
    groups = metadata.groupby([COMPOUND, CONCENTRATION], sort=True)
    numbers = groups.ngroup().to_numpy()
    medians = pd.DataFrame(values[annotated]).groupby(numbers).median().to_numpy()
    weeks = groups[WEEK].agg(lambda column: ",".join(sorted(set(column))))
    return groups[[MOA]].first().assign(**{WEEK: weeks}).reset_index(), medians


def match(
    treatments: pd.DataFrame, values: Float[np.ndarray, "n d"], *, other_week: bool
) -> pd.DataFrame:
    """Find the nearest neighbor of each treatment, see `nearest_mechanisms`."""
    compounds = treatments[COMPOUND].to_numpy()
    batches = treatments[WEEK].to_numpy() if other_week else None
    matches = nearest_mechanisms(values, compounds, treatments[MOA].to_numpy(), batches)
    matches["nearest"] = compounds[matches["nearest"]]
    return pd.concat([treatments[[COMPOUND, CONCENTRATION, MOA]], matches], axis=1)


def interval(matches: pd.DataFrame, replicates: int) -> tuple[float, float]:
    """Compute the 95 % interval of the matched fraction by resampling compounds."""
    counts = matches.groupby(COMPOUND)["right"].agg(["sum", "size"]).to_numpy(float)
    rows = np.random.default_rng(0).integers(len(counts), size=(replicates, len(counts)))
    sums = counts[rows].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__)))

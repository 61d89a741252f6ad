"""Is the nearest treatment of another compound of the same mechanism? The benchmark of BBBC021 on published profiles.

    python -m experiments.bbbc021_mechanisms --data ../shared/data/bbbc021_profiles --out runs/mechanisms
    python -m experiments.bbbc021_mechanisms --features cells.parquet --out runs/mechanisms_cells

One profile a treatment (compound and concentration), DMSO left out; its nearest neighbour by cosine among treatments
of other compounds (NSC), or of other compounds imaged in other weeks (NSCB), has its mechanism or not. The batch is the
week, what stands before `_` in a plate's name. Treatments without another compound of their mechanism (in another week)
cannot be matched and do not count. Intervals (95 %) resample whole compounds, whose concentrations err together.

No constant below was chosen on these treatments: features that say where an object lies on the image or how it is
turned are left out by their names, spreads are of the plate's DMSO wells, sphering takes the regularization of
`perturbjax classify`. Whoever tries many pipelines on 103 treatments and reports the best reports its luck too.

Cost: seconds. Scores: docs/audit.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
#: Parts of CellProfiler's names of features that no treatment can mean: place on the image, and direction.
NO_BIOLOGY = ("Center_X", "Center_Y", "Orientation")


@dataclass(frozen=True)
class Config:
    """Match mechanisms of BBBC021's treatments."""

    out: Path
    """Folder for mechanisms.csv and, treatment by treatment, nearest.csv."""
    data: Path | None = None
    """Folder of the published profiles (see ../shared/data/README.md)."""
    features: Path | None = None
    """In their place a table of features with the compound, concentration and mechanism of each row."""
    replicates: int = 2000
    """Resamples behind each interval."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require(
            "data",
            self.data,
            (self.data is None) != (self.features is None),
            "given, or else --features",
        )
        require("replicates", self.replicates, self.replicates >= 1, "at least one")


def main(options: Config) -> None:
    """Match by every pipeline, print and write the table."""
    profiles = published(options.data) if options.data else of_table(options.features)
    rows, nearest = [], []
    for name, pipeline in PIPELINES.items():
        try:
            treatments, values = pipeline(profiles)
        except InputError as error:
            console.print(f"{name}: left out ({error})")
            continue
        for measure in ("NSC", "NSCB"):
            found = matched(treatments, values, week=measure == "NSCB")
            counted = found[found["chance"] > 0]
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
            nearest.append(found.assign(pipeline=name, measure=measure))
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "mechanisms.csv", index=False)
    pd.concat(nearest).to_csv(options.out / "nearest.csv", index=False)
    print(table.round(3).to_string(index=False))


def published(data: Path) -> Profiles:
    """CellProfiler's means of each well's cells, with what the well was given."""
    for name in (WELLS, IMAGES, MECHANISMS):
        if not (data / name).is_file():
            raise InputError(f"--data {data}: has no {name}; see the README of the shared data")
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
    given = images[[PLATE, WELL, COMPOUND, CONCENTRATION]].drop_duplicates([PLATE, WELL])
    known = pd.read_csv(data / MECHANISMS).set_axis([COMPOUND, CONCENTRATION, MOA], axis=1)
    metadata = wells[[PLATE, WELL]].merge(given, how="left").merge(known, how="left")
    names = [column for column in wells.columns if column not in (PLATE, WELL)]
    metadata = metadata.fillna({MOA: ""}).astype({CONCENTRATION: str})
    metadata.insert(0, "site_id", metadata[PLATE] + "_" + metadata[WELL])
    return Profiles(metadata, wells[names].to_numpy(np.float32), tuple(names))


def of_table(path: Path | None) -> Profiles:
    """Means of the wells of a table of features."""
    assert path is not None
    profiles = read_profiles([path])
    for column in (COMPOUND, CONCENTRATION, MOA):
        profiles.column(column)
    if "Metadata_part" in profiles.metadata.columns:
        console.print(
            f"warning: {path}: has a column Metadata_part, as features of a trained network have. Where it was trained "
            "on these mechanisms, the labels are in the features, and the score says nothing"
        )
    return aggregate_to_wells(profiles, "mean")


#: Of the treatments: compound, mechanism, and the weeks in which it was imaged; and their profiles.
Treatments = tuple[pd.DataFrame, Float[np.ndarray, "n d"]]


def plain(profiles: Profiles) -> Treatments:
    """z-scores against each plate's DMSO wells, the median over a treatment's wells."""
    return to_treatments(profiles, z_scores(profiles, profiles.values.astype(float)))


def meaningful(profiles: Profiles) -> Treatments:
    """The same without features of place and direction."""
    kept = [not any(part in name for part in NO_BIOLOGY) for name in profiles.names]
    return to_treatments(profiles, z_scores(profiles, profiles.values[:, kept].astype(float)))


def sphered(profiles: Profiles) -> Treatments:
    """The same, whitened by the covariance of all DMSO wells, so that what varies between them counts less."""
    return corrected(profiles, ["sphere"])


def tvn(profiles: Profiles) -> Treatments:
    """The same, and each plate's DMSO wells given one covariance."""
    return corrected(profiles, ["sphere", "coral"])


def combat(profiles: Profiles) -> Treatments:
    """ComBat by DMSO in place of each plate's z-scores."""
    return corrected(profiles, ["combat"], scaled=False)


def corrected(profiles: Profiles, names: list[str], *, scaled: bool = True) -> Treatments:
    """Without features of place and direction, and corrected by steps of `perturbjax classify` fitted on DMSO wells."""
    from perturbjax.profiles.batch_correction import Combat, Coral
    from perturbjax.profiles.preparation import FeatureCleaner, Sphering
    from perturbjax.profiles.table_steps import NEGCON

    kept = [not any(part in name for part in NO_BIOLOGY) for name in profiles.names]
    values = profiles.values[:, kept].astype(float)
    values = z_scores(profiles, values) if scaled else values
    table = profiles.metadata[[PLATE, WELL]].assign(**{NEGCON: is_vehicle(profiles)})
    table = pd.concat([table, pd.DataFrame(values).add_prefix("f")], axis=1)
    steps = {"sphere": Sphering("negcon"), "coral": Coral(), "combat": Combat()}
    for step in ([] if scaled else [FeatureCleaner()]) + [steps[name] for name in names]:
        table = step.fit(table).transform(table)
    found = table[[c for c in table.columns if c.startswith("f")]].to_numpy()
    return to_treatments(
        profiles, found if scaled else found / found[is_vehicle(profiles)].std(axis=0)
    )


def against_all(profiles: Profiles) -> Treatments:
    """z-scores against all wells, for tables of few controls."""
    values = profiles.values.astype(float)
    spread = values.std(axis=0)
    keep = spread > 0
    return to_treatments(profiles, (values[:, keep] - values[:, keep].mean(axis=0)) / spread[keep])


PIPELINES: dict[str, Callable[[Profiles], Treatments]] = {
    "z-scores against the plate's DMSO": plain,
    "without place and direction": meaningful,
    "and sphered by DMSO": sphered,
    "sphered and aligned by DMSO (TVN)": tvn,
    "ComBat by DMSO": combat,
    "z-scores against all wells": against_all,
}


def is_vehicle(profiles: Profiles) -> np.ndarray:
    """The DMSO wells."""
    return (profiles.column(COMPOUND) == VEHICLE).to_numpy()


def z_scores(profiles: Profiles, values: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Values less the mean of the plate's DMSO wells, in their deviations; features that some plate's DMSO wells do not
    vary in are left out.

    Raises:
        InputError: a plate has fewer than two DMSO wells.
    """
    plates, vehicle = profiles.column(PLATE).to_numpy(), is_vehicle(profiles)
    out, varies = np.empty_like(values), np.isfinite(values).all(axis=0)
    for plate in np.unique(plates):
        reference = values[(plates == plate) & vehicle]
        if len(reference) < 2:
            raise InputError(f"plate {plate} has {len(reference)} DMSO wells, and it takes two")
        spread = reference.std(axis=0)
        varies &= spread > 1e-9 * np.abs(reference).max(axis=0)
        out[plates == plate] = (values[plates == plate] - reference.mean(axis=0)) / np.where(
            spread > 0, spread, 1
        )
    return out[:, varies]


def to_treatments(profiles: Profiles, values: Float[np.ndarray, "n d"]) -> Treatments:
    """The median of each treatment's wells, of those whose mechanism is known."""
    metadata = profiles.metadata.assign(**{WEEK: profiles.column(PLATE).str.split("_").str[0]})
    known = (
        ~is_vehicle(profiles)
        & (metadata[MOA] != "").to_numpy()
        & (metadata[MOA] != VEHICLE).to_numpy()
    )
    groups = metadata[known].reset_index(drop=True).groupby([COMPOUND, CONCENTRATION], sort=True)
    medians = pd.DataFrame(values[known]).groupby(groups.ngroup().to_numpy()).median().to_numpy()
    first = (
        groups[[MOA]]
        .first()
        .assign(**{WEEK: groups[WEEK].agg(lambda weeks: ",".join(sorted(set(weeks))))})
    )
    return first.reset_index(), medians


def matched(
    treatments: pd.DataFrame, values: Float[np.ndarray, "n d"], *, week: bool
) -> pd.DataFrame:
    """Each treatment with its nearest, see `nearest_mechanisms`."""
    batches = treatments[WEEK].to_numpy() if week else None
    found = nearest_mechanisms(
        values, treatments[COMPOUND].to_numpy(), treatments[MOA].to_numpy(), batches
    )
    names = treatments[[COMPOUND, CONCENTRATION, MOA]]
    return pd.concat(
        [names, found.assign(nearest=names[COMPOUND].to_numpy()[found["nearest"]])], axis=1
    )


def interval(found: pd.DataFrame, replicates: int) -> tuple[float, float]:
    """95 % interval of the share that is right, from resamples of whole compounds."""
    of = found.groupby(COMPOUND)["right"].agg(["sum", "size"]).to_numpy(float)
    drawn = np.random.default_rng(0).integers(len(of), size=(replicates, len(of)))
    sums = of[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__)))

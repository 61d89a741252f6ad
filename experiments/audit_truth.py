"""Validate the audit on simulated screens: verdicts, p-values and coverage of the intervals.

    python -m experiments.audit_truth --out runs/audit_truth

Features are simulated without images: treatment effect, gradient over the plate, and differences
between wells, plates and sites. By default two plates of 48 wells with two sites, four treatments
and 48 features.

Cost: 1 s per screen and 1 min for the intervals (one core). Result: docs/audit.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.runs import markdown
from perturbjax.audit.audit_inputs import build_audit_data
from perturbjax.audit.audit_options import AuditConfig
from perturbjax.audit.audit_result import AuditResult
from perturbjax.audit.run_audit import audit_features
from perturbjax.audit.verdict import verdict
from perturbjax.cli import parse_options
from perturbjax.core.errors import run_command
from perturbjax.core.messages import console
from perturbjax.core.options import require, require_output, require_sound
from perturbjax.core.plates import well_name
from perturbjax.evaluation.bootstrap import resample
from perturbjax.evaluation.scores import METRICS, count, score
from perturbjax.profiles.profile_table import Profiles

FEATURES = 48
#: Size of the simulated screens.
SIZE = {"plates": 2, "sites": 2, "wells": 48, "classes": 4}
TRUTHS: dict[str, dict[str, float]] = {
    "no effect": {},
    "position gradient": {"gradient": 4.0},
    "position gradient, plates of 96 wells": {"gradient": 4.0, "wells": 96, "sites": 3},
    "position gradient, one layout": {"gradient": 4.0, "layouts": 1},
    "brightness only": {"brightness": 8.0},
    "effect 1.5": {"effect": 1.5},
    "effect 3": {"effect": 3.0},
    "effect 6": {"effect": 6.0},
}


def screen(
    *,
    effect: float = 0.0,
    gradient: float = 0.0,
    brightness: float = 0.0,
    plates: int = 4,
    layouts: int | None = None,
    wells: int = 48,
    sites: int = 3,
    classes: int = 6,
    well_noise: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Simulate features and image statistics, one row per site.

    Args:
        effect: distance between treatments, in standard deviations between wells.
        gradient: change from one edge of the plate to the other, in the same unit.
        brightness: like `effect`, for the mean intensity. The intensity is also a feature.
        plates: number of plates.
        layouts: number of plate layouts; by default one per plate.
        wells: wells per plate (48, 96 or 384).
        sites: sites per well.
        classes: number of treatments.
        well_noise: standard deviation between wells. Between sites of a well it is half as large.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    layouts = plates if layouts is None else layouts
    centers = effect / FEATURES**0.5 * rng.normal(size=(classes, FEATURES))
    intensities = brightness * rng.normal(size=classes)
    direction = rng.normal(size=(2, FEATURES))
    assignments = [rng.permutation(np.resize(np.arange(classes), wells)) for _ in range(layouts)]
    columns = {48: 8, 96: 12, 384: 24}[wells]
    positions = np.stack(np.divmod(np.arange(wells), columns), axis=1)
    trend = gradient * (positions / positions.max(axis=0) - 0.5) @ direction
    tables = []
    for plate in range(plates):
        kinds = assignments[plate % layouts]
        well_values = (
            centers[kinds]
            + trend
            + well_noise * rng.normal(size=(wells, FEATURES))
            + rng.normal(size=FEATURES)
        )
        intensity = np.repeat(intensities[kinds] + rng.normal(size=wells), sites)
        intensity += 0.5 * rng.normal(size=wells * sites)
        site_noise = 0.5 * well_noise * rng.normal(size=(wells * sites, FEATURES))
        values = np.repeat(well_values, sites, axis=0) + site_noise
        names = np.repeat([well_name(*position) for position in positions], sites)
        columns_ = [f"f{number}" for number in range(FEATURES + 1)]
        table = pd.DataFrame(np.c_[values, intensity], columns=columns_)
        table = table.assign(
            Metadata_Plate=f"P{plate}",
            Metadata_Well=names,
            Metadata_Site=np.tile(np.arange(sites), wells),
            Metadata_pert_iname=np.repeat([f"compound {kind}" for kind in kinds], sites),
            mean_DNA=1000 * np.exp(0.2 * intensity),
            n_cells=rng.integers(20, 60, wells * sites),
        )
        tables.append(table.assign(mask_area=table["n_cells"] * 100))
    return pd.concat(tables, ignore_index=True)


def audit_of(table: pd.DataFrame, **changes: object) -> AuditResult:
    """Audit a simulated screen with few replicates.

    Args:
        table: from `screen`.
        **changes: fields of `AuditConfig`.
    """
    names = [column for column in table.columns if column[0] == "f"]
    metadata = table[[name for name in table.columns if name.startswith("Metadata_")]].astype(str)
    keys = metadata[["Metadata_Plate", "Metadata_Well", "Metadata_Site"]]
    ids = keys.agg("_".join, axis=1)
    profiles = Profiles(
        metadata.assign(site_id=ids), table[names].to_numpy(np.float32), tuple(names)
    )
    index = profiles.metadata.join(table[["mean_DNA", "n_cells", "mask_area"]])
    config = AuditConfig(
        **{"out": Path("audit"), "features": (Path("screen"),), "replicates": 200, **changes}
    )
    label = "Metadata_pert_iname"
    return audit_features(
        build_audit_data("screen", label, index, profiles, config), config, config.model
    )


@dataclass(frozen=True)
class Config:
    """Audit simulated screens, and measure the coverage of confidence intervals."""

    out: Path
    """Folder for verdicts.csv, intervals.csv and tables.md."""
    truths: tuple[str, ...] = tuple(TRUTHS)
    """Kinds of simulated screens."""
    screens: int = 100
    """Screens per kind."""
    experiments: int = 1000
    """Simulated experiments per row of the table of intervals; 0 skips the table."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("screens", self.screens, self.screens >= 1, "at least one")
        require("experiments", self.experiments, self.experiments >= 0, "0 or more")
        unknown = [name for name in self.truths if name not in TRUTHS]
        require("truths", self.truths, not unknown, f"some of {', '.join(TRUTHS)}")


def main(options: Config) -> None:
    """Write and print both tables."""
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {"verdicts": verdicts(options.truths, options.screens)}
    if options.experiments:
        tables["intervals"] = intervals(options.experiments)
    for name, table in tables.items():
        table.to_csv(options.out / f"{name}.csv", index=False)
    text = "\n\n".join(markdown(table) for table in tables.values())
    (options.out / "tables.md").write_text(text + "\n")
    print(text)


def verdicts(truths: Sequence[str], screens: int) -> pd.DataFrame:
    """Audit screens of every kind and count the verdicts, one row per kind."""
    rows = []
    for name in truths:
        settings = SIZE | TRUTHS[name]
        audits = [
            audit_of(screen(**settings, seed=seed), folds=3)  # type: ignore[arg-type]
            for seed in range(screens)
        ]
        outcomes = [verdict(audit) for audit in audits]
        p = np.array([audit["plate"].p for audit in audits])
        scores = {
            policy: f"{np.mean([audit[policy].score.value for audit in audits]):.3f}"
            for policy in ("site", "plate")
        }
        rows.append(
            {
                "truth": name,
                "screens": screens,
                "split by site": scores["site"],
                "split by plate": scores["plate"],
                **{
                    f"verdict {kind}": sum(one.finding == kind for one in outcomes)
                    for kind in ("chance", "explained", "beyond")
                },
                "leak": sum(one.has_leak for one in outcomes),
                "not valid": sum(not one.is_valid for one in outcomes),
                "p < 0.05": int((p < 0.05).sum()),
                "p < 0.01": int((p < 0.01).sum()),
            }
        )
        console.print(f"info: {name}: {screens} screens")
    return pd.DataFrame(rows)


def intervals(experiments: int) -> pd.DataFrame:
    """Measure the coverage of 95 % intervals by number of classes and of wells per class."""
    rows = []
    for classes, wells in ((40, 1), (40, 2), (40, 3), (7, 6), (13, 4), (2, 12)):
        draw = _make_sampler(classes, np.random.default_rng(classes))
        # The true score is that of a very large experiment.
        truth = score(*draw(4000, np.random.default_rng(1))[:2])
        covered = dict.fromkeys(METRICS, 0)
        for number in range(experiments):
            labels, predictions, well_numbers = draw(
                wells, np.random.default_rng([classes, wells, number])
            )
            counts = {"model": count(labels, predictions, well_numbers)}
            estimates = resample(counts, replicates=400, seed=number).scores("model")
            for metric in METRICS:
                low, high = estimates[metric].low, estimates[metric].high
                covered[metric] += low <= truth[metric] <= high
        coverage = {METRICS[name].words: f"{n / experiments:.3f}" for name, n in covered.items()}
        rows.append({"classes": classes, "wells per class": wells, **coverage})
    return pd.DataFrame(rows)


def _make_sampler(
    classes: int, rng: np.random.Generator
) -> Callable[[int, np.random.Generator], tuple]:
    """Make a simulator of predictions, with correlated errors of the four sites of a well.

    Returns:
        Function (wells per class, rng) -> labels, predictions and well numbers of the sites.
    """
    easiness = rng.normal(0.5, 1.5, size=classes)
    confused_with = rng.permutation(classes)

    def draw(wells: int, rng: np.random.Generator) -> tuple:
        well_labels = np.repeat(np.arange(classes), wells)
        well_numbers = np.repeat(np.arange(classes * wells), 4)
        labels = well_labels[well_numbers]
        uniform = rng.random(len(well_numbers))
        logits = easiness[well_labels] + rng.normal(size=len(well_labels))
        correct = uniform < (1 / (1 + np.exp(-logits)))[well_numbers]
        predicted = np.where(correct, labels, confused_with[labels])
        return labels, np.eye(classes)[predicted], well_numbers

    return draw


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))

"""The judge judged: what an audit says of screens whose truth is known, and how often its intervals hold the truth.

    python -m experiments.audit_truth --out runs/audit_truth

Features are simulated, no images: an effect of the treatments, a gradient over the plate, differences between wells,
plates and sites. Two plates of 48 wells of two sites, four treatments, 48 features. A second of one core a screen, a
minute for the intervals; what it measured stands in docs/audit.md.
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
#: The screens of the table.
QUICK = {"plates": 2, "sites": 2, "wells": 48, "classes": 4}
TRUTHS: dict[str, dict[str, float]] = {
    "nothing": {},
    "position gradient": {"gradient": 4.0},
    "position gradient, plates of 96 wells": {"gradient": 4.0, "wells": 96, "sites": 3},
    "position gradient, one layout": {"gradient": 4.0, "layouts": 1},
    "brightness alone": {"brightness": 8.0},
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
    """A row a site, as a table of features with what a dataset's index measures.

    Args:
        effect: how far the treatments' centres lie apart, in deviations between wells.
        gradient: deviation from one edge of the plate to the other.
        brightness: as effect, of the channel's mean, which is a feature too.
        layouts: plates of one layout have the same treatment in each well; by default each has its own.
        well_noise: deviation between wells; that between the sites of a well is half of it.
    """
    rng = np.random.default_rng(seed)
    layouts = plates if layouts is None else layouts
    centres = effect / FEATURES**0.5 * rng.normal(size=(classes, FEATURES))
    bright = brightness * rng.normal(size=classes)
    direction = rng.normal(size=(2, FEATURES))
    of_layout = [rng.permutation(np.resize(np.arange(classes), wells)) for _ in range(layouts)]
    columns = {48: 8, 96: 12, 384: 24}[wells]
    spots = np.stack(np.divmod(np.arange(wells), columns), axis=1)
    place = gradient * (spots / spots.max(axis=0) - 0.5) @ direction
    tables = []
    for plate in range(plates):
        kinds = of_layout[plate % layouts]
        of_well = (
            centres[kinds]
            + place
            + well_noise * rng.normal(size=(wells, FEATURES))
            + rng.normal(size=FEATURES)
        )
        light = np.repeat(bright[kinds] + rng.normal(size=wells), sites) + 0.5 * rng.normal(
            size=wells * sites
        )
        values = np.repeat(of_well, sites, axis=0) + 0.5 * well_noise * rng.normal(
            size=(wells * sites, FEATURES)
        )
        names = np.repeat([well_name(*spot) for spot in spots], sites)
        table = pd.DataFrame(
            np.c_[values, light], columns=[f"f{number}" for number in range(FEATURES + 1)]
        )
        table = table.assign(
            Metadata_Plate=f"P{plate}",
            Metadata_Well=names,
            Metadata_Site=np.tile(np.arange(sites), wells),
            Metadata_pert_iname=np.repeat([f"compound {kind}" for kind in kinds], sites),
            mean_DNA=1000 * np.exp(0.2 * light),
            n_cells=rng.integers(20, 60, wells * sites),
        )
        tables.append(table.assign(mask_area=table["n_cells"] * 100))
    return pd.concat(tables, ignore_index=True)


def audit_of(table: pd.DataFrame, **changes: object) -> AuditResult:
    """The audit of such a screen, quick."""
    names = [column for column in table.columns if column[0] == "f"]
    metadata = table[[column for column in table.columns if column.startswith("Metadata_")]].astype(
        str
    )
    ids = (
        metadata["Metadata_Plate"]
        + "_"
        + metadata["Metadata_Well"]
        + "_"
        + metadata["Metadata_Site"]
    )
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
    """Audit screens whose truth is known, and count how often intervals hold the truth."""

    out: Path
    """Folder for verdicts.csv, intervals.csv and tables.md."""
    truths: tuple[str, ...] = tuple(TRUTHS)
    """Which truths."""
    screens: int = 100
    """Screens a truth."""
    experiments: int = 1000
    """Experiments behind each share of intervals; 0 leaves them out."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("screens", self.screens, self.screens >= 1, "at least one")
        require("experiments", self.experiments, self.experiments >= 0, "0 or more")
        unknown = [name for name in self.truths if name not in TRUTHS]
        require("truths", self.truths, not unknown, f"among {', '.join(TRUTHS)}")


def main(options: Config) -> None:
    """Write both tables; print them."""
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
    """One row a truth: what was said of so many screens."""
    rows = []
    for name in truths:
        truth = TRUTHS[name]
        found = [audit_of(screen(**(QUICK | truth), seed=seed), folds=3) for seed in range(screens)]  # type: ignore[arg-type]
        said, p = [verdict(one) for one in found], np.array([one["plate"].p for one in found])
        rows.append(
            {
                "truth": name,
                "screens": screens,
                "sites of known wells": f"{np.mean([one['site'].score.value for one in found]):.3f}",
                "new plates": f"{np.mean([one['plate'].score.value for one in found]):.3f}",
                **{
                    f"said {kind}": sum(one.finding == kind for one in said)
                    for kind in ("chance", "explained", "beyond")
                },
                "said leaky": sum(one.has_leak for one in said),
                "said not honest": sum(not one.is_valid for one in said),
                "p < 0.05": int((p < 0.05).sum()),
                "p < 0.01": int((p < 0.01).sum()),
            }
        )
        console.print(f"{name}: {screens} screens")
    return pd.DataFrame(rows)


def intervals(experiments: int) -> pd.DataFrame:
    """Share of the 95 % intervals that hold the true score, by the number of classes and of wells a class."""
    rows = []
    for classes, wells in ((40, 1), (40, 2), (40, 3), (7, 6), (13, 4), (2, 12)):
        world = _world(classes, np.random.default_rng(classes))
        truth = score(*world(4000, np.random.default_rng(1))[:2])
        held = dict.fromkeys(METRICS, 0)
        for number in range(experiments):
            labels, answers, of_well = world(wells, np.random.default_rng([classes, wells, number]))
            found = resample(
                {"model": count(labels, answers, of_well)}, replicates=400, seed=number
            ).scores("model")
            for metric in METRICS:
                held[metric] += found[metric].low <= truth[metric] <= found[metric].high
        shares = {
            METRICS[metric].words: f"{share / experiments:.3f}" for metric, share in held.items()
        }
        rows.append({"classes": classes, "wells a class": wells, **shares})
    return pd.DataFrame(rows)


def _world(classes: int, rng: np.random.Generator) -> Callable[[int, np.random.Generator], tuple]:
    """Classes of unequal difficulty, four sites a well that err together.

    Returns:
        (wells a class, rng) → labels, answers and wells of the sites.
    """
    ease = rng.normal(0.5, 1.5, size=classes)
    taken_for = rng.permutation(classes)

    def draw(wells: int, rng: np.random.Generator) -> tuple:
        of_well = np.repeat(np.arange(classes), wells)
        of_site = np.repeat(np.arange(classes * wells), 4)
        labels = of_well[of_site]
        right = (
            rng.random(len(of_site))
            < 1 / (1 + np.exp(-(ease[of_well] + rng.normal(size=len(of_well)))))[of_site]
        )
        return labels, np.eye(classes)[np.where(right, labels, taken_for[labels])], of_site

    return draw


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__)))

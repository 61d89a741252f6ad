"""What bounds the linear baseline: how it learns with plates, what it confuses, and what replicates suggest.

    python -m experiments.ceiling --data DIR --out runs/ceiling

Writes `learning.csv` (a quarter, half and all of the training plates of each of the five folds of plates),
`familiar.csv` (how often it is right on sites whose compound stands on no training plate, on one, on more), `known.csv`
(the same recipe where sites of the same plate, and of the same well, train: what is lost to plates, and what the
neighbours in a well could tell at most), `confused.csv` (classes taken for each other), and all four as `tables.md`.
It took 20 minutes for 2,000 cells, beside other work (19 of one processor).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int

from experiments.inner_folds import scores
from experiments.runs import markdown
from perturbjax.cli import parse_options
from perturbjax.core.config import SplitPolicy
from perturbjax.core.errors import run_command
from perturbjax.core.messages import console
from perturbjax.core.options import require_output, require_sound
from perturbjax.core.plates import PLATE, WELL, compound_column
from perturbjax.data import splits
from perturbjax.profiles.classifiers import CLASSIFIERS, probabilities
from perturbjax.profiles.preparation import fit_preparation
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import CLASSIFY_PRESETS, ProfileConfig, SourceConfig
from perturbjax.profiles.table_steps import as_table

FOLDS = 5
SHARES = (0.25, 0.5, 1.0)
#: Pairs in the table of what is confused.
PAIRS = 10


@dataclass(frozen=True)
class Config:
    data: Path
    """Dataset directory."""
    out: Path
    """Folder for the tables."""
    seed: int = 0
    """Decides which plates are in a share."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)


@dataclass(frozen=True)
class Baseline:
    """The linear baseline's features of a dataset's sites, ready to be fitted on any of them."""

    table: pd.DataFrame
    metadata: pd.DataFrame
    label: str

    @property
    def truth(self) -> Int[np.ndarray, " n"]:
        return pd.factorize(self.metadata[self.label], sort=True)[0]

    def parts(
        self, policy: SplitPolicy, fold: int
    ) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
        """Rows that train and rows that judge."""
        dealt = splits.make_split(
            self.metadata, policy, label=self.label, folds=FOLDS, fold=fold, seed=0
        )
        train, test = (
            np.flatnonzero(dealt["part"] == part) for part in (splits.TRAIN, splits.TEST)
        )
        return train, test

    def answers(self, fit: Int[np.ndarray, " a"], judge: Int[np.ndarray, " b"]) -> np.ndarray:
        """(b, classes) probabilities of the rows that judge."""
        labels = self.truth
        groups = self.metadata[PLATE].to_numpy()[fit]
        steps, x = fit_preparation(
            self.table.iloc[fit], CLASSIFY_PRESETS["linear"]["preparation"], 0, labels[fit], groups
        )
        model = CLASSIFIERS[CLASSIFY_PRESETS["linear"]["models"]].make(
            len(fit), len(np.unique(labels[fit])), 0
        )
        return probabilities(
            model.fit(x, labels[fit]), steps.transform(self.table.iloc[judge]), labels.max() + 1
        )


def main(options: Config) -> None:
    """Write the tables; print them."""
    source = SourceConfig(data=(options.data,), **CLASSIFY_PRESETS["linear"]["source"])
    profiles, negcon, label = load_profiles(ProfileConfig(source=source))
    baseline = Baseline(as_table(profiles, negcon), profiles.metadata, label)
    learning, answered = learn(baseline, options.seed)
    tables = {
        "learning": learning,
        "familiar": familiar(baseline, answered),
        "known": known(baseline, answered),
        "confused": confused(baseline, answered),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(options.out / f"{name}.csv", index=False)
    text = "\n\n".join(markdown(table.round(3)) for table in tables.values())
    (options.out / "tables.md").write_text(text + "\n")
    print(text)


def learn(baseline: Baseline, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Scores by the share of the training plates, means of the folds; and (n, classes) of every site by all of them."""
    rows, answered = [], np.zeros((len(baseline.metadata), baseline.truth.max() + 1))
    plates = baseline.metadata[PLATE].to_numpy()
    for fold in range(FOLDS):
        train, test = baseline.parts("plate", fold)
        order = np.random.default_rng([seed, fold]).permutation(np.unique(plates[train]))
        for share in SHARES:
            fit = train[np.isin(plates[train], order[: round(share * len(order))])]
            said = baseline.answers(fit, test)
            console.print(f"fold {fold}: {share:g} of the training plates")
            found = scores(baseline.truth[test], said.argmax(1))
            rows.append(
                {
                    "share of plates": share,
                    "plates": round(share * len(order)),
                    "sites": len(fit),
                    **found,
                }
            )
        answered[test] = said
    return pd.DataFrame(rows).groupby("share of plates", as_index=False).mean(), answered


def familiar(baseline: Baseline, answered: np.ndarray) -> pd.DataFrame:
    """How often it is right on the sites of plates held out, by what of their compound training plates held."""
    compounds, truth = (
        baseline.metadata[compound_column(baseline.metadata)].to_numpy(),
        baseline.truth,
    )
    plates = baseline.metadata[PLATE].to_numpy()
    held = np.zeros(len(truth), int)
    for fold in range(FOLDS):
        train, test = baseline.parts("plate", fold)
        for row in test:
            held[row] = len(np.unique(plates[train][compounds[train] == compounds[row]]))
    kinds = [("no training plate", held == 0), ("one", held == 1), ("two or more", held >= 2)]
    right = answered.argmax(1) == truth
    rows = [
        {
            "compound stands on": name,
            "compounds": len(np.unique(compounds[at])),
            "sites": int(at.sum()),
        }
        | scores(truth[at], answered[at].argmax(1))
        for name, at in kinds
        if at.any()
    ]
    return pd.DataFrame([*rows, {"compound stands on": "any", "compounds": len(np.unique(compounds)),
                                 "sites": len(right), **scores(truth, answered.argmax(1))}])  # fmt: skip


def known(baseline: Baseline, by_plate: np.ndarray) -> pd.DataFrame:
    """Scores of the recipe under splits that know more, by site and with the answers of a well's sites averaged."""
    wells = (baseline.metadata[PLATE] + " " + baseline.metadata[WELL]).to_numpy()
    rows = []
    for policy in ("plate", "well", "site"):
        answered = by_plate if policy == "plate" else np.zeros_like(by_plate)
        for fold in range(FOLDS) if policy != "plate" else ():
            train, test = baseline.parts(policy, fold)  # type: ignore[arg-type]
            answered[test] = baseline.answers(train, test)
        console.print(f"split by {policy}")
        of_well = pd.DataFrame(answered).groupby(wells).transform("mean").to_numpy()
        by_site, pooled = (scores(baseline.truth, each.argmax(1)) for each in (answered, of_well))
        rows.append(
            {
                "kept whole": policy,
                **by_site,
                **{f"{name}, its well's mean": s for name, s in pooled.items()},
            }
        )
    return pd.DataFrame(rows)


def confused(baseline: Baseline, answered: np.ndarray) -> pd.DataFrame:
    """The pairs of classes that most sites are lost to, plates held out."""
    names = np.sort(baseline.metadata[baseline.label].unique())
    truth, said = baseline.truth, answered.argmax(1)
    wrong = pd.DataFrame({"is": names[truth], "taken for": names[said]})[truth != said]
    counts = wrong.value_counts().head(PAIRS).reset_index(name="sites")
    sizes = pd.Series(names[truth]).value_counts()
    return counts.assign(
        **{"of the class": (counts["sites"] / counts["is"].map(sizes)).astype(float)}
    )


if __name__ == "__main__":
    run_command(lambda: main(parse_options(Config, description=__doc__.split("\n\n")[0])))

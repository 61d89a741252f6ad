"""Limits of preset `linear`: number of plates, compounds without training sites, and the split.

    python -m experiments.ablation --ablation limits --data DIR --out runs/limits

- Learning curve: 25, 50 and 100 % of the training plates of each of five folds.
- Compounds: test sites by the number of training plates that contain their compound.
- Splits: by plate, by well and by site; also with the mean prediction of all sites of a well.

Cost: 20 minutes for 2,000 cells (19 minutes of one core). Result on BBBC021 (accuracy, balanced
accuracy): 25 % of the plates 0.530, 0.442; 50 % 0.630, 0.540; all 0.723, 0.652. Compound on no
training plate 0.185, 0.160 (27 cells); on one 0.755, 0.618; on more 0.730, 0.666. The splits are in
docs/presets.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Int

from experiments.ablation import FOLDS, POOLED, Config
from experiments.ablations.inner_folds import score
from perturbjax.core.config import SplitPolicy
from perturbjax.core.messages import console
from perturbjax.core.plates import PLATE, WELL, compound_column
from perturbjax.data import splits
from perturbjax.profiles.classifiers import CLASSIFIERS, probabilities
from perturbjax.profiles.preparation import fit_preparation
from perturbjax.profiles.profile_inputs import load_profiles
from perturbjax.profiles.profile_options import CLASSIFY_PRESETS, ProfileConfig, SourceConfig
from perturbjax.profiles.table_steps import as_table

#: Fractions of the training plates.
FRACTIONS = (0.25, 0.5, 1.0)
REFERENCE = "100 % of the training plates"
VARIANTS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """Features of preset `linear` for all sites, and the class of each site.

    Attributes:
        table: features of all sites, before preparation.
        metadata: one row per site.
        label: metadata column of the classes.
        truth: (sites,) class numbers.
    """

    table: pd.DataFrame
    metadata: pd.DataFrame
    label: str
    truth: Int[np.ndarray, " n"] = field(init=False)

    def __post_init__(self) -> None:
        truth = pd.factorize(self.metadata[self.label], sort=True)[0]
        object.__setattr__(self, "truth", truth)

    def split(
        self, policy: SplitPolicy, fold: int
    ) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
        """Return the rows of the training and of the test sites."""
        manifest = splits.make_split(
            self.metadata, policy, label=self.label, folds=FOLDS, fold=fold, seed=0
        )
        train, test = (
            np.flatnonzero(manifest["part"] == part) for part in (splits.TRAIN, splits.TEST)
        )
        return train, test

    def fit_and_predict(
        self, train: Int[np.ndarray, " a"], test: Int[np.ndarray, " b"]
    ) -> np.ndarray:
        """Fit preset `linear` and return (b, classes) probabilities of the test rows."""
        preset, labels = CLASSIFY_PRESETS["linear"], self.truth
        groups = self.metadata[PLATE].to_numpy()[train]
        steps, x = fit_preparation(
            self.table.iloc[train], preset["preparation"], 0, labels[train], groups
        )
        classes = len(np.unique(labels[train]))
        model = CLASSIFIERS[preset["models"]].make(len(train), classes, 0)
        z = steps.transform(self.table.iloc[test])
        return probabilities(model.fit(x, labels[train]), z, labels.max() + 1)


def run(options: Config) -> Iterator[dict[str, object]]:
    """Compute the learning curve, then the scores by compound and by split."""
    assert options.data is not None
    source = SourceConfig(data=(options.data,), **CLASSIFY_PRESETS["linear"]["source"])
    profiles, negcon, label = load_profiles(ProfileConfig(source=source))
    baseline = Baseline(as_table(profiles, negcon), profiles.metadata, label)
    by_plate = np.zeros((len(baseline.truth), baseline.truth.max() + 1))
    yield from learning_curve(baseline, by_plate)
    yield from by_compound(baseline, by_plate)
    yield from by_split(baseline, by_plate)


def learning_curve(baseline: Baseline, by_plate: np.ndarray) -> Iterator[dict[str, object]]:
    """Score training sets of several sizes on every fold of plates.

    Args:
        baseline: features.
        by_plate: (sites, classes); filled with the predictions of the complete training sets.
    """
    plates = baseline.metadata[PLATE].to_numpy()
    for fold in range(FOLDS):
        train, test = baseline.split("plate", fold)
        order = np.random.default_rng([0, fold]).permutation(np.unique(plates[train]))
        for fraction in FRACTIONS:
            chosen = order[: round(fraction * len(order))]
            rows = train[np.isin(plates[train], chosen)]
            by_plate[test] = baseline.fit_and_predict(rows, test)
            variant = f"{fraction:.0%}".replace("%", " % of the training plates")
            console.print(f"fold {fold}: {variant}")
            sizes = {"training plates": len(chosen), "training sites": len(rows)}
            scores = score(baseline.truth[test], by_plate[test].argmax(1))
            yield {"variant": variant, "fold": fold, **sizes, **scores}


def by_compound(baseline: Baseline, by_plate: np.ndarray) -> Iterator[dict[str, object]]:
    """Score test sites by the number of training plates that contain their compound."""
    compounds = baseline.metadata[compound_column(baseline.metadata)].to_numpy()
    plates = baseline.metadata[PLATE].to_numpy()
    count = np.zeros(len(compounds), int)
    for fold in range(FOLDS):
        train, test = baseline.split("plate", fold)
        on_plates = pd.Series(plates[train]).groupby(compounds[train]).nunique()
        count[test] = on_plates.reindex(compounds[test], fill_value=0)
    groups = {
        "compound on no training plate": count == 0,
        "compound on one training plate": count == 1,
        "compound on several training plates": count >= 2,
        "all compounds": count >= 0,
    }
    for variant, rows in groups.items():
        if rows.any():
            sizes = {"compounds": len(np.unique(compounds[rows])), "test sites": int(rows.sum())}
            scores = score(baseline.truth[rows], by_plate[rows].argmax(1))
            yield {"variant": variant, "fold": POOLED, **sizes, **scores}


def by_split(baseline: Baseline, by_plate: np.ndarray) -> Iterator[dict[str, object]]:
    """Score splits by plate, well and site, by site and with the mean prediction of each well."""
    wells = (baseline.metadata[PLATE] + " " + baseline.metadata[WELL]).to_numpy()
    policies: tuple[SplitPolicy, ...] = ("plate", "well", "site")
    for policy in policies:
        predicted = by_plate
        if policy != "plate":
            predicted = np.zeros_like(by_plate)
            for fold in range(FOLDS):
                train, test = baseline.split(policy, fold)
                predicted[test] = baseline.fit_and_predict(train, test)
        well_means = pd.DataFrame(predicted).groupby(wells).transform("mean").to_numpy()
        for variant, values in (("", predicted), (", mean of the well", well_means)):
            scores = score(baseline.truth, values.argmax(1))
            yield {"variant": f"split by {policy}{variant}", "fold": POOLED, **scores}

"""Splits that a dataset allows, each with folds that test every site at most once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.errors import InputError
from perturbjax.data.splits import TEST, TRAIN, assign_groups, make_split

#: Minimum fraction of the sites that a split must be able to test.
_MIN_TESTED = 0.1


@dataclass(frozen=True)
class SplitDesign:
    """All folds of one split.

    Attributes:
        policy: split policy, or the name of a split file.
        folds: (training positions, test positions). A site is tested in one fold at most, and only
            if its label occurs in the training set of the fold.
        n_excluded: number of sites that are not tested.
    """

    policy: str
    folds: tuple[tuple[np.ndarray, np.ndarray], ...]
    n_excluded: int

    @property
    def test_sites(self) -> np.ndarray:
        """Test positions of all folds in their order."""
        return np.concatenate([test for _, test in self.folds])


def design_splits(
    index: pd.DataFrame,
    *,
    label: str,
    folds: int = 5,
    seed: int = 0,
    splits: Sequence[str] = (),
) -> tuple[tuple[SplitDesign, ...], dict[str, str]]:
    """Design every split that the data allow.

    Args:
        index: `site_id`, `Metadata_Plate`, `Metadata_Well` and the label column, one row per site;
            a compound column for layouts and compounds.
        label: label column.
        folds: maximum number of folds.
        seed: seed of the assignment.
        splits: policies to try; empty: all.

    Returns:
        The designs from weak to strict, and {policy: reason} of the others.
    """
    designs: list[SplitDesign] = []
    refused: dict[str, str] = {}
    for policy, choice in SPLIT_POLICIES.items():
        if splits and policy not in splits:
            continue
        try:
            if reason := choice.unavailable(index, label):
                raise InputError(reason)
            designs.append(_design(index, policy, label, folds, seed))
        except InputError as error:
            refused[policy] = _remove_flag(error.message)
    return tuple(designs), refused


def _design(index: pd.DataFrame, policy: str, label: str, folds: int, seed: int) -> SplitDesign:
    """Make every fold with at least two training classes.

    Raises:
        InputError: there is none, or too few sites can be tested.
    """
    labels, groups = index[label].to_numpy(), assign_groups(index, policy)
    # A class can be tested only if it occurs in two groups: one for training, one for testing.
    repeated = pd.Series(groups).groupby(labels).nunique() >= 2
    classes = f"{repeated.sum()} of {len(repeated)} classes occur in two {policy}s or more"
    if repeated.sum() < 2:
        raise InputError(f"{classes}, and two are needed")
    # More folds than groups would be empty. scikit-learn refuses more folds than sites of the
    # largest class.
    parts = min(folds, len(np.unique(groups)), int(pd.Series(labels).value_counts().max()))
    usable, why = [], ""
    for fold in range(parts):
        try:
            manifest = make_split(index, policy, label=label, folds=parts, fold=fold, seed=seed)
        except InputError as error:  # other folds can be usable
            why = error.message
            continue
        train, test = (np.flatnonzero(manifest["part"] == name) for name in (TRAIN, TEST))
        # A test site cannot be predicted if its class has no training site.
        usable.append((train, test[np.isin(labels[test], labels[train])]))
    if not usable:
        raise InputError(why)
    tested = sum(len(test) for _, test in usable)
    # A score on few sites would not represent the dataset.
    if tested < _MIN_TESTED * len(index):
        raise InputError(f"only {tested} of {len(index)} sites can be tested: {classes}")
    return SplitDesign(policy, tuple(usable), len(index) - tested)


def _remove_flag(message: str) -> str:
    """Remove `--split POLICY:` and the advice after the semicolon, which do not apply to audits."""
    sentence = message.split(": ", 1)[-1] if message.startswith("--") else message
    return sentence.split(";", 1)[0]

"""Which splits a dataset allows, each dealt so that every site is judged once; and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.errors import InputError
from perturbjax.data.splits import TEST, TRAIN, assign_groups, make_split

#: Share of the rows that a split must be able to judge.
_LEAST_JUDGED = 0.1


@dataclass(frozen=True)
class SplitDesign:
    """One split, all its folds.

    Attributes:
        policy: what is kept whole.
        folds: (positions that train, positions that judge); a position judges in one fold at most, and only where its
            label is in training.
        unanswerable: rows that are not judged: no training site of their fold has their label.
    """

    policy: str
    folds: tuple[tuple[np.ndarray, np.ndarray], ...]
    n_excluded: int

    @property
    def judged(self) -> np.ndarray:
        """Positions that judge, fold after fold."""
        return np.concatenate([test for _, test in self.folds])


def deal(
    index: pd.DataFrame,
    *,
    label: str,
    folds: int = 5,
    seed: int = 0,
    splits: Sequence[str] = (),
) -> tuple[tuple[SplitDesign, ...], dict[str, str]]:
    """Every split that the data allows, and for each other one sentence that says why not.

    Args:
        index: one row a site with `site_id`, `Metadata_Plate`, `Metadata_Well` and the column `label`; a compound's
            column for layouts and compounds.
        label: the column that is predicted.
        folds: most parts that groups are dealt into.
        seed: of the shuffle.
        splits: those to try; empty tries all.
    """
    done: list[SplitDesign] = []
    refused: dict[str, str] = {}
    for policy, choice in SPLIT_POLICIES.items():
        if splits and policy not in splits:
            continue
        try:
            if reason := choice.unavailable(index, label):
                raise InputError(reason)
            done.append(_deal(index, policy, label, folds, seed))
        except InputError as error:
            refused[policy] = _without_flag(str(error))
    return tuple(done), refused


def _deal(index: pd.DataFrame, policy: str, label: str, folds: int, seed: int) -> SplitDesign:
    """Every fold that can be learned from.

    Raises:
        InputError: there is none, or fewer than two classes could be judged.
    """
    labels, groups = index[label].to_numpy(), assign_groups(index, policy)
    repeated = pd.Series(groups).groupby(labels).nunique() >= 2
    classes = f"{repeated.sum()} of {len(repeated)} classes stand in two {policy}s or more"
    if repeated.sum() < 2:
        raise InputError(f"{classes}, and it takes two")
    parts = min(folds, len(np.unique(groups)), int(pd.Series(labels).value_counts().max()))
    found, why = [], ""
    for fold in range(parts):
        try:
            manifest = make_split(index, policy, label=label, folds=parts, fold=fold, seed=seed)
        except InputError as error:  # nothing can be learned for this fold; others may do
            why = str(error)
            continue
        train, test = (np.flatnonzero(manifest["part"] == name) for name in (TRAIN, TEST))
        found.append((train, test[np.isin(labels[test], labels[train])]))
    if not found:
        raise InputError(why)
    judged = sum(len(test) for _, test in found)
    if judged < _LEAST_JUDGED * len(index):
        raise InputError(f"only {judged} of {len(index)} rows could be judged: {classes}")
    return SplitDesign(policy, tuple(found), len(index) - judged)


def _without_flag(message: str) -> str:
    """The sentence behind `--split POLICY:`, without its advice, which is for one who asked for that split."""
    sentence = message.split(": ", 1)[-1] if message.startswith("--") else message
    return sentence.split(";", 1)[0]

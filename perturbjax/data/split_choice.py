"""Choice of the split policy: the strictest one that the data allow.

The stricter the split, the less a score can rest on properties that sites of one well, plate or
layout have in common. Policies that hold out whole compounds answer another question and are never
chosen.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from perturbjax.core.choices import SPLIT_POLICIES
from perturbjax.core.errors import InputError

#: Minimum fraction of the sites whose class occurs in two groups or more, so that it can be both
#: trained and tested.
MIN_ANSWERABLE = 0.9
#: Policies from strict to weak; the last one is always possible.
STRICT_FIRST = ("layout", "plate", "well")


def choose_split(index: pd.DataFrame, label: str, folds: int) -> tuple[str, str]:
    """Choose the strictest of the policies `STRICT_FIRST` that the data allow.

    Args:
        index: one row for each site.
        label: column with the classes.
        folds: number of folds, each with at least one group.

    Returns:
        The policy, and one sentence with the reason.
    """
    refused: list[str] = []
    for policy in STRICT_FIRST:
        reason = _obstacle(index, policy, label, folds)
        if not reason or policy == STRICT_FIRST[-1]:
            break
        refused.append(f"not {policy}: {reason}")
    why = f" ({'; '.join(refused)})" if refused else ""
    return policy, f"info: --split {policy} is the strictest split of these data{why}"


def infer_split(train: pd.DataFrame, test: pd.DataFrame, label: str) -> str:
    """Return the strictest policy of which no group is in both tables; site if there is none.

    Args:
        train: index rows of the training sites.
        test: index rows of the test sites.
        label: column with the classes.
    """
    index = pd.concat([train, test], ignore_index=True)
    for policy in ("compound", *STRICT_FIRST):
        try:
            if SPLIT_POLICIES[policy].unavailable(index, label):
                continue
            groups = assign_groups(index, policy)
        except InputError:  # no column identifies compounds
            continue
        if not set(groups[: len(train)]) & set(groups[len(train) :]):
            return policy
    return "site"


def assign_groups(index: pd.DataFrame, policy: str) -> np.ndarray:
    """Return the group of each site under a split policy, (n,) text.

    Raises:
        InputError: the policy is unknown.
    """
    if policy not in SPLIT_POLICIES:
        raise InputError(
            f"--split {policy}: unknown (available: {', '.join(SPLIT_POLICIES)}). Pass one of "
            "these."
        )
    return SPLIT_POLICIES[policy].groups(index).to_numpy(dtype=object)


def _obstacle(index: pd.DataFrame, policy: str, label: str, folds: int) -> str:
    """Why the data do not allow a policy; empty if they do."""
    try:
        if reason := SPLIT_POLICIES[policy].unavailable(index, label):
            return reason
        groups = pd.Series(assign_groups(index, policy))
    except InputError as error:  # no column identifies compounds
        return error.message.rstrip(".")
    if (count := groups.nunique()) < folds:
        return f"{count} {policy}s are fewer than --folds {folds}"
    labels = index[label].astype(str).reset_index(drop=True)
    answerable = labels.map(groups.groupby(labels).nunique() >= 2).mean()
    if answerable < MIN_ANSWERABLE:
        return f"{1 - answerable:.0%} of the sites have a class that occurs on one {policy} only"
    return ""

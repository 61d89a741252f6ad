"""Dependence of labels on the well position, measured without images.

A label that depends on the well position cannot be distinguished from position effects (edge
wells evaporate, stainers and dispensers work row by row or column by column). `position_warnings`
predicts the label of every well by a majority vote of the other wells of the same plate that share
its row, its column, its distance from the edge, or that are its direct neighbors. The score is the
balanced accuracy of this prediction. Chance is the same score after permuting the labels within
each plate.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Int

from perturbjax.core.plates import PLATE, WELL, parse_wells, smallest_plate_shape

#: Minimum number of wells, and maximum number of plates used (evenly chosen), for the position
#: score.
MIN_WELLS, MAX_PLATES = 20, 4
#: Number of permutations that estimate chance.
PERMUTATIONS = 50
#: A warning requires a score of at least chance + 5 standard deviations of the permuted scores, and
#: at least this fraction of the way from chance to 1.
MIN_STANDARD_DEVIATIONS, MIN_GAIN = 5.0, 0.3


def position_warnings(sites: pd.DataFrame, label_column: str) -> list[str]:
    """Warn if row, column, edge or neighboring wells predict the label far better than chance.

    The most accurate predictor is reported. All classes are tested first, then the largest class
    (usually the control) against all others.

    Returns:
        One message, or none.
    """
    wells = sites.drop_duplicates([PLATE, WELL])
    if len(wells) < MIN_WELLS:
        return []
    plates = wells[PLATE].unique()
    # Pairs of wells are compared, so the time grows with the square of the wells.
    sample = np.unique(np.linspace(0, len(plates) - 1, MAX_PLATES).round().astype(int))
    positions = parse_wells(wells[WELL])
    wells = wells[wells[PLATE].isin(plates[sample]).to_numpy() & (positions >= 0).all(axis=1)]
    labels = wells[label_column]
    if len(wells) < MIN_WELLS or labels.nunique() < 2:
        return []
    plate_codes = pd.factorize(wells[PLATE])[0]
    voters = _list_voters(plate_codes, parse_wells(wells[WELL]))
    largest = labels.mode()[0]
    questions = {f"{label_column} of a well": labels}
    if labels.nunique() > 2:
        questions[f"whether a well contains {largest}"] = labels == largest
    for question, values in questions.items():
        name, score, chance = _best_predictor(voters, pd.factorize(values)[0], plate_codes)
        if name:
            return [
                f"{name} predicts {question} with balanced accuracy {score:.2f} (chance "
                f"{chance:.2f}) without any image: position effects and treatment effects cannot "
                "be distinguished. Randomize the layout, or compare all scores with the "
                "position-only baseline"
            ]
    return []


#: Pairs (well, voting well) as two index arrays.
Pairs = tuple[np.ndarray, ...]


def _list_voters(
    plates: Int[np.ndarray, " n"], positions: Int[np.ndarray, "n 2"]
) -> dict[str, Pairs]:
    """Return the pairs of well and voting well on the same plate for each predictor."""
    height, width = smallest_plate_shape(positions, min_wells=6)
    row, column = positions.T
    edge = np.minimum.reduce([row, column, height - 1 - row, width - 1 - column])
    steps = abs(row[:, None] - row) + abs(column[:, None] - column)
    predictors = {
        "the row": row[:, None] == row,
        "the column": column[:, None] == column,
        "the distance from the edge": edge[:, None] == edge,
        "the label of adjacent wells": steps == 1,
    }
    is_other = (plates[:, None] == plates) & (steps > 0)
    return {name: np.nonzero(matrix & is_other) for name, matrix in predictors.items()}


def _best_predictor(
    voters: dict[str, Pairs],
    labels: Int[np.ndarray, " n"],
    plates: Int[np.ndarray, " n"],
) -> tuple[str, float, float]:
    """Return name, score and chance of the best predictor; an empty name if none passes."""
    rng = np.random.default_rng(0)
    permuted = []
    for _ in range(PERMUTATIONS):
        # A random order within each plate: the last key of lexsort is the first to sort by.
        order = np.lexsort((rng.random(len(plates)), plates))
        shuffled = np.empty_like(labels)
        shuffled[np.argsort(plates, kind="stable")] = labels[order]
        permuted.append(shuffled)
    best = ("", 0.0, 0.0)
    for name, pairs in voters.items():
        score = _vote_score(pairs, labels)
        # Scores without any dependence of label and position.
        null = [_vote_score(pairs, one) for one in permuted]
        chance, spread = float(np.mean(null)), float(np.std(null))
        required = max(chance + MIN_STANDARD_DEVIATIONS * spread, chance + MIN_GAIN * (1 - chance))
        if score >= required and score > best[1]:
            best = (name, score, chance)
    return best


def _vote_score(pairs: Pairs, labels: Int[np.ndarray, " n"]) -> float:
    """Balanced accuracy of the majority vote over classes with at least two wells.

    A tie counts as the fraction 1 / (number of tied classes) if the true class is among them.
    """
    wells, voters = pairs
    counts = np.bincount(labels)
    # Flat index into a table of (well, class), so that one bincount counts all votes.
    cells = wells * len(counts) + labels[voters]
    votes = np.bincount(cells, minlength=len(labels) * len(counts)).reshape(len(labels), -1)
    most = votes.max(axis=1, keepdims=True)
    # A well without voters gets no vote and counts as wrong.
    winners = (votes == most) & (most > 0)
    is_right = winners[np.arange(len(labels)), labels]
    credit = is_right / np.maximum(winners.sum(axis=1), 1)
    recall = np.bincount(labels, weights=credit) / np.maximum(counts, 1)
    return float(recall[counts > 1].mean()) if (counts > 1).any() else 0.0

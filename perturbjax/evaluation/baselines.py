"""What can be scored without looking at a cell: the numbers that a model has to beat.

Each baseline is fitted on the training part and gives probabilities for the test sites, so that the same scores and
intervals apply to it as to the model. `BASELINES` names them; a new one is a function and a line there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.optimize import minimize

from perturbjax.core.plates import PLATE, WELL, parse_wells
from perturbjax.evaluation.scores import TOP_K, Counts
from perturbjax.evaluation.wells import well_ids

#: Widths in wells of the position baseline's kernel; 0 is the well position alone.
_WIDTHS = (0.0, 1.0, 2.0, 4.0)
#: How many times the test well's own plate counts, where it has training wells.
_OWN_PLATE = (1.0, 100.0)
#: Wells' worth of training frequencies mixed into what neighbours say: decides only where they say nothing.
_PRIOR_WELLS = 1e-3
#: Sites' worth of the pooled covariance mixed into each class's own.
_POOLED_SITES = 10.0
#: What the builder measures of each channel's pixels, before the channel's name.
_INTENSITY = re.compile(r"^(mean|std|p\d\d)_")
#: Steps after which the fit of the intensity baseline stops; its probabilities no longer move long before.
_STEPS = 200


class BaselineUnavailable(Exception):
    """A baseline cannot be computed on this data; the message says why."""


def majority(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """Training frequencies for every site: always the most frequent class, and as top 5 the five most frequent."""
    prior = np.bincount(train_labels, minlength=classes) / len(train_labels)
    return np.broadcast_to(prior, (len(test), classes)).copy()


def chance_counts(
    labels: Int[np.ndarray, " n"],
    train_labels: Int[np.ndarray, " train"],
    classes: int,
    clusters: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    draws: int = 4096,
) -> Counts:
    """Stratified chance: a class drawn from the training frequencies for every site.

    Expected counts over all draws rather than one draw, so that the baseline itself has no luck. Top 5 are five
    classes drawn without replacement (Gumbel top-k over `draws` draws).
    """
    prior = np.bincount(train_labels, minlength=classes) / len(train_labels)
    with np.errstate(divide="ignore"):  # a class without training sites is never drawn
        logits = np.log(prior) + np.random.default_rng(seed).gumbel(size=(draws, classes))
    k = min(TOP_K, classes)
    among_top = (
        np.bincount(np.argpartition(-logits, k - 1, axis=1)[:, :k].ravel(), minlength=classes)
        / draws
    )
    among_top = np.where(prior > 0, among_top, 0)
    rows = int(clusters.max()) + 1
    truth = np.bincount(clusters * classes + labels, minlength=rows * classes).reshape(
        rows, classes
    )
    predicted = truth.sum(axis=1, keepdims=True) * prior
    return Counts(truth.astype(float), predicted, truth * prior, truth @ among_top)


def position(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """What the well's place on the plate says: labels of training wells, weighted by their distance.

    Training wells at the same place on any plate, and their neighbours with a Gaussian weight, vote for their label;
    wells of the test well's own plate may count more. Width and plate weight are those that best predict the training
    wells when each is held out as the test wells are (with its plate where test plates are new, else alone).

    Raises:
        Unavailable: wells are not named as on a plate.
    """
    train_wells, train_spots = _spots(train, "training")
    test_wells, test_spots = _spots(test, "test")
    first, test_first = (
        np.unique(wells, return_index=True)[1] for wells in (train_wells, test_wells)
    )
    places, place_of = np.unique(
        np.concatenate([train_spots[first], test_spots[test_first]]), axis=0, return_inverse=True
    )
    place_of, test_place_of = np.split(place_of.ravel(), [len(first)])
    names = pd.concat([train[PLATE].iloc[first], test[PLATE].iloc[test_first]]).astype(str)
    plate_of, test_plate_of = np.split(pd.factorize(names)[0], [len(first)])

    votes = np.zeros((len(first), classes))  # one vote a well, shared by the labels of its sites
    np.add.at(votes, (train_wells, train_labels), 1)
    votes /= votes.sum(axis=1, keepdims=True)
    fit = _PositionVotes(places, place_of, plate_of, votes)
    new_plates = not np.isin(test_plate_of, plate_of).any()
    leave = "nothing" if _seen(train, test) else "plate" if new_plates else "well"
    settings = [(width, own) for width in _WIDTHS for own in ((1.0,) if new_plates else _OWN_PLATE)]
    correct = [fit.training_accuracy(width, own, leave) for width, own in settings]
    width, own = settings[int(np.argmax(correct))]
    return fit.predict(test_place_of, test_plate_of, width, own)[test_wells]


def _seen(train: pd.DataFrame, test: pd.DataFrame) -> bool:
    """Whether any test well has sites in training."""
    ids = well_ids(pd.concat([train, test], ignore_index=True))
    return bool(np.isin(ids[len(train) :], ids[: len(train)]).any())


def _spots(index: pd.DataFrame, part: str) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, "n 2"]]:
    spots = parse_wells(index[WELL])
    if (bad := spots[:, 0] < 0).any():
        name = index[WELL].iloc[int(np.flatnonzero(bad)[0])]
        raise BaselineUnavailable(f"{part} well {name!r} is not named like A01 to P24 (or AF48)")
    return well_ids(index), spots


class _PositionVotes:
    """Votes of training wells on the places of a plate; a place is a row of `places` (row, column)."""

    def __init__(
        self,
        places: Int[np.ndarray, "places 2"],
        place_of: Int[np.ndarray, " wells"],
        plate_of: Int[np.ndarray, " wells"],
        votes: Float[np.ndarray, "wells classes"],
    ):
        self.place_of, self.plate_of, self.votes = place_of, plate_of, votes
        self.squared = ((places[:, None] - places) ** 2).sum(axis=2)
        self.prior = votes.mean(axis=0)

    def _on_places(self, wells: np.ndarray | slice) -> Float[np.ndarray, "places classes"]:
        votes = np.zeros((len(self.squared), self.votes.shape[1]))
        np.add.at(votes, self.place_of[wells], self.votes[wells])
        return votes

    def predict(
        self,
        place_of: Int[np.ndarray, " n"],
        plate_of: Int[np.ndarray, " n"],
        width: float,
        own_plate: float,
        leave: str = "nothing",
    ) -> Float[np.ndarray, "n classes"]:
        """Probabilities at places of plates; votes of the asked wells' own plate count `own_plate` times.

        `leave` "plate" keeps those out, "well" the votes of the asked wells themselves.
        """
        kernel = (
            (self.squared == 0).astype(float)
            if width == 0
            else np.exp(-self.squared / (2 * width**2))
        )
        everywhere = kernel @ self._on_places(slice(None))
        out = np.empty((len(place_of), self.votes.shape[1]))
        for plate in np.unique(plate_of):
            asked = np.flatnonzero(plate_of == plate)
            places, own = place_of[asked], self._on_places(self.plate_of == plate)
            said = everywhere[places] + (-1.0 if leave == "plate" else own_plate - 1) * (
                kernel[places] @ own
            )
            if leave == "well":
                said -= own_plate * own[places]
            said = (
                said.clip(min=0) + _PRIOR_WELLS * self.prior
            )  # what was taken out leaves rounding below zero
            out[asked] = said / said.sum(axis=1, keepdims=True)
        return out

    def training_accuracy(self, width: float, own_plate: float, leave: str) -> float:
        """Share of training wells whose label is predicted when they are left out as `leave` says."""
        predicted = self.predict(self.place_of, self.plate_of, width, own_plate, leave).argmax(
            axis=1
        )
        return float((predicted == self.votes.argmax(axis=1)).mean())


def cell_count(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """What the number of cells and their area say: a Gaussian for each class in (log cells, log area).

    Quadratic discriminant analysis; each class's covariance is shrunk to the pooled one, as if `_POOLED_SITES` of its
    sites had that.

    Raises:
        Unavailable: `n_cells` and `mask_area` are not in the index, or not numbers.
    """
    x, z = log_cell_counts(train), log_cell_counts(test)
    scale = x.std(axis=0) + 1e-9
    centre = x.mean(axis=0)
    x, z = (x - centre) / scale, (z - centre) / scale
    support = np.bincount(train_labels, minlength=classes).astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (
            np.stack([np.bincount(train_labels, column, classes) for column in x.T], axis=1)
            / support[:, None]
        )
        log_prior = np.log(support / support.sum())
    means = np.where(support[:, None] > 0, means, 0)
    residual = x - means[train_labels]
    products = residual[:, :, None] * residual[:, None, :]
    scatter = np.zeros((classes, 2, 2))
    np.add.at(scatter, train_labels, products)
    pooled = scatter.sum(axis=0) / len(x)
    covariance = (scatter + _POOLED_SITES * pooled) / (support + _POOLED_SITES)[
        :, None, None
    ] + 1e-3 * np.eye(2)
    precision, log_determinant = np.linalg.inv(covariance), np.linalg.slogdet(covariance)[1]
    delta = z[:, None] - means
    distance = np.einsum("nci,cij,ncj->nc", delta, precision, delta, optimize=True)
    logits = log_prior - 0.5 * (distance + log_determinant)
    likelihood = np.exp(logits - logits.max(axis=1, keepdims=True))
    return likelihood / likelihood.sum(axis=1, keepdims=True)


def log_cell_counts(index: pd.DataFrame) -> Float[np.ndarray, "n 2"]:
    """Logarithms of the number and of the area of each site's cells.

    Raises:
        Unavailable: the index has no such columns, or they are not numbers.
    """
    columns = ["n_cells", "mask_area"]
    if missing := [column for column in columns if column not in index.columns]:
        raise BaselineUnavailable(f"the index has no column {missing[0]}")
    values = index[columns].to_numpy(dtype=float)
    if not np.isfinite(values).all():
        raise BaselineUnavailable("n_cells or mask_area is missing for some sites")
    return np.log1p(values)


def log_intensities(index: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    """Logarithms of the mean, the deviation and percentiles of each channel's pixels.

    Raises:
        Unavailable: the index has no such columns, or they are not numbers.
    """
    columns = [column for column in index.columns if _INTENSITY.match(column)]
    if not columns:
        raise BaselineUnavailable(
            "the index has no columns mean_<channel>, std_<channel>, p50_<channel>"
        )
    values = np.log1p(index[columns].to_numpy(dtype=float).clip(min=0))
    if not np.isfinite(values).all():
        raise BaselineUnavailable("statistics of the channels are missing for some sites")
    return values


def intensity(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """What the brightness of each channel says, without a shape: logistic regression on the index's statistics.

    Raises:
        Unavailable: as `log_intensities`.
    """
    return standardized_logistic(
        log_intensities(train), train_labels, log_intensities(test), classes
    )


def standardized_logistic(
    x: Float[np.ndarray, "train d"],
    train_labels: Int[np.ndarray, " train"],
    z: Float[np.ndarray, "test d"],
    classes: int,
) -> Float[np.ndarray, "test classes"]:
    """Probabilities of `logistic` on columns standardized on training rows; 0 for classes that are not there."""
    centre, scale = x.mean(axis=0), x.std(axis=0) + 1e-9
    seen, targets = np.unique(train_labels, return_inverse=True)
    found = np.zeros((len(z), classes))
    found[:, seen] = logistic((x - centre) / scale, targets, (z - centre) / scale)
    return found


def logistic(
    x: Float[np.ndarray, "train d"],
    targets: Int[np.ndarray, " train"],
    z: Float[np.ndarray, "test d"],
) -> Float[np.ndarray, "test classes"]:
    """Probabilities of multinomial logistic regression, half the squared weights (not the intercepts) added to the
    summed loss; columns should be of about deviation 1, `targets` number the classes that occur."""
    n, (d, classes) = len(x), (x.shape[1], int(targets.max()) + 1)
    ones = np.zeros((n, classes))
    ones[np.arange(n), targets] = 1

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercepts = flat[classes:].reshape(d, classes), flat[:classes]
        logits = x @ weights + intercepts
        logits -= logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(axis=1, keepdims=True))
        error = np.exp(logits - log_sum) - ones
        value = float(
            (log_sum[:, 0] - logits[np.arange(n), targets]).sum() + 0.5 * (weights**2).sum()
        )
        return value, np.concatenate([error.sum(axis=0), (x.T @ error + weights).ravel()])

    fit = minimize(
        loss, np.zeros(classes * (d + 1)), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}
    ).x
    logits = z @ fit[classes:].reshape(d, classes) + fit[:classes]
    likelihood = np.exp(logits - logits.max(axis=1, keepdims=True))
    return likelihood / likelihood.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Baseline:
    """Something to beat, fitted on a fold's training sites.

    Attributes:
        words: what it knows, for the reader of a table.
        predict: (training index, its labels, test index, classes) -> probabilities of the test sites.
        draw: in place of it, where the answer is drawn by chance: (labels, training labels, classes, clusters, seed=…)
            -> the counts expected over all draws.
    """

    words: str
    predict: Callable[..., Float[np.ndarray, "test classes"]] | None = None
    draw: Callable[..., Counts] | None = None


#: In the order of the tables.
BASELINES: dict[str, Baseline] = {
    "majority": Baseline("training frequencies", predict=majority),
    "chance": Baseline("a class drawn by them", draw=chance_counts),
    "position": Baseline("nearest training wells", predict=position),
    "cell count": Baseline("number and area of the cells", predict=cell_count),
    "intensity": Baseline(
        "mean, spread and percentiles of each channel's pixels", predict=intensity
    ),
}

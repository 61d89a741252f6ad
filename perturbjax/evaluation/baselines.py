"""Baselines: class probabilities from technical covariates, without any feature of the cells.

A score shows a treatment effect only if it is higher than these baselines. Each one is fitted on
the training sites of a fold and predicts its test sites, so that the same scores and confidence
intervals apply to baselines and models. `BASELINES` lists them; to add one, write a function and
add an entry there.

Well positions come from `core.plates.parse_wells`. Wells whose names give no position (for example
`A06_rescan`) are excluded from the position-only baseline: they do not vote, and their sites get
the training frequencies. With more than `MAX_UNPLACED` such wells the baseline is not available.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from perturbjax.core.plates import PLATE, WELL, parse_wells
from perturbjax.evaluation.logistic import softmax, standardized_logistic
from perturbjax.evaluation.scores import TOP_K, Counts
from perturbjax.evaluation.wells import well_ids

#: Kernel widths of the position-only baseline, in wells; 0 uses the same well position only.
_WIDTHS = (0.0, 1.0, 2.0, 4.0)
#: Weights of training wells on the test well's own plate.
_OWN_PLATE = (1.0, 100.0)
#: Weight of the training frequencies, in wells; decides only where no neighbor votes.
_PRIOR_WELLS = 1e-3
#: Maximum fraction of wells without a known position.
MAX_UNPLACED = 0.1
#: Weight of the pooled covariance in each class's covariance, in sites.
_POOLED_SITES = 10.0
#: Weight of the training frequencies in those of one plate, in sites.
_PRIOR_SITES = 1.0
#: Image statistics that `build` stores per channel.
_INTENSITY = re.compile(r"^(mean|std|p\d\d)_")
#: Prefix of CellProfiler intensity features that `audit` adds to the index.
MEASURED_PREFIX = "measured: "
_TREES = 50


class BaselineUnavailable(Exception):
    """The data do not allow this baseline or test; the message gives the reason."""


def majority(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """Predict the training frequencies for every site, and so always the most frequent class."""
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
    """Expected counts of stratified guessing: a class drawn from the training frequencies.

    Expectations instead of one random draw make the baseline free of sampling noise. The top 5
    are five classes drawn without replacement (Gumbel top-k trick over `draws` draws).
    """
    prior = np.bincount(train_labels, minlength=classes) / len(train_labels)
    with np.errstate(divide="ignore"):  # classes without training sites are never drawn
        # Gumbel top-k: the k largest values of log p + Gumbel noise are a sample without
        # replacement.
        logits = np.log(prior) + np.random.default_rng(seed).gumbel(size=(draws, classes))
    k = min(TOP_K, classes)
    top = np.argpartition(-logits, k - 1, axis=1)[:, :k].ravel()
    in_top = np.where(prior > 0, np.bincount(top, minlength=classes) / draws, 0)
    rows = int(clusters.max()) + 1
    truth = np.bincount(clusters * classes + labels, minlength=rows * classes)
    truth = truth.reshape(rows, classes)
    # Expected counts: the guess is independent of the true class.
    predicted = truth.sum(axis=1, keepdims=True) * prior
    return Counts(truth.astype(float), predicted, truth * prior, truth @ in_top)


def position(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """Predict from the well position: votes of the training wells, weighted by distance.

    Training wells at the same position of any plate, and their neighbors with a Gaussian weight,
    vote for their label. Wells of the test well's own plate can have a higher weight. Kernel width
    and plate weight maximize the accuracy on the training wells, each left out like the test wells
    (with its whole plate if the test plates are new, otherwise as a single well).

    Raises:
        BaselineUnavailable: too many well names give no position.
    """
    unplaced = unplaced_sites(train), unplaced_sites(test)
    for part, table, missing in zip(("training", "test"), (train, test), unplaced, strict=True):
        wells = table.loc[missing, [PLATE, WELL]].drop_duplicates()
        if len(wells) > MAX_UNPLACED * len(table[[PLATE, WELL]].drop_duplicates()):
            raise BaselineUnavailable(
                f"{len(wells)} {part} wells have no recognized name (first: "
                f"{wells[WELL].iloc[0]!r}; expected e.g. A01, A-01, r01c01 or AF48)"
            )
    prior = np.bincount(train_labels, minlength=classes) / len(train_labels)
    probabilities = np.tile(prior, (len(test), 1))
    train_placed, test_placed = (~missing for missing in unplaced)
    if test_placed.any() and train_placed.any():
        probabilities[test_placed] = _vote(
            train[train_placed], train_labels[train_placed], test[test_placed], classes
        )
    return probabilities


def unplaced_sites(index: pd.DataFrame) -> Bool[np.ndarray, " n"]:
    """True for sites whose well name gives no row and column."""
    return parse_wells(index[WELL])[:, 0] < 0


def list_unplaced_wells(index: pd.DataFrame) -> tuple[str, ...]:
    """Plate and name of each well without a position, for messages."""
    wells = index.loc[unplaced_sites(index), [PLATE, WELL]].drop_duplicates()
    return tuple(f"{plate} {well}" for plate, well in wells.itertuples(index=False))


def _vote(
    train: pd.DataFrame, train_labels: np.ndarray, test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    train_wells, test_wells = well_ids(train), well_ids(test)
    first, test_first = (
        np.unique(wells, return_index=True)[1] for wells in (train_wells, test_wells)
    )
    spots = parse_wells(train[WELL].iloc[first]), parse_wells(test[WELL].iloc[test_first])
    # Number the distinct positions of training and test wells together.
    grid, spot_ids = np.unique(np.concatenate(spots), axis=0, return_inverse=True)
    train_spots, test_spots = np.split(spot_ids.ravel(), [len(first)])
    names = pd.concat([train[PLATE].iloc[first], test[PLATE].iloc[test_first]]).astype(str)
    train_plates, test_plates = np.split(pd.factorize(names)[0], [len(first)])

    votes = np.zeros((len(first), classes))  # one vote per well, divided among its sites' labels
    np.add.at(votes, (train_wells, train_labels), 1)
    votes /= votes.sum(axis=1, keepdims=True)
    fit = _PositionVotes(grid, train_spots, train_plates, votes)
    new_plates = not np.isin(test_plates, train_plates).any()
    # Imitate the test situation: a test site can share a well or a plate with the training set, or
    # neither.
    leave = "nothing" if _share_wells(train, test) else "plate" if new_plates else "well"
    weights = (1.0,) if new_plates else _OWN_PLATE
    settings = [(width, own) for width in _WIDTHS for own in weights]
    correct = [fit.training_accuracy(width, own, leave) for width, own in settings]
    width, own = settings[int(np.argmax(correct))]
    return fit.predict(test_spots, test_plates, width, own)[test_wells]


def _share_wells(train: pd.DataFrame, test: pd.DataFrame) -> bool:
    ids = well_ids(pd.concat([train, test], ignore_index=True))
    return bool(np.isin(ids[len(train) :], ids[: len(train)]).any())


class _PositionVotes:
    """Votes of training wells on positions; a position is a row of `grid` (row, column)."""

    def __init__(
        self,
        grid: Int[np.ndarray, "spots 2"],
        spots: Int[np.ndarray, " wells"],
        plates: Int[np.ndarray, " wells"],
        votes: Float[np.ndarray, "wells classes"],
    ):
        self.spots, self.plates, self.votes = spots, plates, votes
        # Squared distances between positions in units of the well spacing, (spots, spots).
        self.squared = ((grid[:, None] - grid) ** 2).sum(axis=2)
        self.prior = votes.mean(axis=0)

    def _sum_by_spot(self, wells: np.ndarray | slice) -> Float[np.ndarray, "spots classes"]:
        votes = np.zeros((len(self.squared), self.votes.shape[1]))
        np.add.at(votes, self.spots[wells], self.votes[wells])
        return votes

    def predict(
        self,
        spots: Int[np.ndarray, " n"],
        plates: Int[np.ndarray, " n"],
        width: float,
        own_plate: float,
        leave: str = "nothing",
    ) -> Float[np.ndarray, "n classes"]:
        """Probabilities at positions of plates; votes of the same plate count `own_plate` times.

        `leave="plate"` excludes the votes of the same plate, `leave="well"` those of the well.
        """
        if width == 0:
            kernel = (self.squared == 0).astype(float)
        else:
            kernel = np.exp(-self.squared / (2 * width**2))
        all_plates = kernel @ self._sum_by_spot(slice(None))
        # `all_plates` already contains the plate once; the correction removes it or adds the rest.
        own_weight = -1.0 if leave == "plate" else own_plate - 1
        probabilities = np.empty((len(spots), self.votes.shape[1]))
        for plate in np.unique(plates):
            rows = np.flatnonzero(plates == plate)
            own = self._sum_by_spot(self.plates == plate)
            votes = all_plates[spots[rows]] + own_weight * (kernel[spots[rows]] @ own)
            if leave == "well":
                votes -= own_plate * own[spots[rows]]
            # The subtraction can leave rounding errors below zero.
            votes = votes.clip(min=0) + _PRIOR_WELLS * self.prior
            probabilities[rows] = votes / votes.sum(axis=1, keepdims=True)
        return probabilities

    def training_accuracy(self, width: float, own_plate: float, leave: str) -> float:
        """Fraction of training wells predicted correctly when left out as `leave` states."""
        predicted = self.predict(self.spots, self.plates, width, own_plate, leave)
        return float((predicted.argmax(axis=1) == self.votes.argmax(axis=1)).mean())


def cell_count(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """Predict from number and area of the cells: one Gaussian per class in (log n, log area).

    Quadratic discriminant analysis. The covariance of each class is shrunk towards the pooled
    covariance, which has the weight of `_POOLED_SITES` sites.

    Raises:
        BaselineUnavailable: `n_cells` or `mask_area` is absent from the index or not a number.
    """
    # Columns are log(1 + n_cells) and log(1 + mask_area).
    x, z = log_cell_counts(train), log_cell_counts(test)
    scale = x.std(axis=0) + 1e-9
    center = x.mean(axis=0)
    x, z = (x - center) / scale, (z - center) / scale
    support = np.bincount(train_labels, minlength=classes).astype(float)
    sums = np.stack([np.bincount(train_labels, column, classes) for column in x.T], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / support[:, None]
        log_prior = np.log(support / support.sum())
    means = np.where(support[:, None] > 0, means, 0)
    residual = x - means[train_labels]
    # Sum of outer products of the residuals of each class, (classes, 2, 2).
    scatter = np.zeros((classes, 2, 2))
    np.add.at(scatter, train_labels, residual[:, :, None] * residual[:, None, :])
    pooled = scatter.sum(axis=0) / len(x)
    weight = (support + _POOLED_SITES)[:, None, None]
    covariance = (scatter + _POOLED_SITES * pooled) / weight + 1e-3 * np.eye(2)
    precision, log_determinant = np.linalg.inv(covariance), np.linalg.slogdet(covariance)[1]
    delta = z[:, None] - means
    # Squared Mahalanobis distance of each test site to each class, (n, classes).
    distance = np.einsum("nci,cij,ncj->nc", delta, precision, delta, optimize=True)
    return softmax(log_prior - 0.5 * (distance + log_determinant))


def log_cell_counts(index: pd.DataFrame) -> Float[np.ndarray, "n 2"]:
    """log(1 + x) of the number of cells and of their total area in pixels, per site.

    Raises:
        BaselineUnavailable: a column is absent from the index or not a number.
    """
    columns = ["n_cells", "mask_area"]
    if missing := [column for column in columns if column not in index.columns]:
        raise BaselineUnavailable(f"the index has no column {missing[0]}")
    values = index[columns].to_numpy(dtype=float)
    if not np.isfinite(values).all():
        raise BaselineUnavailable("n_cells or mask_area is missing for some sites")
    return np.log1p(values)


def log_intensities(index: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    """log(1 + x) of mean, standard deviation and percentiles of each channel's pixels.

    Raises:
        BaselineUnavailable: a column is absent from the index or not a number.
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
    """Predict from the brightness of each channel: logistic regression on `log_intensities`.

    Raises:
        BaselineUnavailable: as `log_intensities`.
    """
    return standardized_logistic(
        log_intensities(train), train_labels, log_intensities(test), classes
    )


def plate(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """Predict from the plate: the class frequencies among its training sites.

    Raises:
        BaselineUnavailable: no test plate has training sites.
    """
    plates = pd.Index(pd.unique(train[PLATE]))
    test_plates = plates.get_indexer(test[PLATE])
    if (test_plates < 0).all():
        raise BaselineUnavailable("no test plate has training sites")
    prior = np.bincount(train_labels, minlength=classes) / len(train_labels)
    counts = np.zeros((len(plates) + 1, classes))  # the last row is used for new plates
    np.add.at(counts, (plates.get_indexer(train[PLATE]), train_labels), 1)
    counts += _PRIOR_SITES * prior
    return (counts / counts.sum(axis=1, keepdims=True))[test_plates]


def all_technical(
    train: pd.DataFrame, train_labels: Int[np.ndarray, " train"], test: pd.DataFrame, classes: int
) -> Float[np.ndarray, "test classes"]:
    """Predict from position, plate, cell count and brightness together, in one model.

    Extremely randomized trees (Geurts et al. 2006, Machine Learning 63, 3) take numbers and plate
    names without scaling. The trees are fitted one by one with the seeds that scikit-learn's
    `ExtraTreesClassifier(50, random_state=0)` uses: equal numbers in the memory of one tree, since
    a tree of 300 classes stores a class histogram in each of its nodes.
    """
    from sklearn.tree import ExtraTreeClassifier

    covariates = _covariates(pd.concat([train, test], ignore_index=True)).astype(np.float32)
    x, z = covariates[: len(train)], covariates[len(train) :]
    present, targets = np.unique(train_labels, return_inverse=True)
    probabilities, rng = np.zeros((len(test), classes)), np.random.RandomState(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes with few sites
        for _ in range(_TREES):
            seed = rng.randint(np.iinfo(np.int32).max)
            tree = ExtraTreeClassifier(max_features="sqrt", random_state=seed).fit(x, targets)
            probabilities[:, present] += tree.predict_proba(z)
    return probabilities / _TREES


def _covariates(index: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    """Row, column, distance to the edge, plate, and the available cell and channel statistics."""
    spots = parse_wells(index[WELL])
    # Distance to the nearest edge in wells; the last occupied row and column count as edges. Wells
    # at the edge of a plate evaporate more.
    edge = np.minimum(spots, spots.max(axis=0) - spots).min(axis=1, keepdims=True)
    parts = [spots, edge, pd.get_dummies(index[PLATE]).to_numpy(), measured_intensities(index)]
    for read in (log_cell_counts, log_intensities):
        try:
            parts.append(read(index))
        except BaselineUnavailable:  # reported for the baseline that uses only these columns
            continue
    return np.concatenate(parts, axis=1).astype(float)


def measured_intensities(index: pd.DataFrame) -> Float[np.ndarray, "n d"]:
    """CellProfiler intensity features in the index (see `audit.controls`), if any."""
    columns = [column for column in index.columns if str(column).startswith(MEASURED_PREFIX)]
    return index[columns].to_numpy(dtype=float)


@dataclass(frozen=True)
class Baseline:
    """A predictor that a model is compared with, fitted on the training sites of a fold.

    Attributes:
        words: its inputs, for table captions.
        predict: (training index, training labels, test index, classes) -> probabilities.
        draw: used instead of `predict` by random baselines: (labels, training labels, classes,
            clusters, seed=...) -> counts expected over all draws.
    """

    words: str
    predict: Callable[..., Float[np.ndarray, "test classes"]] | None = None
    draw: Callable[..., Counts] | None = None


#: Name of the baseline that uses all technical covariates.
ALL_TECHNICAL = "all technical"
#: In the order of the tables.
BASELINES: dict[str, Baseline] = {
    "majority": Baseline("training frequencies", predict=majority),
    "chance": Baseline("class drawn from the training frequencies", draw=chance_counts),
    "position": Baseline("well position: labels of the nearest training wells", predict=position),
    "cell count": Baseline("number and area of the cells", predict=cell_count),
    "intensity": Baseline(
        "mean, standard deviation and percentiles of each channel's pixels", predict=intensity
    ),
    ALL_TECHNICAL: Baseline(
        "position, plate, cell count and intensity together", predict=all_technical
    ),
}

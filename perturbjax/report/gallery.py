"""Gallery: confident correct, confident wrong and typical sites per class; confused pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from perturbjax.core.messages import counted, html_text
from perturbjax.core.plates import PLATE, WELL
from perturbjax.evaluation.wells import well_ids
from perturbjax.report.class_section import Confusion
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.page import anchor
from perturbjax.report.run_results import RunResults, TestPredictions

#: Bytes of encoded pictures after which no more classes are drawn; pages stay below 10 MB.
BUDGET = 5_500_000
#: Pictures of a kind per class, and the number of classes up to which all are open.
_PICTURES, MAX_OPEN = 3, 24
#: Confused pairs, and how many of them may have the same predicted class.
_PAIRS, _PAIRS_PER_CLASS = 12, 3


class Choice(NamedTuple):
    """Sites of one class, as rows of the test predictions.

    Attributes:
        right: predicted correctly, most confident first.
        wrong: predicted wrongly, most confident first.
        typical: nearest to the center of the class.
    """

    right: list[int]
    wrong: list[int]
    typical: list[int]


def choose(
    test: TestPredictions,
    wells: Int[np.ndarray, " n"],
    features: Float[np.ndarray, "n d"] | None,
    label: int,
    each: int,
) -> Choice:
    """Select sites that represent a class, from different wells where possible.

    Typical sites are nearest to the mean of the standardized features of the class. Without
    features their probability of the true class is nearest to the median.

    Args:
        test: test predictions.
        wells: well number of each site.
        features: standardized features, or None.
        label: number of the class.
        each: maximum number of sites of a kind.
    """
    own = np.flatnonzero(test.labels == label)
    confident = own[np.argsort(-test.confidence[own], kind="stable")]
    if features is not None:
        distance = np.linalg.norm(features[own] - features[own].mean(axis=0), axis=1)
    else:
        probability = test.true_class_probability[own]
        distance = np.abs(probability - np.median(probability))
    right = _spread(confident[test.right[confident]], wells, each)
    wrong = _spread(confident[~test.right[confident]], wells, each)
    central = own[np.argsort(distance, kind="stable")]
    typical = _spread(central[~np.isin(central, right)], wells, each)
    return Choice(right, wrong, typical)


def _spread(ordered: Int[np.ndarray, " k"], wells: Int[np.ndarray, " n"], count: int) -> list[int]:
    """The first `count` sites, sites of further wells before repeated wells."""
    repeated: Bool[np.ndarray, " k"] = np.ones(len(ordered), dtype=bool)
    # The first site of each well is not a repetition. The stable sort preserves the order of sites
    # within both groups.
    repeated[np.unique(wells[ordered], return_index=True)[1]] = False
    return ordered[np.argsort(repeated, kind="stable")][:count].tolist()


def pictures_each(classes: int) -> int:
    """Pictures of a kind per class; fewer for many classes."""
    return _PICTURES if classes <= MAX_OPEN else 2 if classes <= 120 else 1


class Gallery:
    """Pictures of one evaluation; each site is drawn once, and the size of the page is limited.

    Args:
        results: the run.
        test: its test predictions.
        renderer: draws sites of its dataset.
    """

    def __init__(self, results: RunResults, test: TestPredictions, renderer: pictures.Renderer):
        self.test, self.renderer, self.positions = test, renderer, results.positions
        self.wells = well_ids(test.table)
        self.features = _features(results, test)
        # Number of sites that can still be decoded within the time limit.
        self.remaining = renderer.affordable(10_000)
        self.bytes = 0
        self._addresses: dict[int, pictures.ShotImages] = {}
        present = np.unique(test.labels)
        each = pictures_each(len(present))
        self.choices = {
            int(label): choose(test, self.wells, self.features, int(label), each)
            for label in present
        }

    @property
    def full(self) -> bool:
        """Whether the limit of bytes or of decoded sites is reached."""
        return self.bytes >= BUDGET or self.remaining <= 0

    def shots(self, sites: Iterable[int]) -> str:
        """Pictures of sites in a row, framed by whether the prediction is correct."""
        return f'<div class="shots">{"".join(map(self._shot, sites))}</div>'

    def _shot(self, row: int) -> str:
        test, site = self.test, self.test.table.iloc[row]
        if row not in self._addresses:
            self._addresses[row] = self.renderer.shot_images(self.positions[site["site_id"]])
            self.remaining -= 1
        # Counted for every use, because the page repeats the bytes of a picture.
        images = self._addresses[row]
        self.bytes += len(images.picture) + len(images.layers)
        right = bool(test.right[row])
        outcome = "right" if right else f"predicted as {test.class_names[test.predicted[row]]}"
        caption = f"{outcome}, {test.confidence[row]:.2f}"
        return pictures.shot(
            images,
            caption,
            f"cells of class {site['label']}, {outcome}",
            css="right" if right else "wrong",
            tip=f"{site['label']}: {caption}\nplate {site[PLATE]}, well {site[WELL]}\n"
            f"{site['site_id']}",
        )

    def class_details(self, label: int, *, is_open: bool) -> str:
        """Pictures of one class: correct, wrong and typical."""
        choice, name = self.choices[label], self.test.class_names[label]
        own = self.test.labels == label
        total = counted(int(own.sum()), "site")
        count = f"{int(self.test.right[own].sum())} of {total} predicted correctly"
        kinds = (
            ("most confident correct", choice.right),
            ("most confident wrong", choice.wrong),
            ("typical", choice.typical),
        )
        strips = "".join(
            f'<div class="strip"><p>{title}</p>{self.shots(sites)}</div>'
            for title, sites in kinds
            if sites
        )
        text = html_text(name)
        return (
            f'<details class="class" id="{anchor("class", name)}" data-name="{text}"'
            f"{' open' if is_open else ''}><summary>{text} <small>{count}</small></summary>"
            f'<div class="strips">{strips}</div></details>'
        )

    def pair_details(self, true: int, predicted: int, sites: int) -> str:
        """Sites of one class predicted as another, next to typical sites of both."""
        test = self.test
        confused = np.flatnonzero((test.labels == true) & (test.predicted == predicted))
        confident = confused[np.argsort(-test.confidence[confused], kind="stable")]
        a, b = (html_text(test.class_names[label]) for label in (true, predicted))
        rows = [(f"{a} predicted as {b}", _spread(confident, self.wells, 2))]
        for name, label in ((a, true), (b, predicted)):
            if label in self.choices:
                choice = self.choices[label]
                rows.append((f"typical {name}", choice.typical[:2] or choice.right[:2]))
        strips = "".join(
            f'<div class="strip"><p>{title}</p>{self.shots(chosen)}</div>'
            for title, chosen in rows
            if chosen
        )
        total = int((test.labels == true).sum())
        return (
            f"<h3>{a} → {b} <small>{sites} of {counted(total, 'site')}</small></h3>"
            f'<div class="strips">{strips}</div>'
        )


def _features(results: RunResults, test: TestPredictions) -> np.ndarray | None:
    """Standardized features of the test sites, or None."""
    if results.features is None:
        return None
    rows = results.features.set_index("Metadata_site_id")
    names = [name for name in rows.columns if not name.startswith("Metadata_")]
    values = rows[names].loc[test.table["site_id"]].to_numpy(float)
    spread = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)


def pairs(gallery: Gallery, confusion: Confusion) -> str:
    """Return the most confused pairs with pictures as HTML."""
    number = {name: i for i, name in enumerate(gallery.test.class_names)}
    parts: list[str] = []
    count = np.zeros(len(confusion.names), dtype=int)
    for true, predicted, sites in confusion.pairs():
        if gallery.full or len(parts) == _PAIRS:
            break
        if count[predicted] < _PAIRS_PER_CLASS:
            count[predicted] += 1
            a, b = number[confusion.names[true]], number[confusion.names[predicted]]
            parts.append(gallery.pair_details(a, b, sites))
    note = (
        f"Pairs with most sites first, at most {_PAIRS_PER_CLASS} pairs per predicted class; the "
        "confusion matrix has all."
    )
    return f'<p class="note">{note}</p>{"".join(parts)}' if parts else ""


def classes(gallery: Gallery) -> tuple[str, set[str]]:
    """Return the pictures of every class as HTML, and the names of the classes drawn.

    With many classes, those with most errors come first.
    """
    test = gallery.test
    order, many = _order(test), len(gallery.choices) > MAX_OPEN
    parts, drawn = [], []
    for place, label in enumerate(order):
        if gallery.full:
            break
        # With many classes, only the first three are open.
        parts.append(gallery.class_details(label, is_open=not many or place < 3))
        drawn.append(test.class_names[label])
    search = (
        '<label>find <input type="search" data-filter="details.class"></label><output></output>'
        if many
        else ""
    )
    left = len(order) - len(drawn)
    first = ", most errors first" if many else ""
    rest = f"; {left} classes with fewer errors are left out to limit the page size" if left else ""
    note = (
        f'<div class="tools">{search}<span>{len(drawn)} of {len(order)} classes{first}{rest}</span>'
        "</div>"
    )
    body = "".join(parts)
    album = f'<div class="album" tabindex="0">{body}</div>' if many else body
    return note + album, set(drawn)


def legend(gallery: Gallery) -> str:
    """Return the meaning of colors and frames as HTML."""
    return gallery.renderer.legend() + (
        '<p class="note"><span class="swatch" style="background:var(--right)"></span>solid blue '
        'frame: predicted correctly. <span class="swatch" style="background:var(--wrong)"></span>'
        "dashed orange frame: predicted as another class. The number is the confidence. All are "
        "test sites.</p>"
    )


def _order(test: TestPredictions) -> Sequence[int]:
    """Classes by name; many classes by number of errors."""
    present = np.unique(test.labels)
    if len(present) <= MAX_OPEN:
        return [int(label) for label in sorted(present, key=lambda i: test.class_names[i])]
    errors = np.bincount(test.labels[~test.right], minlength=len(test.class_names))
    return [int(label) for label in present[np.argsort(-errors[present], kind="stable")]]

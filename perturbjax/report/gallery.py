"""The cells behind the numbers: for every class the surest right, the surest wrong and the typical sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from perturbjax.core.messages import html_text
from perturbjax.core.plates import PLATE, WELL
from perturbjax.evaluation.wells import well_ids
from perturbjax.report.class_section import Confusion
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.page import anchor
from perturbjax.report.run_results import Answers, Evidence

#: Bytes of pictures (as they stand in the page) after which no more classes are shown; a page stays below 10 MB.
BUDGET = 5_500_000
#: Pictures of a kind, where there is room, and classes up to which there is.
_MOST, ROOMY = 3, 24
#: Confused pairs that are shown, and how many of them may be taken for one class: else a frequent class takes them all.
_PAIRS, _FOR_ONE = 12, 3


class Choice(NamedTuple):
    """Sites of one class, by their place among the answers."""

    right: list[int]
    """Recognised, the surest first."""
    wrong: list[int]
    """Taken for another class, the surest first."""
    typical: list[int]
    """Nearest to the middle of the class, whatever was said of them."""


def choose(
    answers: Answers,
    wells: Int[np.ndarray, " n"],
    features: Float[np.ndarray, "n d"] | None,
    label: int,
    each: int,
) -> Choice:
    """Sites that show a class, at most `each` of a kind; other wells first, so that they are not all of one.

    Typical is what is nearest to the mean of the class's standardized features, or, without features, what has the
    median probability of the true class.
    """
    own = np.flatnonzero(answers.labels == label)
    right = answers.right[own]
    surest = own[np.argsort(-answers.confidence[own], kind="stable")]
    if features is not None:
        distance = np.linalg.norm(features[own] - features[own].mean(axis=0), axis=1)
    else:
        distance = np.abs(answers.of_truth[own] - np.median(answers.of_truth[own]))
    first = [_spread(surest[answers.right[surest] == told], wells, each) for told in (True, False)]
    middle = own[np.argsort(distance, kind="stable")]
    typical = _spread(middle[~np.isin(middle, first[0])], wells, each) if right.size else []
    return Choice(first[0], first[1], typical)


def _spread(ordered: Int[np.ndarray, " k"], wells: Int[np.ndarray, " n"], count: int) -> list[int]:
    """The first ones of sites in order, those of a well that is there already last."""
    again: Bool[np.ndarray, " k"] = np.ones(len(ordered), dtype=bool)
    again[np.unique(wells[ordered], return_index=True)[1]] = False
    return ordered[np.argsort(again, kind="stable")][:count].tolist()


def pictures_each(classes: int) -> int:
    """Pictures of a kind, of so many classes: a page has a size."""
    return _MOST if classes <= ROOMY else 2 if classes <= 120 else 1


class Gallery:
    """The pictures of one evaluation; each site is painted once, and what all weigh is counted."""

    def __init__(self, found: Evidence, answers: Answers, renderer: pictures.Renderer):
        self.answers, self.renderer, self.positions = answers, renderer, found.positions
        self.wells = well_ids(answers.table)
        self.features = _features(found, answers)
        self.left = renderer.affordable(10_000)
        self.weight = 0
        self._addresses: dict[int, str] = {}
        present = np.unique(answers.labels)
        each = pictures_each(len(present))
        self.choices = {
            int(label): choose(answers, self.wells, self.features, int(label), each)
            for label in present
        }

    @property
    def full(self) -> bool:
        """Whether there is no room, or no time, for more."""
        return self.weight >= BUDGET or self.left <= 0

    def shots(self, sites: Iterable[int]) -> str:
        """Pictures of sites side by side, framed by whether they were recognised."""
        return f'<div class="shots">{"".join(map(self._shot, sites))}</div>'

    def _shot(self, at: int) -> str:
        answers, site = self.answers, self.answers.table.iloc[at]
        if at not in self._addresses:
            self._addresses[at] = pictures.address(
                self.renderer.picture(self.positions[site["site_id"]])
            )
            self.left -= 1
        self.weight += len(self._addresses[at])
        told, own, right = (
            answers.class_names[answers.predicted[at]],
            site["label"],
            bool(answers.right[at]),
        )
        says = f"{'right' if right else f'taken for {told}'}, {answers.confidence[at]:.2f}"
        return pictures.shot(
            self._addresses[at],
            says,
            f"cells given {own}, {'recognised' if right else f'taken for {told}'}",
            css="right" if right else "wrong",
            tip=f"{own}: {says}\nplate {site[PLATE]}, well {site[WELL]}\n{site['site_id']}",
        )

    def of_class(self, label: int, *, opened: bool) -> str:
        """One class: right, wrong, typical."""
        choice, name = self.choices[label], self.answers.class_names[label]
        own = self.answers.labels == label
        recognised = f"{int(self.answers.right[own].sum())} of {int(own.sum())} sites recognised"
        head = f"{html_text(name)} <small>{recognised}</small>"
        kinds = (
            ("surest right", choice.right),
            ("surest wrong", choice.wrong),
            ("typical", choice.typical),
        )
        strips = "".join(
            f'<div class="strip"><p>{words}</p>{self.shots(sites)}</div>'
            for words, sites in kinds
            if sites
        )
        return (
            f'<details class="class" id="{anchor("class", name)}" data-name="{html_text(name)}"'
            f"{' open' if opened else ''}>"
            f'<summary>{head}</summary><div class="strips">{strips}</div></details>'
        )

    def of_pair(self, true: int, told: int, sites: int) -> str:
        """What is taken for what, beside what each of the two looks like."""
        answers = self.answers
        mistaken = np.flatnonzero((answers.labels == true) & (answers.predicted == told))
        surest = mistaken[np.argsort(-answers.confidence[mistaken], kind="stable")]
        a, b = (html_text(answers.class_names[at]) for at in (true, told))
        total = int((answers.labels == true).sum())
        shown = [(f"{a} taken for {b}", _spread(surest, self.wells, 2))]
        shown += [(f"typical {name}", self.choices[at].typical[:2] or self.choices[at].right[:2])
                  for name, at in ((a, true), (b, told)) if at in self.choices]  # fmt: skip
        strips = "".join(
            f'<div class="strip"><p>{words}</p>{self.shots(found)}</div>'
            for words, found in shown
            if found
        )
        return f'<h3>{a} → {b} <small>{sites} of {total} sites</small></h3><div class="strips">{strips}</div>'


def _features(found: Evidence, answers: Answers) -> np.ndarray | None:
    """Standardized features of the sites that judge, where there are any."""
    if found.features is None:
        return None
    rows = found.features.set_index("Metadata_site_id")
    values = (
        rows[[c for c in rows.columns if not c.startswith("Metadata_")]]
        .loc[answers.table["site_id"]]
        .to_numpy(float)
    )
    return (values - values.mean(axis=0)) / np.where(
        (deviation := values.std(axis=0)) > 0, deviation, 1
    )


def pairs(gallery: Gallery, confusion: Confusion) -> str:
    """The most confused pairs with their pictures."""
    number = {name: at for at, name in enumerate(gallery.answers.class_names)}
    parts: list[str] = []
    shown = np.zeros(len(confusion.names), dtype=int)
    for true, told, sites in confusion.pairs():
        if gallery.full or len(parts) == _PAIRS:
            break
        if shown[told] < _FOR_ONE:
            shown[told] += 1
            parts.append(
                gallery.of_pair(number[confusion.names[true]], number[confusion.names[told]], sites)
            )
    note = f"The most sites first, at most {_FOR_ONE} pairs taken for one class; all are in the matrix."
    return f'<p class="note">{note}</p>{"".join(parts)}' if parts else ""


def classes(gallery: Gallery) -> tuple[str, set[str]]:
    """Every class with its pictures, those with most errors first where they are many, and the names of those shown."""
    answers = gallery.answers
    order, many = _order(answers), len(gallery.choices) > ROOMY
    parts, shown = [], []
    for place, label in enumerate(order):
        if gallery.full:
            break
        parts.append(gallery.of_class(label, opened=not many or place < 3))
        shown.append(answers.class_names[label])
    find = (
        '<label>find <input type="search" data-filter="details.class"></label><output></output>'
        if many
        else ""
    )
    first = ", those with most errors first" if many else ""
    left = len(order) - len(shown)
    less = (
        f"; {left} with fewer errors are left out to keep the page below 10 MB and quick"
        if left
        else ""
    )
    note = f'<div class="tools">{find}<span>{len(shown)} of {len(order)} classes{first}{less}</span></div>'
    listed = f'<div class="album" tabindex="0">{"".join(parts)}</div>' if many else "".join(parts)
    return note + listed, set(shown)


def key(gallery: Gallery) -> str:
    """What colours and frames of the pictures mean."""
    return gallery.renderer.legend() + (
        '<p class="note"><span class="swatch" style="background:var(--right)"></span>solid blue frame: recognised. '
        '<span class="swatch" style="background:var(--wrong)"></span>dashed orange frame: taken for another class. The '
        "number is how sure it was. All are held-out sites.</p>"
    )


def _order(answers: Answers) -> Sequence[int]:
    """Classes with the most wrong answers first where there are many; else as they are called."""
    present = np.unique(answers.labels)
    if len(present) <= ROOMY:
        return [int(label) for label in sorted(present, key=lambda at: answers.class_names[at])]
    errors = np.bincount(answers.labels[~answers.right], minlength=len(answers.class_names))
    return [int(label) for label in present[np.argsort(-errors[present], kind="stable")]]

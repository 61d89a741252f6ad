"""The page of `perturbjax differences`: changed features in words, bar charts and pictures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from perturbjax.core.messages import html_text
from perturbjax.report.pages import figure, table
from perturbjax.report.pages.page import anchor, write_html
from perturbjax.report.svg import Chart, ticks
from perturbjax.report.well_images import WellImages
from perturbjax.screening.results import DifferencesResult

#: Features per chart, and treatments with a chart.
BARS, MAX_TREATMENTS = 15, 60
#: Maximum number of letters of a feature name, and pixels of a letter.
MAX_LETTERS, LETTER = 38, 7.3
#: Column of the page -> explanation on hover.
MEANINGS = {
    "changed": "Fraction of the features with q <= 0.05.",
    "in words": "Largest significant changes of features with a simple meaning.",
    "effect": "Median absolute effect of the features, in robust standard deviations of wells.",
    "features": "Number of features of the group.",
}

#: Columns of the groups of features.
_PARTS = ["compartment", "channel", "kind"]


def write_differences_page(
    result: DifferencesResult, out: Path, images: WellImages | None = None
) -> Path:
    """Write `differences.html`.

    Args:
        result: result of the command.
        out: folder.
        images: pictures of the wells, or None.

    Returns:
        Path of the page.
    """
    summary = result.summary
    changed = int((summary["changed"] > 0).sum())
    lead = (
        f'<p class="verdict">{changed} of {len(summary)} treatments change at least one feature '
        "(van Elteren test, false discovery rate 5 % over the features of a treatment).</p>"
    )
    drawn = list(summary["treatment"].head(MAX_TREATMENTS))
    sections = {
        "Treatments": _table(summary, drawn),
        "Features and cells": (images.legend() if images is not None else "")
        + "".join(_treatment(result, name, number, images) for number, name in enumerate(drawn)),
    }
    return write_html(out / "differences.html", "perturbjax differences", lead, sections)


def _table(summary: pd.DataFrame, drawn: list[str]) -> str:
    rows = summary.rename(columns={"description": "in words"})[["treatment", "changed", "in words"]]
    pictured = set(drawn)
    links = [
        f"#{anchor('treatment', name)}" if name in pictured else "" for name in rows["treatment"]
    ]
    return table("treatments", rows, meanings=MEANINGS, links=links, rows="treatments")


def _treatment(result: DifferencesResult, name: str, number: int, images: WellImages | None) -> str:
    """Words, chart, groups and pictures of one treatment."""
    features = result.features[result.features["treatment"] == name]
    words = result.summary.set_index("treatment").loc[name, "description"]
    cells = images.comparison(name) if images is not None and not images.full else ""
    groups = result.groups[result.groups["treatment"] == name].head(8)
    # Names of features can lack a compartment, channel or kind.
    empty = [column for column in _PARTS if groups[column].eq("").all()]
    named = len(empty) < len(_PARTS)
    rows = groups.drop(columns=["treatment", *empty]).replace("", "other")
    listed = table(anchor("groups", name), rows, meanings=MEANINGS)
    text, summary = html_text(name), html_text(words)
    return (
        f'<details class="class" id="{anchor("treatment", name)}" data-name="{text}"'
        f"{' open' if number < 3 else ''}><summary>{text} <small>{summary}</small></summary>"
        f"{_bars(name, features)}{cells}{listed if named else ''}</details>"
    )


def _shorten(name: str) -> str:
    """Replace the middle of a long name: the end names the channel."""
    return name if len(name) <= MAX_LETTERS else f"{name[:19]}…{name[-(MAX_LETTERS - 20) :]}"


def _bars(name: str, features: pd.DataFrame) -> str:
    """Effects of the features that changed most."""
    top = features[features["effect"].notna()].head(BARS)
    if top.empty:
        return ""
    low, high = min(float(top["effect"].min()), 0.0), max(float(top["effect"].max()), 0.0)
    margin = 0.04 * max(high - low, 1e-9)
    left = 12 + round(LETTER * max(len(_shorten(feature)) for feature in top["feature"]))
    chart = Chart(
        (low - margin, high + margin),
        # Reversed axis: the first feature is at the top.
        (len(top) - 0.5, -0.5),
        f"{name}: effect in robust standard deviations",
        f"{name}: " + "; ".join(f"{row.feature} {row.effect:.2f}" for row in top.itertuples()),
        width=left + 350,
        height=60 + 18 * len(top),
        left=left,
        bottom=34,
    )
    chart.grid(ticks(low, high, 6), ())
    for place, row in enumerate(top.itertuples()):
        _, py = chart.pixel(0, place)
        css = "strong" if row.q <= 0.05 else ""
        chart.text(left - 6, py + 4, _shorten(row.feature), "end", css)
        ratio = f"\n{row.ratio:.3g} times the controls" if row.ratio == row.ratio else ""
        tip = f"{row.feature}\neffect {row.effect:.3g}, q {row.q:.2g}{ratio}"
        css = "other" if not row.q <= 0.05 else "train" if row.effect < 0 else "test"
        chart.row_bar(row.effect, place, css, tip)
    caption = (
        f"The {len(top)} features with the largest effects. Orange: higher, blue: lower, gray: not "
        "significant (q > 0.05)."
    )
    rows = features[["feature", "effect", "ratio", "p", "q"]].head(200)
    return figure(anchor("bars", name), chart.svg(), caption, rows)

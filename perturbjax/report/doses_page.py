"""The page of `perturbjax doses`: a curve per treatment, and pictures along the dose axis."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.core.messages import html_text
from perturbjax.core.plates import PLATE, WELL
from perturbjax.report.pages import figure, table
from perturbjax.report.pages.page import anchor, write_html
from perturbjax.report.svg import Chart, ticks
from perturbjax.report.well_images import WellImages
from perturbjax.screening.results import DosesResult

#: Maximum number of curves on the page.
MAX_CURVES = 120
#: Column of the page -> explanation on hover.
MEANINGS = {
    "outcome": "Response: q of the trend test is at or below 0.05.",
    "trend": "1: every higher dose has a higher value. -1: every higher dose has a lower value.",
    "q": "Jonckheere-Terpstra test, Benjamini-Hochberg over treatments.",
    "EC50 (µM)": "Dose with half of the effect, with its 95 % interval; > or <: outside the doses.",
    "slope": "Hill slope.",
    "top": "Response at an infinite dose.",
    "largest effect": "Largest difference of a dose's mean from the mean at dose 0, or at the "
    "lowest dose.",
    "lowest effective dose (µM)": "Lowest dose that differs from dose 0, tested from the highest "
    "dose downwards.",
}


def write_doses_page(result: DosesResult, out: Path, images: WellImages | None = None) -> Path:
    """Write `doses.html`.

    Args:
        result: result of the command.
        out: folder.
        images: pictures of the wells, or None.

    Returns:
        Path of the page.
    """
    # Responding treatments first, most significant first.
    order = result.table.assign(
        none=~result.table["outcome"].str.startswith("response")
    ).sort_values(["none", "q", "treatment"], kind="stable")
    lead = f'<p class="verdict">{html_text(result.sentences()[0])}</p>' + (
        f"<p>Response: <b>{html_text(result.response)}</b>. Doses are in micromolar.</p>"
    )
    sections = {
        "Treatments": _table(order),
        "Curves": _curves(result, order.head(MAX_CURVES)),
        "Wells along the doses": _gallery(result, order, images),
    }
    return write_html(out / "doses.html", "perturbjax doses", lead, sections)


def _table(order: pd.DataFrame) -> str:
    rows = pd.DataFrame(
        {
            "treatment": order["treatment"],
            "outcome": order["outcome"],
            "EC50 (µM)": order["ec50_text"],
            "lowest effective dose (µM)": order["lowest_effective_dose"],
            "largest effect": order["max_effect"],
            "slope": order["slope"],
            "top": order["top"],
            "trend": order["trend"],
            "q": order["q"],
            "wells": order["wells"],
            "doses": order["doses"],
        }
    )
    drawn = order["treatment"].head(MAX_CURVES)
    links = [f"#{anchor('curve', name)}" for name in drawn] + [""] * (len(order) - len(drawn))
    return table(
        "doses",
        rows,
        meanings=MEANINGS,
        links=links,
        strong=order["outcome"].str.startswith("response").tolist(),
        rows="treatments",
    )


def _curves(result: DosesResult, order: pd.DataFrame) -> str:
    charts = "".join(
        f'<div id="{anchor("curve", row.treatment)}">{_curve(result, row)}</div>'
        for row in order.itertuples()
    )
    note = (
        f" The first {MAX_CURVES} treatments are drawn." if len(result.table) > len(order) else ""
    )
    caption = (
        "One point per well; gray points at the left are negative controls. The line is the fitted "
        "curve, drawn for treatments with a response. The orange bar is the EC50 with its 95 % "
        f"interval.{note}"
    )
    return figure("curves", f'<div class="row">{charts}</div>', caption, result.values)


def _curve(result: DosesResult, row: object) -> str:
    """Chart of one treatment."""
    name: str = row.treatment  # type: ignore[attr-defined]
    responds = row.outcome.startswith("response")  # type: ignore[attr-defined]
    values = result.values
    own = values[(values["treatment"] == name) & (values["dose"] > 0)]
    zero = values[values["control"] & values["plate"].isin(own["plate"])]
    x = np.log10(own["dose"].to_numpy(dtype=float))
    # Controls have no position on a logarithmic axis; they are drawn half a decade below.
    left = x.min() - (0.5 if len(zero) else 0.0)
    low, high = _range(result.values["response"])
    margin = 0.05 * (high - low)
    chart = Chart(
        (left - 0.15, x.max() + 0.15),
        (low - margin, high + margin),
        name,
        f"{name}: {row.outcome} {row.ec50_text}",  # type: ignore[attr-defined]
        "dose (µM)",
    )
    decades = [d for d in range(math.floor(x.min()), math.ceil(x.max()) + 1) if d >= x.min() - 0.15]
    decades = [d for d in decades if d <= x.max() + 0.15]
    chart.grid(decades, ticks(low, high, 5), lambda value: f"{10.0**value:g}")
    if len(zero):
        chart.text(*_below_axis(chart, left), "controls", "middle")
        tips = [
            f"control, plate {one.plate}, {one.well}\n{one.response:.4g}"
            for one in zero.itertuples()
        ]
        chart.dots([left] * len(zero), list(zero["response"]), "other", tips, 2.5)
    response = result.responses[name]
    if response.curve is not None and responds:
        grid = np.linspace(x.min(), x.max(), 80)
        chart.line(list(grid), list(response.curve(10**grid)), "train")
        if math.isfinite(response.ec50_low):
            ends = np.clip(np.log10([response.ec50_low, response.ec50_high]), *chart.x)
            chart.line(list(ends), [low - 0.6 * margin] * 2, "test", 3)
        spot = math.log10(response.curve.ec50)
        if chart.x[0] <= spot <= chart.x[1]:
            chart.dots([spot], [low - 0.6 * margin], "test", [f"EC50 {row.ec50_text}"])  # type: ignore[attr-defined]
    tips = [
        f"{one.dose:g} µM, plate {one.plate}, {one.well}\n{one.response:.4g}"
        for one in own.itertuples()
    ]
    chart.dots(list(x), list(own["response"]), "train", tips)
    words = f"EC50 {row.ec50_text}" if row.ec50_text else row.outcome  # type: ignore[attr-defined]
    chart.text(chart.width - 14, 14, words, "end")
    return chart.svg()


def _below_axis(chart: Chart, x: float) -> tuple[float, float]:
    px, py = chart.pixel(x, chart.y[0])
    return px, py + 15


def _range(values: pd.Series) -> tuple[float, float]:
    """Range of all responses without the most extreme 0.5 % at both ends, for a common axis."""
    low, high = np.quantile(values, [0.005, 0.995])
    return float(low), float(max(high, low + 1e-9))


def _gallery(result: DosesResult, order: pd.DataFrame, images: WellImages | None) -> str:
    """One row of pictures per treatment: controls, then one typical well per dose."""
    if images is None:
        return ""
    wells = result.wells
    parts: list[str] = []
    keys = pd.Series(
        range(len(wells.metadata)), index=wells.metadata[PLATE] + "\n" + wells.metadata[WELL]
    )
    for name in order["treatment"]:
        if images.full:
            break
        own = result.values[(result.values["treatment"] == name) & (result.values["dose"] > 0)]
        rows = keys[own["plate"] + "\n" + own["well"]].to_numpy()
        strips = images.strip("controls", images.controls(rows, 1))
        for dose in np.unique(own["dose"]):
            strips += images.strip(
                f"{dose:g} µM", images.typical(rows[(own["dose"] == dose).to_numpy()], 1), "right"
            )
        if strips:
            text = html_text(name)
            parts.append(
                f'<details class="class" data-name="{text}"{" open" if len(parts) < 6 else ""}>'
                f'<summary>{text}</summary><div class="strips">{strips}</div></details>'
            )
    note = f'<p class="note">{len(parts)} of {len(order)} treatments.</p>'
    return images.legend() + note + "".join(parts) if parts else ""

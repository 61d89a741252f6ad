"""The page of `perturbjax hits`: verdict, table, volcano plots, plate maps and pictures."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from perturbjax.core.messages import counted, html_text
from perturbjax.core.plates import PLATE, WELL
from perturbjax.report.pages import figure, table
from perturbjax.report.pages.page import anchor, write_html
from perturbjax.report.pages.plate_map import has_plate_positions, plate_maps
from perturbjax.report.svg import Chart, ticks
from perturbjax.report.well_images import WellImages
from perturbjax.screening.hit_tests import METHODS, NAMES, POSITIVE_CONTROL, TOXIC_RATIO
from perturbjax.screening.hits import significant
from perturbjax.screening.results import HitsResult
from perturbjax.screening.wells import scale_to_controls

#: Column of the page -> explanation on hover.
MEANINGS = {
    "active": "At least two methods have q at or below the false discovery rate.",
    "methods": "Number of methods with q at or below the false discovery rate.",
    "mAP": "Mean average precision: replicates rank each other before the controls. From 0 to 1.",
    "energy distance": "Distance between the distributions of treated and control wells.",
    "Mahalanobis distance": "Shift of the mean in units of the spread between like wells.",
    "beyond count": "Still active after the part that follows the cell count was removed.",
    "cell count": "Number of cells relative to the controls of the same plates.",
    "toxic": f"Cell count at or below {TOXIC_RATIO:g} times the controls.",
    "replicate correlation": "Mean Pearson correlation between replicate wells.",
    "detectable effect": "Smallest shift, in standard deviations between like wells, that is "
    "detected with a power of 80 %.",
    "permuted": "Wells are exchanged within plates, or whole positions of plates with one layout.",
}


def write_hits_page(result: HitsResult, out: Path, images: WellImages | None = None) -> Path:
    """Write `hits.html`.

    Args:
        result: result of the command.
        out: folder.
        images: pictures of the wells, or None.

    Returns:
        Path of the page.
    """
    sentences = result.sentences()
    lead = f'<p class="verdict">{html_text(sentences[0])}</p>' + "".join(
        f"<p>{html_text(_sentence(one))}</p>" for one in sentences[1:]
    )
    pictured, gallery = _gallery(result, images)
    sections = {
        "Treatments": _table(result, pictured),
        "Effect and significance": _volcano(result, pictured),
        "Agreement of the methods": _agreement(result),
        "Plate maps": _plate_maps(result, pictured),
        "Treated and control wells": gallery,
        "Flags": _flags(result),
    }
    return write_html(out / "hits.html", "perturbjax hits", lead, sections)


def _sentence(message: str) -> str:
    """Return a message of the command as a sentence of the page."""
    text = message.removeprefix("info: ")
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _link(name: str, pictured: set[str]) -> str:
    return f"#{anchor('treatment', name)}" if name in pictured else ""


def _table(result: HitsResult, pictured: set[str]) -> str:
    hits = result.table
    columns: dict[str, object] = {"treatment": hits["treatment"]}
    if (hits["role"] == POSITIVE_CONTROL).any():
        columns["role"] = hits["role"]
    columns |= {
        "active": _yes(hits["active"]),
        "methods": hits["methods"],
        "wells": hits["wells"],
        "plates": hits["plates"],
    }
    for method, name in NAMES.items():
        columns |= {name: hits[method], f"q {name}": hits[f"{method}_q"]}
    if hits["cell_count_ratio"].notna().any():
        columns |= {
            "beyond count": _yes(hits["active_beyond_count"]),
            "cell count": hits["cell_count_ratio"],
            "toxic": _yes(hits["toxic"]),
        }
    columns |= {
        "replicate correlation": hits["replicate_correlation"],
        "detectable effect": hits["min_detectable_effect"],
        "permuted": hits["unit"],
        "note": hits["note"],
    }
    return table(
        "hits",
        pd.DataFrame(columns),
        meanings=MEANINGS,
        links=[_link(name, pictured) for name in hits["treatment"]],
        strong=hits["active"].astype(bool).tolist(),
        rows="treatments",
    )


def _yes(values: pd.Series) -> pd.Series:
    return pd.Series(np.where(_is_true(values), "yes", ""), index=values.index)


def _is_true(values: pd.Series) -> np.ndarray:
    """Which values are true; missing values are not."""
    return np.array([value is True or value is np.True_ for value in values])


def _css(hits: pd.DataFrame) -> np.ndarray:
    """Style class of each treatment: toxic, active or inactive."""
    toxic = _is_true(hits["toxic"])
    active = hits["active"].to_numpy(dtype=bool)
    return np.where(toxic, "test", np.where(active, "train", "other"))


def _volcano(result: HitsResult, pictured: set[str]) -> str:
    """One chart per method: effect and -log10 q of every treatment."""
    hits, charts = result.table, []
    css = _css(hits)
    threshold = -np.log10(result.fdr)
    for method, name in NAMES.items():
        height = -np.log10(hits[f"{method}_q"])
        drawn = np.isfinite(height) & np.isfinite(hits[method])
        if not drawn.any():
            continue
        x, y = hits[method][drawn], height[drawn]
        low, high = float(min(x.min(), 0)), float(x.max())
        # + 0.0 prevents -0 from q = 1.
        top = max(float(y.max()), threshold) * 1.08 + 0.0
        chart = Chart(
            (low, low + 1.04 * max(high - low, 1e-9)),
            (0, top),
            f"{name}: -log10 q",
            f"{name} and -log10 q of {int(drawn.sum())} treatments; "
            f"{int(significant(hits, method, result.fdr).sum())} have q <= {result.fdr:g}",
            name,
        )
        chart.grid(ticks(low, high, 5), ticks(0, top, 5))
        chart.line(chart.x, (threshold, threshold), "dashed", 1)
        for kind in ("other", "train", "test"):
            rows = hits[drawn & (css == kind)]
            tips = [
                f"{row['treatment']}\n{name} {row[method]:.3g}, q {row[f'{method}_q']:.2g}"
                f"{_count_tip(row)}"
                for _, row in rows.iterrows()
            ]
            links = [_link(one, pictured) for one in rows["treatment"]]
            chart.dots(list(x[rows.index]), list(y[rows.index]), kind, tips, links=links)
        charts.append(chart.svg())
    if not charts:
        return "<p>No treatment has enough wells for a test.</p>"
    columns = hits[["treatment", *(f"{m}{end}" for m in NAMES for end in ("", "_q"))]]
    caption = (
        f"Points above the dashed line have q <= {result.fdr:g}. Blue: active. Orange: toxic. "
        "Gray: not active."
    )
    caption += " A click on a point leads to its pictures." if pictured else ""
    return figure("volcano", f'<div class="row">{"".join(charts)}</div>', caption, columns)


def _count_tip(row: pd.Series) -> str:
    ratio = row["cell_count_ratio"]
    return f"\n{ratio:.2f} times the cells of controls" if np.isfinite(ratio) else ""


def _agreement(result: HitsResult) -> str:
    """How many treatments the methods call active, and how far their lists overlap."""
    called = {name: significant(result.table, m, result.fdr) for m, name in NAMES.items()}
    rows = [(name, int(calls.sum())) for name, calls in called.items()]
    for (a, first), (b, second) in combinations(called.items(), 2):
        rows.append((f"{a} and {b}", int((first & second).sum())))
    rows.append(("all three", int(np.logical_and.reduce(list(called.values())).sum())))
    counts = pd.DataFrame(rows, columns=["called by", "treatments"])
    return table("agreement", counts) + (
        f'<p class="note">A method calls a treatment if q <= {result.fdr:g}. Two of {len(METHODS)} '
        "methods are required for an active treatment. The methods answer different questions, "
        "so their lists need not agree.</p>"
    )


def _plate_maps(result: HitsResult, pictured: set[str]) -> str:
    wells = result.wells
    if not has_plate_positions(wells.metadata):
        return ""
    active = result.table.set_index("treatment")["active"].astype(bool)
    scaled = scale_to_controls(wells)
    # The cutoff limits the weight of single features.
    distance = np.sqrt(np.nanmean(np.clip(scaled, -10, 10) ** 2, axis=1))
    kind = wells.treatment.map(active).map({True: "active", False: "not active"}).fillna("")
    roles = np.where(wells.control, "negative control", kind)
    index = wells.metadata[[PLATE, WELL]].assign(
        distance=distance,
        treatment=wells.treatment.to_numpy(),
        result=np.where(
            wells.positive, np.char.add(roles.astype(str), ", positive control"), roles
        ),
        site=[_link(name, pictured).removeprefix("#") for name in wells.treatment],
    )
    if wells.cell_count is not None:
        index["cells"] = wells.cell_count
    return plate_maps(
        "plates",
        index,
        color="distance",
        label=f"Maps of {counted(index[PLATE].nunique(), 'plate')}, colored by the distance from "
        "the controls",
        caption="Distance: root mean square over features, in standard deviations of the negative "
        "controls of the plate. Rows, columns or edges with other values point to an effect of "
        "position.",
    )


def _gallery(result: HitsResult, images: WellImages | None) -> tuple[set[str], str]:
    """Names of the treatments with pictures, and the pictures as HTML."""
    if images is None:
        return set(), ""
    pictured: set[str] = set()
    parts: list[str] = []
    for row in result.table.itertuples():
        if images.full:
            break
        body = images.comparison(row.treatment)
        if not body:
            continue
        pictured.add(row.treatment)
        state = "active" if row.active else "not active"
        name = html_text(row.treatment)
        parts.append(
            f'<details class="class" id="{anchor("treatment", row.treatment)}" data-name="{name}"'
            f"{' open' if len(parts) < 3 else ''}><summary>{name} <small>{state}</small></summary>"
            f"{body}</details>"
        )
    if not parts:
        return set(), "<p>The dataset has no images of the wells of the table.</p>"
    search = (
        '<div class="tools"><label>find <input type="search" data-filter="details.class"></label>'
        f"<output></output><span>{len(parts)} of {len(result.table)} treatments</span></div>"
    )
    legend = images.legend() + (
        '<p class="note">Wells closest to the median profile of their treatment. Blue frames: '
        "treated wells.</p>"
    )
    return pictured, f'{legend}{search}<div class="album" tabindex="0">{"".join(parts)}</div>'


def _flags(result: HitsResult) -> str:
    hits = result.table
    toxic = hits.loc[_is_true(hits["toxic"]), "treatment"]
    notes = hits["note"].str.split("; ").explode()
    notes = (
        notes[notes.fillna("") != ""].str.replace(r"\(smallest.*", "", regex=True).value_counts()
    )
    rows = [(text.strip(), int(count)) for text, count in notes.items()]
    listed = table("notes", pd.DataFrame(rows, columns=["note", "treatments"])) if rows else ""
    names = f": {', '.join(map(html_text, toxic))}" if len(toxic) else ""
    return (
        f"<p><b>Toxic</b> ({len(toxic)}{names}): the wells have at most {TOXIC_RATIO:g} times the "
        "cells of the controls, with p <= 0.05. The profile of dying cells differs from "
        "controls for any mechanism.</p><p><b>Beyond count</b>: the energy distance is tested "
        "again after the part of each feature that follows the logarithm of the cell count was "
        "removed. "
        "A treatment that is active but not beyond count differs by its cell count only.</p>"
        "<p><b>Position</b>: replicates in one row, in one column, at the edge or at one position "
        "share every effect of this position. Their effect cannot be distinguished from an effect "
        f"of position.</p>{listed}"
    )

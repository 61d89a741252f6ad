"""`preview.html`: what was built, plate by plate, before a network sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.files import atomic
from perturbjax.core.messages import html_text
from perturbjax.core.plates import PLATE, SITE, WELL
from perturbjax.dataset import Dataset
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.page import Section, anchor, page, table
from perturbjax.report.pages.plate_map import has_plate_positions, plate_maps

PREVIEW = "preview.html"
#: Plates that the page is called by.
TITLED = 3
#: Pictures on the page, outliers' among them: they decide what it weighs and what it costs.
PICTURES, PER_PLATE, OUTLIERS = 240, 24, 24
#: Ends of the measures whose outliers are sought on their own scale and not on a logarithmic one.
AS_THEY_ARE = (" focus", " saturated")
#: Plates above which their pictures stand in one section, side by side.
FEW = 8
#: Column of the label while wells are gathered.
_LABEL = "preview label"
#: A well is an outlier so many robust deviations from the middle of its plate.
FAR = 5.0
#: 1.4826 times the median distance from the median estimates the deviation of a normal distribution.
_NORMAL = 1.4826


def write_preview(dataset: Dataset) -> Path:
    """Write `preview.html` beside a dataset: a montage of each plate, its heat maps, and the wells that stand out.

    At most 240 sites are decoded, however many there are; the rest is from the index. The same dataset gives the same
    bytes wherever it lies.
    """
    wells = well_table(dataset)
    far = outliers(wells)
    renderer = pictures.renderer(dataset)
    plates = list(map(str, wells[PLATE].unique()))
    title = ", ".join(plates[:TITLED]) + (
        f" and {len(plates) - TITLED} plates more" if len(plates) > TITLED else ""
    )
    sections = [
        Section("plates", "Plates", _plates(wells, far)),
        Section("outliers", "Wells that stand out", _outliers(far, wells, renderer)),
        *_montages(dataset, wells, renderer),
    ]
    out = dataset.path / PREVIEW
    with atomic(out) as temporary:
        temporary.write_text(page(title, _lead(dataset, wells, far), sections), encoding="utf-8")
    return out


def well_table(dataset: Dataset) -> pd.DataFrame:
    """One row a well: `Metadata_Plate`, `Metadata_Well`, the label, `cells` (mean a site), `cell area` (pixels), of
    each channel intensity, contrast and, where the index has them, focus and saturated share, `sites`, and `position`,
    of the site that shows it."""
    index = dataset.index.assign(
        position=np.arange(len(dataset)), **{_LABEL: _labels(dataset).to_numpy()}
    )
    groups = index.groupby([PLATE, WELL], sort=False)
    cells = groups["n_cells"].sum()
    found = pd.DataFrame(
        {
            dataset.label_column.removeprefix("Metadata_") or "label": groups[_LABEL].first(),
            "cells": groups["n_cells"].mean(),
            "cell area": groups["mask_area"].sum() / cells.where(cells > 0),
        }
    )
    for channel in dataset.channel_names:
        found[f"{channel} intensity"] = groups[f"mean_{channel}"].mean()
        found[f"{channel} contrast"] = groups[f"std_{channel}"].mean() / found[
            f"{channel} intensity"
        ].clip(lower=1e-9)
    for column in _quality(dataset.index):
        kind, _, channel = column.partition("_")
        found[f"{channel} {kind}"] = groups[column].median()
    found["sites"] = groups.size()
    found["position"] = groups["position"].first()
    return found.reset_index()


def _quality(index: pd.DataFrame) -> list[str]:
    """Columns of focus and saturation, where the dataset has them."""
    return [column for column in index.columns if column.startswith(("focus_", "saturated_"))]


def _labels(dataset: Dataset) -> pd.Series:
    """The label of each site; empty where the dataset was built without one."""
    if not dataset.label_column:
        return pd.Series("", index=dataset.index.index)
    return dataset.column(dataset.label_column)


def _measures(wells: pd.DataFrame) -> list[str]:
    return [
        column
        for column in wells.columns
        if column in ("cells", "cell area")
        or column.endswith((" intensity", " contrast", *AS_THEY_ARE))
    ]


def outliers(wells: pd.DataFrame) -> pd.DataFrame:
    """Wells farther than `FAR` robust deviations from the median of their plate, the farthest first: `Metadata_Plate`,
    `Metadata_Well`, the label, `what`, `value`, `plate's median`, `deviations`, `position`.

    Cells and intensities are compared as logarithms, as they spread, focus (a slope) and saturation (a share) as they
    are; a well without a cell is always one.
    """
    rows = []
    for what in _measures(wells):
        values = wells[what].astype(float)
        if not what.endswith(AS_THEY_ARE):
            values = np.log(values.clip(lower=1e-6))
        score = values.groupby(wells[PLATE]).transform(lambda v: robust(v.to_numpy()))
        far = (score.abs() > FAR) | (wells["cells"].eq(0) if what == "cells" else False)
        middle = wells.groupby(PLATE)[what].transform("median")
        rows.append(
            wells.loc[far, [PLATE, WELL, wells.columns[2], "position"]].assign(
                what=what, value=wells.loc[far, what], median=middle[far], deviations=score[far]
            )
        )
    found = pd.concat(rows)
    order = (-found["deviations"].abs()).argsort(kind="stable")
    return found.iloc[order].rename(columns={"median": "plate's median"}).reset_index(drop=True)


def robust(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Distances from the median, in robust deviations; at least a twentieth is taken for one, where most are alike."""
    distance = values - np.nanmedian(values)
    return distance / max(_NORMAL * float(np.nanmedian(np.abs(distance))), 0.05)


def _lead(dataset: Dataset, wells: pd.DataFrame, far: pd.DataFrame) -> str:
    cells, empty = int(dataset.index["n_cells"].sum()), int((dataset.index["n_cells"] == 0).sum())
    label = dataset.label_column.removeprefix("Metadata_")
    segmenter = dataset.provenance.get("segmenter") or {}
    engine = (
        segmenter.get("engine") or segmenter.get("name") or ""
        if isinstance(segmenter, dict)
        else ""
    )
    by = f" by {html_text(engine)}" if engine else ""
    named = far.drop_duplicates([PLATE, WELL])
    verdict = (
        f"{cells:,} cells in {len(dataset):,} sites of {len(wells):,} wells on {wells[PLATE].nunique()} plates; "
        f"{len(named) or 'no'} {'wells stand' if len(named) > 1 else 'well stands'} out."
    )
    facts = [
        ("Label", f"{html_text(label)}, {_labels(dataset).nunique()} classes" if label else "none"),
        ("Channels", html_text(", ".join(dataset.channel_names))),
        ("Masks", f"{cells / len(dataset):.1f} cells a site{by}; {empty} sites without a cell"),
        ("Stored as", f"{dataset.image_dtype}, {_sizes(dataset)} pixels"),
    ]
    cells_of = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<p class="verdict">{verdict}</p><dl class="answers">{cells_of}</dl>'


def _sizes(dataset: Dataset) -> str:
    sizes = dataset.index[["height", "width"]].drop_duplicates()
    return (
        " × ".join(map(str, sizes.iloc[0]))
        if len(sizes) == 1
        else f"{len(sizes)} different sizes of"
    )


def _plates(wells: pd.DataFrame, far: pd.DataFrame) -> str:
    if not has_plate_positions(wells):
        return "<p>Wells are not named like A01: no plate can be drawn.</p>"
    flagged = pd.MultiIndex.from_frame(wells[[PLATE, WELL]]).isin(
        pd.MultiIndex.from_frame(far[[PLATE, WELL]])
    )
    drawn = wells.assign(
        flagged=flagged.astype(int), site=[_name(*well) for well in wells[[PLATE, WELL]].to_numpy()]
    )
    return plate_maps(
        "wells",
        drawn.drop(columns="position"),
        colour="cells",
        label=f"Maps of {wells[PLATE].nunique()} plates, each well coloured by its number of cells",
        caption="Choose what colours the wells. Ringed wells stand out (below). Focus is the slope of the power "
        "spectrum, lower out of focus; contrast is deviation over mean. Edges or "
        "rows that differ are of the plate, not of a treatment.",
    )


def _name(plate: str, well: str) -> str:
    return anchor("well", f"{plate}-{well}")


def _outliers(far: pd.DataFrame, wells: pd.DataFrame, renderer: pictures.Renderer) -> str:
    if far.empty:
        return f"<p>None: no well is farther than {FAR:g} robust deviations from the middle of its plate.</p>"
    shown = far.drop_duplicates([PLATE, WELL]).head(OUTLIERS)
    said = far.groupby([PLATE, WELL], sort=False)["what"].agg(", ".join)
    shots = [
        pictures.shot(
            pictures.address(renderer.picture(int(row["position"]))),
            f"{row[PLATE]} {row[WELL]}: {said[row[PLATE], row[WELL]]}",
            f"cells of well {row[WELL]} of plate {row[PLATE]}",
            css="outlier",
            name=_name(row[PLATE], row[WELL]),
        )
        for row in shown.to_dict("records")
    ]
    pictured = set(map(tuple, shown[[PLATE, WELL]].to_numpy()))
    links = [
        f"#{_name(*well)}" if tuple(well) in pictured else ""
        for well in far[[PLATE, WELL]].to_numpy()
    ]
    listed = far.drop(columns="position")[
        [WELL, PLATE, *far.columns.drop([WELL, PLATE, "position"])]
    ]
    listed = listed.rename(columns={PLATE: "plate", WELL: "well"})
    note = (
        f'<p class="note">Farther than {FAR:g} robust deviations (1.4826 times the median distance) from the median of '
        "their plate, on a logarithmic scale but for focus and saturation. A strong treatment stands out too: look "
        "before you drop one.</p>"
    )
    return (
        note
        + f'<div class="shots">{"".join(shots)}</div>'
        + table("outlier-table", listed, links=links, rows="findings")
    )


def _montages(
    dataset: Dataset, wells: pd.DataFrame, renderer: pictures.Renderer
) -> Iterator[Section]:
    """A section a plate; of many plates one section of all."""
    plates = list(wells[PLATE].unique())
    each = int(np.clip(PICTURES // len(plates), 4, PER_PLATE))
    shown = plates[: PICTURES // each]
    few, left = len(plates) <= FEW, len(plates) - len(shown)
    strips = []
    for number, plate in enumerate(shown):
        here = wells[wells[PLATE] == plate]
        chosen = here.iloc[np.unique(np.linspace(0, len(here) - 1, each).round().astype(int))]
        shots = f'<div class="shots">{"".join(_shot(dataset, renderer, row) for row in chosen.to_dict("records"))}</div>'
        count = f"{len(chosen)} of {len(here)} wells"
        if few:
            legend = renderer.legend() if number == 0 else ""
            yield Section(
                anchor("plate", plate),
                f"Plate {plate}",
                f'{legend}<p class="note">{count}.</p>{shots}',
            )
        strips.append(f'<div class="strip"><p>{html_text(plate)}: {count}</p>{shots}</div>')
    if not few:
        less = f'<p class="note">{left} plates more are in the maps above.</p>' if left else ""
        yield Section(
            "cells",
            "The cells",
            f'{renderer.legend()}{less}<div class="strips">{"".join(strips)}</div>',
        )


def _shot(dataset: Dataset, renderer: pictures.Renderer, row: dict) -> str:
    """The first site of a well, with its label."""
    label = list(row)[2]
    return pictures.shot(
        pictures.address(renderer.picture(int(row["position"]))),
        f"{row[WELL]}\n{row[label]}".strip(),
        f"cells of well {row[WELL]} {row[label]}".strip(),
        tip=_tip(dataset, row),
    )


def _tip(dataset: Dataset, row: dict) -> str:
    site = dataset.index.iloc[int(row["position"])]
    return (
        f"plate {row[PLATE]}, well {row[WELL]}, site {site.get(SITE, '?')}\n{site['n_cells']} cells"
    )

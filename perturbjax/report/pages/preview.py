"""`preview.html`: cells, plate maps and unusual wells of a dataset, to look at before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from perturbjax.core.files import atomic
from perturbjax.core.messages import counted, html_text
from perturbjax.core.plates import PLATE, SITE, WELL
from perturbjax.dataset import Dataset
from perturbjax.dataset.summary_card import describe_pixel_sizes
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages.page import Section, anchor, page, table
from perturbjax.report.pages.plate_map import has_plate_positions, plate_maps

PREVIEW = "preview.html"
#: Number of plates named in the title.
TITLED = 3
#: Maximum number of pictures on the page, per plate, and of outliers; they determine size and time.
PICTURES, PER_PLATE, OUTLIERS = 240, 24, 24
#: Suffixes of the measures that are compared on a linear instead of a logarithmic scale.
LINEAR_SCALE = (" focus", " saturated")
#: Above this number of plates all pictures are in one section.
FEW = 8
#: Temporary column of the label.
_LABEL = "preview label"
#: Wells farther than this many robust standard deviations from the plate median are outliers.
FAR = 5.0
#: Factor from the median absolute deviation to the standard deviation of a normal distribution.
_SD_PER_MAD = 1.4826


def write_preview(dataset: Dataset) -> Path:
    """Write `preview.html` into the dataset directory.

    At most 240 sites are decoded; everything else comes from the index. The same dataset gives the
    same bytes in every location.

    Returns:
        Path of the page.
    """
    # All numbers come from the index, so the page is fast for large datasets.
    wells = well_table(dataset)
    far = outliers(wells)
    renderer = pictures.make_renderer(dataset)
    plates = list(map(str, wells[PLATE].unique()))
    title = ", ".join(plates[:TITLED])
    if len(plates) > TITLED:
        title += f" and {len(plates) - TITLED} more plates"
    sections = [
        Section("plates", "Plate maps", _plates(wells, far)),
        Section("outliers", "Unusual wells", _outliers(far, renderer)),
        *_montages(dataset, wells, renderer),
    ]
    out = dataset.path / PREVIEW
    with atomic(out) as temporary:
        temporary.write_text(page(title, _lead(dataset, wells, far), sections), encoding="utf-8")
    return out


def well_table(dataset: Dataset) -> pd.DataFrame:
    """Summarize the index by well.

    Returns:
        One row per well: `Metadata_Plate`, `Metadata_Well`, the label, `cells` (mean per site),
        `cell area` (pixels), intensity and contrast of each channel, focus and saturation if the
        index has them, `sites`, and `position`, the dataset row of the site that is drawn.
    """
    labels = _labels(dataset).to_numpy()
    index = dataset.index.assign(**{"position": np.arange(len(dataset)), _LABEL: labels})
    groups = index.groupby([PLATE, WELL], sort=False)
    cells = groups["n_cells"].sum()
    columns = {
        dataset.label_column.removeprefix("Metadata_") or "label": groups[_LABEL].first(),
        "cells": groups["n_cells"].mean(),
        # Mean area per cell; NaN for wells without cells.
        "cell area": groups["mask_area"].sum() / cells.where(cells > 0),
    }
    for channel in dataset.channel_names:
        intensity = groups[f"mean_{channel}"].mean()
        columns[f"{channel} intensity"] = intensity
        columns[f"{channel} contrast"] = groups[f"std_{channel}"].mean() / intensity.clip(
            lower=1e-9
        )
    for column in index.columns:
        if column.startswith(("focus_", "saturated_")):
            kind, _, channel = column.partition("_")
            columns[f"{channel} {kind}"] = groups[column].median()
    columns |= {"sites": groups.size(), "position": groups["position"].first()}
    return pd.DataFrame(columns).reset_index()


def _labels(dataset: Dataset) -> pd.Series:
    """The label of each site; empty if the dataset has no label."""
    if not dataset.label_column:
        return pd.Series("", index=dataset.index.index)
    return dataset.column(dataset.label_column)


def _measures(wells: pd.DataFrame) -> list[str]:
    suffixes = (" intensity", " contrast", *LINEAR_SCALE)
    return [c for c in wells.columns if c in ("cells", "cell area") or c.endswith(suffixes)]


def outliers(wells: pd.DataFrame) -> pd.DataFrame:
    """Find wells that differ from the other wells of their plate.

    A well is an outlier if a measure is more than `FAR` robust standard deviations from the plate
    median. Cell numbers and intensities are compared as logarithms. A well without cells is always
    an outlier.

    Args:
        wells: from `well_table`.

    Returns:
        One row per well and measure, largest deviation first: `Metadata_Plate`, `Metadata_Well`,
        the label, `measure`, `value`, `plate median`, `deviations`, `position`.
    """
    rows = []
    for measure in _measures(wells):
        values = wells[measure].astype(float)
        if not measure.endswith(LINEAR_SCALE):
            # Ratios matter for counts and intensities; the limit avoids the logarithm of 0.
            values = np.log(values.clip(lower=1e-6))
        score = values.groupby(wells[PLATE]).transform(lambda v: robust(v.to_numpy()))
        # Scores are distances from the plate median in robust standard deviations.
        far = score.abs() > FAR
        if measure == "cells":
            far |= wells["cells"].eq(0)
        median = wells.groupby(PLATE)[measure].transform("median")
        # Column 2 contains the label, see `well_table`.
        rows.append(
            wells.loc[far, [PLATE, WELL, wells.columns[2], "position"]].assign(
                measure=measure,
                value=wells.loc[far, measure],
                median=median[far],
                deviations=score[far],
            )
        )
    table = pd.concat(rows)
    order = (-table["deviations"].abs()).argsort(kind="stable")
    return table.iloc[order].rename(columns={"median": "plate median"}).reset_index(drop=True)


def robust(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Distances from the median in robust standard deviations (1.4826 MAD).

    A standard deviation below 0.05 counts as 0.05, for plates whose wells are nearly equal.
    """
    if np.isnan(values).all():  # for example debris on a plate without cells
        return values
    distance = values - np.nanmedian(values)
    return distance / max(_SD_PER_MAD * float(np.nanmedian(np.abs(distance))), 0.05)


def _lead(dataset: Dataset, wells: pd.DataFrame, far: pd.DataFrame) -> str:
    cells, empty = int(dataset.index["n_cells"].sum()), int((dataset.index["n_cells"] == 0).sum())
    label = dataset.label_column.removeprefix("Metadata_")
    segmenter = dataset.provenance.get("segmenter") or {}
    engine = ""
    if isinstance(segmenter, dict):
        engine = segmenter.get("engine") or segmenter.get("name") or ""
    by = f", segmented with {html_text(engine)}" if engine else ""
    unusual = len(far.drop_duplicates([PLATE, WELL]))
    verdict = (
        f"{counted(cells, 'cell')} in {counted(len(dataset), 'site')} of "
        f"{counted(len(wells), 'well')} on {counted(wells[PLATE].nunique(), 'plate')}; "
        f"{counted(unusual, 'unusual well')}."
    )
    classes = counted(_labels(dataset).nunique(), "class", "classes")
    facts = [
        ("Label", f"{html_text(label)}, {classes}" if label else "none"),
        ("Channels", html_text(", ".join(dataset.channel_names))),
        (
            "Masks",
            f"{cells / len(dataset):.1f} cells per site{by}; {counted(empty, 'site')} without "
            "cells",
        ),
        ("Stored images", f"{dataset.image_dtype}, {_sizes(dataset)} pixels"),
        ("Pixel size", describe_pixel_sizes(dataset.pixel_sizes) or "unknown"),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<p class="verdict">{verdict}</p><dl class="answers">{listed}</dl>'


def _sizes(dataset: Dataset) -> str:
    sizes = dataset.index[["height", "width"]].drop_duplicates()
    if len(sizes) == 1:
        return " × ".join(map(str, sizes.iloc[0]))
    return f"{len(sizes)} different sizes in"


def _plates(wells: pd.DataFrame, far: pd.DataFrame) -> str:
    if not has_plate_positions(wells):
        return "<p>No plate maps: wells are not named like A01.</p>"
    # Plate and well together identify a well.
    keys = pd.MultiIndex.from_frame(wells[[PLATE, WELL]])
    flagged = keys.isin(pd.MultiIndex.from_frame(far[[PLATE, WELL]]))
    table = wells.assign(
        flagged=flagged.astype(int),
        site=[_anchor(*well) for well in wells[[PLATE, WELL]].to_numpy()],
    )
    plates = wells[PLATE].nunique()
    return plate_maps(
        "wells",
        table.drop(columns="position"),
        color="cells",
        label=f"Maps of {counted(plates, 'plate')}, wells colored by number of cells",
        caption="Select the color in the menu. Rings mark unusual wells (below). Focus is the "
        "slope of the power spectrum, lower when out of focus; contrast is standard deviation "
        "divided "
        "by mean. "
        "Edges or rows that differ point to an effect of the plate instead of a treatment.",
    )


def _anchor(plate: str, well: str) -> str:
    return anchor("well", f"{plate}-{well}")


def _outliers(far: pd.DataFrame, renderer: pictures.Renderer) -> str:
    if far.empty:
        return (
            f"<p>None: every well is within {FAR:g} robust standard deviations of the median "
            "of its plate.</p>"
        )
    # A well can be unusual by several measures but is drawn once.
    pictured = far.drop_duplicates([PLATE, WELL]).head(OUTLIERS)
    measures = far.groupby([PLATE, WELL], sort=False)["measure"].agg(", ".join)
    shots = []
    for row in pictured.to_dict("records"):
        shot = pictures.shot(
            renderer.shot_images(int(row["position"])),
            f"{row[PLATE]} {row[WELL]}: {measures[row[PLATE], row[WELL]]}",
            f"cells of well {row[WELL]} of plate {row[PLATE]}",
            css="outlier",
            name=_anchor(row[PLATE], row[WELL]),
        )
        shots.append(shot)
    targets = set(map(tuple, pictured[[PLATE, WELL]].to_numpy()))
    links = [
        f"#{_anchor(*well)}" if tuple(well) in targets else ""
        for well in far[[PLATE, WELL]].to_numpy()
    ]
    listed = far.drop(columns="position")
    listed = listed[[WELL, PLATE, *listed.columns.drop([WELL, PLATE])]]
    listed = listed.rename(columns={PLATE: "plate", WELL: "well"})
    note = (
        f'<p class="note">More than {FAR:g} robust standard deviations (1.4826 MAD) from the '
        "median of the plate, on a logarithmic scale except for focus and saturation. Strong "
        "treatments "
        "appear here too: look at the cells before you exclude a well.</p>"
    )
    gallery = f'<div class="shots">{"".join(shots)}</div>'
    return note + gallery + table("outlier-table", listed, links=links, rows="rows")


def _montages(
    dataset: Dataset, wells: pd.DataFrame, renderer: pictures.Renderer
) -> Iterator[Section]:
    """One section per plate; for many plates one section in total."""
    plates = list(wells[PLATE].unique())
    # At least four pictures per plate. With too many plates for that, only the first are drawn.
    each = int(np.clip(PICTURES // len(plates), 4, PER_PLATE))
    drawn = plates[: PICTURES // each]
    few, left = len(plates) <= FEW, len(plates) - len(drawn)
    strips = []
    for number, plate in enumerate(drawn):
        own = wells[wells[PLATE] == plate]
        # Evenly spaced wells of the plate, in the order of the table.
        chosen = own.iloc[np.unique(np.linspace(0, len(own) - 1, each).round().astype(int))]
        pictured = "".join(_shot(dataset, renderer, row) for row in chosen.to_dict("records"))
        shots = f'<div class="shots">{pictured}</div>'
        count = f"{len(chosen)} of {counted(len(own), 'well')}"
        if few:
            legend = renderer.legend() if number == 0 else ""
            body = f'{legend}<p class="note">{count}.</p>{shots}'
            yield Section(anchor("plate", plate), f"Plate {plate}", body)
        strips.append(f'<div class="strip"><p>{html_text(plate)}: {count}</p>{shots}</div>')
    if not few:
        more = counted(left, "more plate")
        rest = f'<p class="note">The maps above show {more}.</p>' if left else ""
        body = f'{renderer.legend()}{rest}<div class="strips">{"".join(strips)}</div>'
        yield Section("cells", "Cells", body)


def _shot(dataset: Dataset, renderer: pictures.Renderer, row: dict) -> str:
    """The first site of a well, with its label."""
    label = row[list(row)[2]]
    site = dataset.index.iloc[int(row["position"])]
    return pictures.shot(
        renderer.shot_images(int(row["position"])),
        f"{row[WELL]}\n{label}".strip(),
        f"cells of well {row[WELL]} {label}".strip(),
        tip=f"plate {row[PLATE]}, well {row[WELL]}, site {site.get(SITE, '?')}\n"
        f"{counted(int(site['n_cells']), 'cell')}",
    )

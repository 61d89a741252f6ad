"""Attention and occlusion maps, and scores with other masks."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8

from perturbjax.core.messages import counted, html_text
from perturbjax.evaluation.attribution import read_attribution, read_maps
from perturbjax.evaluation.class_attribution import CLASS_ATTRIBUTION, SMALLEST_LOSS
from perturbjax.evaluation.scores import METRICS
from perturbjax.report.cell_gallery import cell_gallery
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages import figure, table
from perturbjax.report.run_results import RunResults

#: Explanation of the compartments, see `evaluation.class_attribution`.
_COMPARTMENTS = (
    "mask: inside the outlines; with nuclei in the dataset nucleus and cytoplasm; background: "
    "outside the outlines."
)
#: Number of maps, and the contrast below which attention is called nearly uniform.
_MAPS, _UNIFORM = 8, 0.2


def attention_section(results: RunResults, renderer: pictures.Renderer | None) -> str:
    """Return scores with other masks, and maps next to their cells; empty without attribution."""
    attribution = read_attribution(results.folder)
    if attribution is None:
        return ""
    parts = []
    if "masks" in attribution:
        parts.append(_masks(attribution["masks"], attribution["sites"]))
    if "attention" in attribution:
        parts.append(_attention(attribution["attention"]))
        parts.append(_maps(results, renderer, "attention", 1.0, _legend("attention", "1")))
    if "cell_attention" in attribution:
        parts.append(_cell_attention(attribution["cell_attention"]))
        parts.append(cell_gallery(results, renderer))
    if "occlusion" in attribution:
        parts.append(_occlusion(attribution["occlusion"]))
        maps = read_maps(results.folder, "occlusion")
        # All maps have one scale, so that they can be compared.
        most = max((float(values.max()) for values in maps.values()), default=0.0)
        if most > 0:
            text = _legend("loss of probability", f"{most:.2f}")
            parts.append(_maps(results, renderer, "occlusion", most, text))
    parts.append(_classes(results))
    return "".join(parts)


def _classes(results: RunResults) -> str:
    """One table per class: importance of each channel in each compartment."""
    values = results.csv(CLASS_ATTRIBUTION)
    if values is None:
        return ""
    drawn = values[values["fraction"].notna()]
    tables = "".join(
        f'<div class="strip"><p>{html_text(name)} <small>{_size(rows)}</small></p>'
        f"{_heat_table(rows)}</div>"
        for name, rows in drawn.groupby("class", sort=False)
    )
    note = (
        '<p class="note">One channel of one compartment was hidden at a time: its pixels were '
        "replaced by their typical value on the plate. Numbers are percent of the total "
        "loss of probability of the class, over correctly predicted test sites. "
        f"{_COMPARTMENTS} Classes with a total loss below {SMALLEST_LOSS:g} have no table.</p>"
    )
    return f"<h3>Channels and compartments of each class</h3>{note}" + figure(
        "class-attribution",
        f'<div class="strips">{tables}</div>',
        "Stronger color: larger part of the loss.",
        values,
    )


def _size(rows: pd.DataFrame) -> str:
    """Number of sites and total loss of a class."""
    sites = counted(int(rows["sites"].iloc[0]), "site")
    return f"{sites}, total loss {rows['loss'].clip(lower=0).sum():.2f}"


def _heat_table(rows: pd.DataFrame) -> str:
    """Compartments as rows, channels as columns, percent as numbers and colors."""
    matrix = rows.pivot(index="compartment", columns="channel", values="fraction")
    matrix = matrix.loc[rows["compartment"].unique(), rows["channel"].unique()]
    heads = "".join(f'<th scope="col">{html_text(name)}</th>' for name in matrix.columns)
    lines = "".join(
        f'<tr><th scope="row" class="text">{html_text(name)}</th>'
        + "".join(
            f'<td style="--share:{100 * value:.0f}%">{100 * value:.0f}</td>'
            for value in matrix.loc[name]
        )
        + "</tr>"
        for name in matrix.index
    )
    return (
        f'<div class="wide" tabindex="0"><table class="heat"><thead><tr><td></td>{heads}</tr>'
        f"</thead><tbody>{lines}</tbody></table></div>"
    )


def _legend(name: str, maximum: str) -> str:
    return f'<p class="legend">{name} 0<span class="ramp"></span>{maximum}, same scale for all</p>'


def _masks(masks: dict[str, dict[str, float]], sites: int) -> str:
    rows = [
        {"masks": name, **{METRICS[m].words: value for m, value in scores.items()}}
        for name, scores in masks.items()
    ]
    note = (
        f"<p>Scores of the same network on {sites} test sites with other masks. The network was "
        "trained with masks: the differences measure how much it uses them, not the accuracy of a "
        "network trained without.</p>"
    )
    return note + table("masks-table", pd.DataFrame(rows), rows="masks")


def _attention(spread: dict[str, float]) -> str:
    conclusion = (
        "it selects parts of the site"
        if spread["contrast"] >= _UNIFORM
        else "it is nearly uniform and selects little"
    )
    return (
        f"<p>Within a site, attention ranges from <b>{spread['low']:.2f}</b> to "
        f"<b>{spread['high']:.2f}</b> (5th and 95th percentile of positions, mean over sites; "
        f"1 passes all features): {conclusion}.</p>"
    )


def _cell_attention(numbers: dict[str, float]) -> str:
    return (
        "<p>The prediction of a site is based on the weighted mean of the features of its cells. "
        f"Of <b>{numbers['cells']:.1f}</b> cells per site, <b>{numbers['effective']:.1f}</b> count "
        "effectively (inverse of the sum of squared weights, mean over sites).</p>"
    )


def _occlusion(numbers: dict[str, float]) -> str:
    return (
        "<p>The network has no attention, so parts of each site were hidden in turn. Hiding "
        "the most important part lowers the predicted probability by "
        f"<b>{numbers['largest']:.2f}</b> (mean "
        f"over sites). <b>{numbers['on_cells']:.0%}</b> of the total loss is at cells, which cover "
        f"{numbers['cells']:.0%} of the positions.</p>"
    )


def _maps(
    results: RunResults, renderer: pictures.Renderer | None, kind: str, most: float, legend: str
) -> str:
    """Cells of some classes next to their maps, on a scale from 0 to `most`."""
    test = results.test
    if renderer is None or test is None:
        return ""
    maps = read_maps(results.folder, kind)
    # Maps exist for a subset of the test sites only.
    has_map = test.table["site_id"].isin(maps).to_numpy()
    chosen: list[int] = []
    for label in np.unique(test.labels):
        own = np.flatnonzero((test.labels == label) & has_map)
        if len(own) and len(chosen) < _MAPS:
            # The most confident test site of the class that has a map.
            chosen.append(int(own[np.argsort(-test.confidence[own], kind="stable")][0]))
    pairs = ""
    for row in chosen:
        site = test.table.iloc[row]
        picture = renderer.picture(results.positions[site["site_id"]], whole=True)
        pairs += _pair(str(site["label"]), kind, maps[site["site_id"]], most, picture)
    return f'<div class="strips">{pairs}</div>{legend}'


def _pair(
    label: str,
    kind: str,
    values: Float[np.ndarray, "h w"],
    most: float,
    picture: UInt8[np.ndarray, "height width 3"],
) -> str:
    """A picture of cells next to its map."""
    cells = pictures.shot(pictures.address(picture), label, f"cells of class {label}")
    span = f"from {values.min():.2f} to {values.max():.2f}"
    name = "attention map" if kind == "attention" else "loss of probability when hidden"
    drawing = color_map(np.clip(values / most, 0, 1), picture.shape[:2])
    mapped = pictures.shot(pictures.address(drawing), span, f"{name}, {span}")
    return f'<div class="strip"><div class="shots">{cells}{mapped}</div></div>'


def color_map(
    values: Float[np.ndarray, "h w"], size: tuple[int, ...]
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a map at the size of a picture, with one square per position (viridis, 0 is dark).

    Args:
        values: from 0 to 1.
        size: height and width of the picture in pixels.
    """
    from matplotlib import colormaps

    rows, columns = (
        # Map position of each pixel row and each pixel column.
        np.arange(length) * cells // length
        for length, cells in zip(size, values.shape, strict=True)
    )
    colors = colormaps["viridis"](values[np.ix_(rows, columns)])[..., :3]
    return (colors * 255).round().astype(np.uint8)

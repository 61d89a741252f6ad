"""What the network looked at: its attention laid beside the cells, and what the score owes to the masks."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8

from perturbjax.evaluation.attribution import read_attribution, read_maps
from perturbjax.evaluation.scores import METRICS
from perturbjax.report.pages import cell_images as pictures
from perturbjax.report.pages import table
from perturbjax.report.run_results import Evidence

#: Sites shown, and places of a map below whose contrast it says that the mask hardly gates.
_SHOWN, _GATES = 8, 0.2


def looked_at(found: Evidence, renderer: pictures.Renderer | None) -> str:
    """Numbers, and maps of attention beside their cells; empty where nothing was looked at."""
    known = read_attribution(found.folder)
    if known is None:
        return ""
    parts = []
    if "masks" in known:
        parts.append(_masks(known["masks"], known["sites"]))
    if "attention" in known:
        parts.append(_words(known["attention"]))
        legend = (
            '<p class="legend">attention 0<span class="ramp"></span>1, the same scale for all</p>'
        )
        parts.append(_maps(found, renderer, "attention", 1.0, legend))
    if "occlusion" in known:
        parts.append(_lost(known["occlusion"]))
        maps = read_maps(found.folder, "occlusion")
        most = max((float(one.max()) for one in maps.values()), default=0.0)
        legend = f'<p class="legend">lost 0<span class="ramp"></span>{most:.2f}, the same scale for all</p>'
        parts.append(_maps(found, renderer, "occlusion", most, legend) if most > 0 else "")
    return "".join(parts)


def _masks(masks: dict[str, dict[str, float]], sites: int) -> str:
    rows = [
        {"masks": name, **{METRICS[m].words: value for m, value in scores.items()}}
        for name, scores in masks.items()
    ]
    note = (
        f"<p>The same network, asked of {sites} held-out sites once more with other masks. It was not trained without "
        "them: what it loses is what it took from them, not what could be had without.</p>"
    )
    return note + table("masks-table", pd.DataFrame(rows), rows="ways")


def _words(spread: dict[str, float]) -> str:
    gates = (
        "it tells places apart"
        if spread["contrast"] >= _GATES
        else "it lets nearly everything through alike, and hardly gates"
    )
    return (
        f"<p>Within a site, attention runs from <b>{spread['low']:.2f}</b> to <b>{spread['high']:.2f}</b> (5th and "
        f"95th percentile of its places, mean over sites; 1 lets everything through): {gates}.</p>"
    )


def _lost(numbers: dict[str, float]) -> str:
    return (
        "<p>It has no attention, so parts of a site were hidden one after the other. Where it matters most, that costs "
        f"<b>{numbers['largest']:.2f}</b> of the probability of its answer (mean over sites); "
        f"<b>{numbers['on_cells']:.0%}</b> of all that is lost lies about cells, which are {numbers['cells']:.0%} of "
        "the places.</p>"
    )


def _maps(
    found: Evidence, renderer: pictures.Renderer | None, kind: str, most: float, legend: str
) -> str:
    """Cells of some classes beside their maps, which run from 0 to `most`."""
    answers = found.answers
    if renderer is None or answers is None:
        return ""
    maps = read_maps(found.folder, kind)
    shown: list[int] = []
    for label in np.unique(answers.labels):
        own = np.flatnonzero(
            (answers.labels == label) & answers.table["site_id"].isin(maps).to_numpy()
        )
        if len(own) and len(shown) < _SHOWN:
            shown.append(int(own[np.argsort(-answers.confidence[own], kind="stable")][0]))
    pairs = ""
    for at in shown:
        site = answers.table.iloc[at]
        pairs += _pair(
            site,
            kind,
            maps[site["site_id"]],
            most,
            renderer.picture(found.positions[site["site_id"]], whole=True),
        )
    return f'<div class="strips">{pairs}</div>{legend}'


def _pair(
    site: pd.Series,
    kind: str,
    values: Float[np.ndarray, "h w"],
    most: float,
    picture: UInt8[np.ndarray, "high wide 3"],
) -> str:
    shots = pictures.shot(
        pictures.address(picture), str(site["label"]), f"cells given {site['label']}"
    )
    said = f"from {values.min():.2f} to {values.max():.2f}"
    alt = (
        f"{'attention to it' if kind == 'attention' else 'what is lost where it is hidden'}, {said}"
    )
    drawn = coloured(np.clip(values / most, 0, 1), picture.shape[:2])
    shots += pictures.shot(pictures.address(drawn), said, alt)
    return f'<div class="strip"><div class="shots">{shots}</div></div>'


def coloured(
    attention: Float[np.ndarray, "h w"], size: tuple[int, ...]
) -> UInt8[np.ndarray, "high wide 3"]:
    """A map at the size of a picture, each place a square of its colour; 0 is dark, 1 is yellow."""
    from matplotlib import colormaps

    rows, columns = (
        np.arange(length) * of // length for length, of in zip(size, attention.shape, strict=True)
    )
    return (
        (colormaps["viridis"](attention[np.ix_(rows, columns)])[..., :3] * 255)
        .round()
        .astype(np.uint8)
    )

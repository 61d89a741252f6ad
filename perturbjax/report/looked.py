"""What the network looked at: its attention laid beside the cells, and what the score owes to the masks."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8

from perturbjax.evaluation.looked import read_attention, read_looked
from perturbjax.evaluation.scores import METRICS
from perturbjax.pages import pictures, table
from perturbjax.report.evidence import Evidence

#: Sites shown, and places of a map below whose contrast it says that the mask hardly gates.
_SHOWN, _GATES = 6, 0.2


def looked_at(found: Evidence, painter: pictures.Painter | None) -> str:
    """Numbers, and maps of attention beside their cells; empty where nothing was looked at."""
    known = read_looked(found.folder)
    if known is None:
        return ""
    parts = []
    if "masks" in known:
        parts.append(_masks(known["masks"], known["sites"]))
    if "attention" in known:
        parts.append(_words(known["attention"]))
        parts.append(_maps(found, painter))
    return "".join(parts)


def _masks(masks: dict[str, dict[str, float]], sites: int) -> str:
    rows = [
        {"masks": name, **{METRICS[m].words: value for m, value in scores.items()}} for name, scores in masks.items()
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


def _maps(found: Evidence, painter: pictures.Painter | None) -> str:
    answers = found.answers
    if painter is None or answers is None:
        return ""
    maps = read_attention(found.folder)
    shown: list[int] = []
    for label in np.unique(answers.labels):
        own = np.flatnonzero((answers.labels == label) & answers.table["site_id"].isin(maps).to_numpy())
        if len(own) and len(shown) < _SHOWN:
            shown.append(int(own[np.argsort(-answers.confidence[own], kind="stable")][0]))
    pairs = "".join(_pair(answers.table.iloc[at], maps, found.positions, painter) for at in shown)
    legend = '<p class="legend">attention 0<span class="ramp"></span>1, the same scale for all</p>'
    return f'<div class="strips">{pairs}</div>{legend}'


def _pair(site: pd.Series, maps: dict[str, np.ndarray], positions: dict[str, int], painter: pictures.Painter) -> str:
    picture = painter.picture(positions[site["site_id"]], whole=True)
    attention = maps[site["site_id"]]
    shots = pictures.shot(pictures.address(picture), str(site["label"]), f"cells given {site['label']}")
    alt = f"attention to it, from {attention.min():.2f} to {attention.max():.2f}"
    shots += pictures.shot(pictures.address(coloured(attention, picture.shape[:2])), alt.split(", ")[1], alt)
    return f'<div class="strip"><div class="shots">{shots}</div></div>'


def coloured(attention: Float[np.ndarray, "h w"], size: tuple[int, ...]) -> UInt8[np.ndarray, "high wide 3"]:
    """A map at the size of a picture, each place a square of its colour; 0 is dark, 1 is yellow."""
    from matplotlib import colormaps

    rows, columns = (np.arange(length) * of // length for length, of in zip(size, attention.shape, strict=True))
    return (colormaps["viridis"](attention[np.ix_(rows, columns)])[..., :3] * 255).round().astype(np.uint8)

"""The page of `perturbjax similar`: heat map with dendrogram, neighbors and mechanisms."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from perturbjax.core.messages import html_text
from perturbjax.report.pages import figure, table
from perturbjax.report.pages.page import write_html
from perturbjax.report.svg import MIN_SCALE
from perturbjax.screening.results import SimilarResult

#: Colors of similarity -1, 0 and 1.
COLORS = ((0, 114, 178), (213, 94, 0))
GRAY = (170, 170, 170, 255)
#: Names are drawn up to this number of rows, at the size in pixels of one row.
MAX_NAMES, ROW = 150, 12
#: The same for maps of few rows.
FEW_ROWS, LARGE_ROW = 30, 24
#: Width of the drawing, of the names and of the dendrogram in pixels.
WIDTH, LEFT, TREE = 900, 190, 120
#: Column of the page -> explanation on hover.
MEANINGS = {
    "similarity": "Cosine similarity of the profiles, from -1 to 1.",
    "p": "Fraction of random pairs of control profiles that are at least as similar.",
    "q": "Benjamini-Hochberg over all pairs of the screen.",
    "own": "It is the mechanism of the treatment.",
    "neighbors": "Number of the nearest neighbors with this mechanism.",
}


def write_similar_page(result: SimilarResult, out: Path) -> Path:
    """Write `similar.html`.

    Args:
        result: result of the command.
        out: folder.

    Returns:
        Path of the page.
    """
    sentences = result.sentences()
    excluded = {
        "none": "All wells are compared.",
        "plate": "Wells of one plate are not compared.",
        "position": "Wells at one plate position are not compared.",
        "layout": "Wells of plates with one layout are not compared.",
    }.get(result.restriction, f"Wells with the same {result.restriction} are not compared.")
    lead = f'<p class="verdict">{html_text(sentences[0])}</p>' + "".join(
        f"<p>{html_text(one)}</p>" for one in (*sentences[1:], excluded)
    )
    sections = {
        "Similarity of treatments": _heat_map(result),
        "Nearest neighbors": _neighbors(result),
        "Mechanisms of the neighbors": _enrichment(result),
    }
    return write_html(out / "similar.html", "perturbjax similar", lead, sections)


def _heat_map(result: SimilarResult) -> str:
    matrix = result.matrix
    height, columns = matrix.shape
    named = height <= MAX_NAMES
    left = LEFT if named else 10
    tree = TREE if result.tree is not None else 0
    wide = WIDTH - left - tree
    # Small maps have square cells of a visible size.
    row = LARGE_ROW if height <= FEW_ROWS else ROW
    wide = min(wide, row * columns) if named else wide
    tall = row * height if named else wide * height / columns
    picture = _png(_colors(matrix.to_numpy(dtype=float)))
    marks = [
        f'<image href="{picture}" x="{left}" y="0" width="{wide}" height="{tall:.1f}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
    ]
    step = tall / height
    nearest = result.neighbors[result.neighbors["rank"] <= 3].groupby("treatment", sort=False)
    tips = {
        name: "\n".join(f"{row.neighbor}: {row.similarity:.2f}" for row in rows.itertuples())
        for name, rows in nearest
    }
    for number, name in enumerate(matrix.index):
        if named:
            marks.append(
                f'<text x="{left - 6}" y="{(number + 0.5) * step + 4:.1f}" text-anchor="end">'
                f"{html_text(_shorten(name))}</text>"
            )
        # An invisible bar over the row shows its nearest neighbors on hover.
        tip = html_text(f"{name}\nnearest neighbors:\n{tips.get(name, 'none')}")
        marks.append(
            f'<rect x="{left}" y="{number * step:.1f}" width="{wide}" height="{step:.2f}" '
            f'fill="transparent" data-tip="{tip}"/>'
        )
    if result.tree is not None:
        path = _tree_path(result.tree, left + wide + 4, tree - 8, step)
        marks.append(f'<path class="axis" fill="none" d="{path}"/>')
    width = left + wide + tree
    drawing = (
        f'<svg viewBox="0 0 {width} {tall + 4:.0f}" role="img" aria-label="Similarity of {height} '
        f'treatments with {columns} treatments" style="--narrow:{MIN_SCALE * width:.0f}px;'
        f'max-width:{width}px">{"".join(marks)}</svg>'
    )
    order = (
        "Rows and columns are in the order of the dendrogram at the right (average linkage of 1 - "
        "similarity)."
        if result.tree is not None
        else "Columns are the treatments of the reference."
        if result.has_reference
        else ""
    )
    caption = f"Orange: similarity 1, blue: -1, background: 0. Gray: not compared. {order}"
    return figure("similarity", drawing, caption, matrix.rename_axis("treatment").reset_index())


def _shorten(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"


def _colors(values: Float[np.ndarray, "n m"]) -> UInt8[np.ndarray, "n m 4"]:
    """Colors of similarities with their opacity; gray where a value is missing."""
    weight = np.nan_to_num(np.clip(values, -1, 1))[..., None]
    # A similarity of 0 is transparent, in the background color of the theme.
    colors = np.concatenate(
        [np.where(weight < 0, *map(np.array, COLORS)), np.rint(255 * np.abs(weight))], axis=-1
    )
    colors[~np.isfinite(values)] = GRAY
    return colors.astype(np.uint8)


def _png(picture: UInt8[np.ndarray, "h w 4"]) -> str:
    """Encode a picture without loss as a data URL."""
    import imagecodecs

    encoded = imagecodecs.png_encode(np.ascontiguousarray(picture))
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def _tree_path(tree: np.ndarray, left: float, width: float, step: float) -> str:
    """SVG path of a dendrogram. Its leaves are the rows of the heat map."""
    count = len(tree) + 1
    highest = max(float(tree[:, 2].max()), 1e-9)
    # Position along the rows and distance from them, of leaves and then of merges.
    y = [(leaf + 0.5) * step for leaf in range(count)]
    x = [0.0] * count
    parts = []
    for first, second, height, _ in tree:
        a, b = int(first), int(second)
        x_merge = height / highest * width
        parts.append(
            f"M{left + x[a]:.1f} {y[a]:.1f}H{left + x_merge:.1f}V{y[b]:.1f}H{left + x[b]:.1f}"
        )
        y.append((y[a] + y[b]) / 2)
        x.append(x_merge)
    return "".join(parts)


def _neighbors(result: SimilarResult) -> str:
    rows = result.neighbors.copy()
    if result.mechanism:
        rows.insert(1, "mechanism", rows["treatment"].map(result.mechanism).fillna(""))
        rows.insert(3, "its mechanism", rows["neighbor"].map(result.mechanism).fillna(""))
    similar = (rows["q"] <= 0.05).tolist()
    return table("neighbors", rows, meanings=MEANINGS, strong=similar, rows="pairs")


def _enrichment(result: SimilarResult) -> str:
    if not len(result.enrichment):
        return ""
    rows = result.enrichment.sort_values("p", kind="stable", ignore_index=True)
    rows["own"] = rows["own"].map({True: "yes", False: ""})
    note = (
        '<p class="note">Hypergeometric test: do more of the neighbors have this mechanism than '
        "neighbors drawn at random?</p>"
    )
    significant = (rows["q"] <= 0.05).tolist()
    return note + table("enrichment", rows, meanings=MEANINGS, strong=significant, rows="tests")

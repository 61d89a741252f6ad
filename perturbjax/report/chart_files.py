"""Charts of a page as SVG, PNG and PDF files, for slides and papers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perturbjax.core.files import atomic
from perturbjax.core.messages import PLOT_TEXT
from perturbjax.report.svg import Chart, Mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colors of the mark classes on white, as in the light mode of `page.css`.
_COLORS = {
    "train": "#0072b2", "test": "#d55e00", "other": "#55616d", "grid": "#e6e9ed",
    "axis": "#55616d", "dashed": "#55616d", "bar": "#0072b2", "strong": "#1d2733", "": "#55616d",
}  # fmt: skip
#: Charts of a row, space between charts in pixels, font size in pixels, and PNG pixels per pixel.
_ACROSS, _SPACE, _FONT, _SCALE = 3, 12, 11, 2
_FAMILY = "DejaVu Sans"


def write_charts(charts: Sequence[Chart], path: Path) -> list[Path]:
    """Write charts in rows as PATH.svg, PATH.png and PATH.pdf, on white.

    Args:
        charts: one chart or more.
        path: file without suffix.

    Returns:
        Paths of the files.
    """
    corners, width, height = _arrange(charts)
    svg = path.with_suffix(".svg")
    with atomic(svg) as temporary:
        temporary.write_text(_svg(charts, corners, width, height), encoding="utf-8")
    return [svg, *_write_with_matplotlib(charts, corners, width, height, path)]


def _arrange(charts: Sequence[Chart]) -> tuple[list[tuple[int, int]], int, int]:
    """Upper left corner of each chart, and width and height of all, in pixels."""
    corners, top, width = [], 0, 0
    for start in range(0, len(charts), _ACROSS):
        row, left = charts[start : start + _ACROSS], 0
        for chart in row:
            corners.append((left, top))
            left += chart.width + _SPACE
        width, top = max(width, left - _SPACE), top + max(chart.height for chart in row) + _SPACE
    return corners, width, top - _SPACE


def _svg(
    charts: Sequence[Chart], corners: Sequence[tuple[int, int]], width: int, height: int
) -> str:
    rules = "".join(
        f".{name}{{{'fill' if name in ('bar', 'strong') else 'stroke'}:{color}}}"
        f".dot.{name}{{fill:{color};stroke:none}}"
        for name, color in _COLORS.items()
        if name
    )
    style = (
        f"text{{font:{_FONT}px {_FAMILY},sans-serif;fill:{_COLORS['']}}}"
        f"text.strong{{font-weight:600}}.dashed{{stroke-dasharray:4 4}}{rules}"
    )
    drawn = "".join(
        chart.svg().replace(
            "<svg ", f'<svg x="{x}" y="{y}" width="{chart.width}" height="{chart.height}" ', 1
        )
        for chart, (x, y) in zip(charts, corners, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{drawn}</svg>\n'
    )


def _write_with_matplotlib(
    charts: Sequence[Chart],
    corners: Sequence[tuple[int, int]],
    width: int,
    height: int,
    path: Path,
) -> list[Path]:
    """Write PNG and PDF."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.family": _FAMILY, **PLOT_TEXT}):
        # One inch is 100 pixels of the chart.
        figure = Figure(figsize=(width / 100, height / 100))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        marks = [
            (m, corner) for c, corner in zip(charts, corners, strict=True) for m in c.all_marks()
        ]
        for order, (mark, corner) in enumerate(marks):
            _draw(axes, mark, corner, order)
        files = [path.with_suffix(".png"), path.with_suffix(".pdf")]
        for file in files:
            # Without a date, the same chart gives the same file.
            facts = {"CreationDate": None} if file.suffix == ".pdf" else {}
            with atomic(file) as temporary:
                figure.savefig(temporary, dpi=100 * _SCALE, format=file.suffix[1:], metadata=facts)
    return files


def _draw(axes: Axes, mark: Mark, corner: tuple[int, int], order: int) -> None:
    """Draw one mark in pixels; later marks cover earlier ones."""
    from matplotlib.patches import Circle, Rectangle

    points = [(x + corner[0], y + corner[1]) for x, y in mark.points]
    color = _COLORS[mark.css.removeprefix("dot ")]
    # matplotlib measures lines and text in points of 1/72 inch.
    point = 72 / 100
    if mark.kind == "text":
        sides = {"start": "left", "middle": "center", "end": "right"}
        weight = "bold" if mark.css == "strong" else "normal"
        x, y = points[0]
        axes.text(x, y, mark.words, color=color, fontsize=_FONT * point, ha=sides[mark.align],
                  va="baseline", weight=weight, zorder=order)  # fmt: skip
    elif mark.kind == "dot":
        axes.add_patch(Circle(points[0], mark.size, color=color, linewidth=0, zorder=order))
    elif mark.kind == "bar":
        (left, top), (right, low) = points
        size = (right - left, low - top)
        axes.add_patch(Rectangle((left, top), *size, color=color, linewidth=0, zorder=order))
    else:
        x_values, y_values = zip(*points, strict=True)
        style = "--" if mark.css == "dashed" else "-"
        axes.plot(x_values, y_values, style, color=color, linewidth=mark.size * point, zorder=order)

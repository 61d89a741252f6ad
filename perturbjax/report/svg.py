"""Line and point charts as SVG, styled by the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from perturbjax.core.messages import html_text

#: Minimum scale of a chart: text of 11 pixels remains readable.
MIN_SCALE = 0.8
Align = Literal["start", "middle", "end"]


class Mark(NamedTuple):
    """A part of a chart, in pixels.

    Attributes:
        kind: line, dot, bar or text.
        css: class that determines the color.
        points: points of a line, center of a dot, corners of a bar, or position of a text.
        size: width of a line or radius of a dot.
        words: the text, or the text on hover.
        align: side of a text at its position.
        link: target of a dot; empty for none.
    """

    kind: Literal["line", "dot", "bar", "text"]
    css: str
    points: list[tuple[float, float]]
    size: float = 0
    words: str = ""
    align: Align = "start"
    link: str = ""


@dataclass
class Chart:
    """A chart with two linear axes; marks are added in data units.

    Attributes:
        x, y: (minimum, maximum) of each axis.
        title: text above the chart.
        label: description for screen readers.
        x_name: name of the x axis.
        width, height: size in pixels.
        left, bottom: margins in pixels.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    title: str
    label: str
    x_name: str = ""
    width: int = 420
    height: int = 300
    left: int = 44
    bottom: int = 40
    marks: list[Mark] = field(default_factory=list)

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a data point."""
        (x0, x1), (y0, y1) = self.x, self.y
        right, top, low = self.width - 14, 26, self.height - self.bottom
        return (
            self.left + (x - x0) / ((x1 - x0) or 1) * (right - self.left),
            # The y axis of SVG points downwards.
            low - (y - y0) / ((y1 - y0) or 1) * (low - top),
        )

    def grid(
        self, xs: Iterable[float], ys: Iterable[float], x_text: Callable[[float], str] | None = None
    ) -> None:
        """Add grid lines with their values.

        Args:
            xs, ys: positions of the lines in data units.
            x_text: text of a position on the x axis; by default the number.
        """
        for x in xs:
            (px, low), (_, high) = self.pixel(x, self.y[0]), self.pixel(x, self.y[1])
            self.marks.append(Mark("line", "grid", [(px, low), (px, high)], 1))
            self.text(px, low + 15, x_text(x) if x_text else f"{x:g}", "middle")
        for y in ys:
            (left, py), (right, _) = self.pixel(self.x[0], y), self.pixel(self.x[1], y)
            self.marks.append(Mark("line", "grid", [(left, py), (right, py)], 1))
            self.text(left - 6, py + 4, f"{y:g}", "end")

    def text(self, px: float, py: float, words: str, align: Align = "start", css: str = "") -> None:
        """Add text at a pixel.

        Args:
            px, py: position in pixels.
            words: the text.
            align: side of the text at this position.
            css: class of the element.
        """
        self.marks.append(Mark("text", css, [(px, py)], words=words, align=align))

    def line(self, xs: Sequence[float], ys: Sequence[float], css: str, width: float = 2) -> None:
        """Add a line through points."""
        self.marks.append(Mark("line", css, list(map(self.pixel, xs, ys)), width))

    def dots(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        css: str,
        tips: Sequence[str] = (),
        size: float = 3.5,
        links: Sequence[str] = (),
    ) -> None:
        """Add points.

        Args:
            xs, ys: data units.
            css: class of the elements.
            tips: text of each point on hover.
            size: radius in pixels.
            links: target of each point; empty for none.
        """
        for number, spot in enumerate(map(self.pixel, xs, ys)):
            tip, link = tips[number] if tips else "", links[number] if links else ""
            self.marks.append(Mark("dot", css, [spot], size, tip, link=link))

    def bar(self, x0: float, x1: float, y: float, tip: str = "") -> None:
        """Add a bar from the x axis to y."""
        (left, top), (right, low) = self.pixel(x0, y), self.pixel(x1, self.y[0])
        width, height = max(right - left - 2, 1), max(low - top, 0)
        corners = [(left + 1, top), (left + 1 + width, top + height)]
        self.marks.append(Mark("bar", "bar", corners, words=tip))

    def row_bar(self, x: float, y: float, css: str, tip: str = "", height: float = 12) -> None:
        """Add a horizontal bar from 0 to x.

        Args:
            x, y: end and row of the bar in data units.
            css: class that gives the color.
            tip: text on hover.
            height: in pixels.
        """
        (zero, py), (end, _) = self.pixel(0, y), self.pixel(x, y)
        left, width = min(zero, end), max(abs(end - zero), 1)
        corners = [(left, py - height / 2), (left + width, py + height / 2)]
        self.marks.append(Mark("bar", f"dot {css}", corners, words=tip))

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Add a legend at the top right: (text, class)."""
        for row, (words, css) in enumerate(entries):
            self.legend_entry(self.width - 18, 40 + 16 * row, words, css)

    def legend_entry(self, px: float, py: float, words: str, css: str) -> None:
        """Add one entry of a legend at a pixel: text and a point of its color."""
        self.text(px - 9, py + 4, words, "end")
        self.marks.append(Mark("dot", css, [(px, py)], 4))

    def all_marks(self) -> list[Mark]:
        """Marks in drawing order, with title, name of the x axis and axis line."""
        (left, low), (right, _) = (self.pixel(x, self.y[0]) for x in self.x)
        title = Mark("text", "strong", [(self.left, 14)], words=self.title)
        spot = ((left + right) / 2, self.height - 6)
        name = Mark("text", "", [spot], words=self.x_name, align="middle")
        axis = Mark("line", "axis", [(left, low), (right, low)], 1)
        return [*self.marks, title, *([name] if self.x_name else []), axis]

    def svg(self) -> str:
        """Return the chart as an SVG element, in the colors of the page."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{html_text(self.label)}" style="--narrow:{MIN_SCALE * self.width:.0f}px;'
            f'max-width:{1.5 * self.width:.0f}px">'
            f"{''.join(map(_element, self.all_marks()))}</svg>"
        )


def _element(mark: Mark) -> str:
    """One mark as an SVG element."""
    (px, py), css = mark.points[0], f' class="{mark.css}"' if mark.css else ""
    if mark.kind == "text":
        return (
            f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{mark.align}"{css}>'
            f"{html_text(mark.words)}</text>"
        )
    tip = f' data-tip="{html_text(mark.words)}"' if mark.words else ""
    if mark.kind == "dot":
        dot = f'<circle class="dot {mark.css}" cx="{px:.1f}" cy="{py:.1f}" r="{mark.size}"{tip}/>'
        return f'<a href="{html_text(mark.link)}">{dot}</a>' if mark.link else dot
    if mark.kind == "bar":
        right, low = mark.points[1]
        size = f'width="{right - px:.1f}" height="{low - py:.1f}"'
        return f'<rect{css} x="{px:.1f}" y="{py:.1f}" {size}{tip}/>'
    # SVG path: M moves to the first point, L draws to the next ones.
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in mark.points)
    return f'<path{css} fill="none" stroke-width="{mark.size:g}" d="M{path}"/>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round values from low to high: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low, high: range.
        most: maximum number of steps.
    """
    span = max(high - low, 1e-12)
    # Largest power of ten that is not above the step for `most` intervals.
    step = 10.0 ** np.floor(np.log10(span / most))
    candidates = (step * factor for factor in (1, 2, 5, 10))
    step = next((c for c in candidates if span / c <= most), 10 * step)
    # The tolerance includes a tick at `low` despite rounding.
    first = np.ceil(low / step - 1e-9) * step
    # Formatting removes rounding errors such as 0.30000000000000004; + 0.0 converts -0 to 0.
    return [float(f"{value:.10g}") + 0.0 for value in np.arange(first, high + step * 1e-6, step)]

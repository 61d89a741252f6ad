"""Charts drawn once, as SVG: they print, and are there without a script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from perturbjax.core.messages import html_text


@dataclass
class Chart:
    """A field with two axes; marks are added in data units.

    Attributes:
        x, y: (least, greatest) of each axis.
        title: above the field.
        label: what is seen, for those who do not.
        width, height: of the whole, in pixels at its usual size.
        left: room for the names beside the field.
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
    _marks: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where in the drawing a point of the data is, in pixels."""
        (x0, x1), (y0, y1) = self.x, self.y
        right, top = self.width - 14, 26
        return (
            self.left + (x - x0) / ((x1 - x0) or 1) * (right - self.left),
            self.height
            - self.bottom
            - (y - y0) / ((y1 - y0) or 1) * (self.height - self.bottom - top),
        )

    def grid(self, xs: Iterable[float], ys: Iterable[float]) -> None:
        """Lines and numbers at these values."""
        for x in xs:
            (px, low), (_, high) = self.at(x, self.y[0]), self.at(x, self.y[1])
            self._marks.append(f'<path class="grid" d="M{px:.1f} {low:.1f}V{high:.1f}"/>')
            self.text(px, low + 15, f"{x:g}", "middle")
        for y in ys:
            (left, py), (right, _) = self.at(self.x[0], y), self.at(self.x[1], y)
            self._marks.append(f'<path class="grid" d="M{left:.1f} {py:.1f}H{right:.1f}"/>')
            self.text(left - 6, py + 4, f"{y:g}", "end")

    def text(self, px: float, py: float, words: str, where: str = "start", css: str = "") -> None:
        """Words at a place in pixels."""
        named = f' class="{css}"' if css else ""
        self._marks.append(
            f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{where}"{named}>{html_text(words)}</text>'
        )

    def line(self, xs: Sequence[float], ys: Sequence[float], css: str, width: float = 2) -> None:
        """Points joined in their order."""
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in map(self.at, xs, ys))
        style = "" if css == "dashed" else " fill=none"
        self._marks.append(f'<path class="{css}"{style} stroke-width="{width}" d="M{path}"/>')

    def dots(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        css: str,
        tips: Sequence[str] = (),
        size: float = 3.5,
    ) -> None:
        """A dot each, which says its tip on hover."""
        for at, (px, py) in enumerate(map(self.at, xs, ys)):
            tip = f' data-tip="{html_text(tips[at])}"' if tips else ""
            self._marks.append(
                f'<circle class="dot {css}" cx="{px:.1f}" cy="{py:.1f}" r="{size}"{tip}/>'
            )

    def bar(self, x0: float, x1: float, y: float, tip: str = "") -> None:
        """From the bottom up."""
        (left, top), (right, low) = self.at(x0, y), self.at(x1, self.y[0])
        self._marks.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{top:.1f}" width="{max(right - left - 2, 1):.1f}" '
            f'height="{max(low - top, 0):.1f}" data-tip="{html_text(tip)}"/>'
        )

    def key(self, entries: Sequence[tuple[str, str]]) -> None:
        """What colours mean, at the top right: (words, css)."""
        for row, (words, css) in enumerate(entries):
            px, py = self.width - 18, 40 + 16 * row
            self.entry(px, py, words, css)

    def entry(self, px: float, py: float, words: str, css: str) -> None:
        """A dot of that colour behind the words it stands for, at a place in pixels."""
        self.text(px - 9, py + 4, words, "end")
        self._marks.append(f'<circle class="dot {css}" cx="{px:.1f}" cy="{py:.1f}" r="4"/>')

    def svg(self) -> str:
        """The drawing."""
        (left, low), (right, _) = self.at(self.x[0], self.y[0]), self.at(self.x[1], self.y[0])
        self.text(self.left, 14, self.title, css="strong")
        if self.x_name:
            self.text((left + right) / 2, self.height - 6, self.x_name, "middle")
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{html_text(self.label)}" '
            f'style="max-width:{1.5 * self.width:.0f}px">{"".join(self._marks)}'
            f'<path class="axis" d="M{left:.1f} {low:.1f}H{right:.1f}"/></svg>'
        )


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from low to high, at most so many."""
    span = max(high - low, 1e-12)
    step = 10.0 ** np.floor(np.log10(span / most))
    step = next(
        (step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most), 10 * step
    )
    first = np.ceil(low / step - 1e-9) * step
    return [float(f"{value:.10g}") + 0.0 for value in np.arange(first, high + step * 1e-6, step)]

"""Lengths in images: a number of pixels, or text with a number of micrometers such as "20um"."""

from __future__ import annotations

import re

#: Number of pixels, or text with a number of micrometers.
Length = str | int
_MICROMETERS = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?[uµμ]m")


def parse_micrometers(length: Length) -> float | None:
    """Return the number of micrometers; None if the length is a number of pixels.

    Examples:
        >>> parse_micrometers("20um"), parse_micrometers("0.5 µm"), parse_micrometers(20)
        (20.0, 0.5, None)
    """
    match = _MICROMETERS.fullmatch(str(length))
    return float(match[1]) if match else None

"""Drawing one site: cells that touch, with nuclei, an actin cortex and microtubules, as a camera would see them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Float, UInt16

CHANNELS = ("DNA", "Actin", "Tubulin")
#: Radius of a typical cell in pixels, on a site of 128.
CELL_RADIUS = 15.0
#: Camera: constant offset and noise in grey values, grey values per photo-electron, and blur of the optics in pixels.
OFFSET, READ_NOISE, GAIN, BLUR = 400.0, 25.0, 12.0, 0.8
#: Least distance between neighbours' centres, in units of their radius: below 2, so that cells touch.
CLOSEST = 1.15
#: Share of cells that lie beside another where there is room.
GROUPED = 0.6


@dataclass(frozen=True)
class Drawing:
    """One site and its truth."""

    image: UInt16[np.ndarray, "h w 3"]
    nuclei: UInt16[np.ndarray, "h w"]
    cells: UInt16[np.ndarray, "h w"]


def draw_site(
    traits: dict[str, float], size: int, rng: np.random.Generator, *, magnification: float = 1.0
) -> Drawing:
    """Draw the cells of one site.

    Args:
        traits: one value for each of `layout.TRAITS`.
        size: height and width in pixels; the number of cells grows with the area.
        rng: decides everything the traits leave open.
        magnification: of the objective, as it were: cells are larger by it, and fewer.
    """
    expected = traits["count"] * (size / 128 / magnification) ** 2
    typical = CELL_RADIUS * magnification
    radius = typical * traits["cell_radius"]
    centres = _place(max(rng.poisson(expected), 1), size, CLOSEST * radius, rng)
    count = len(centres)
    radii = radius * np.exp(rng.normal(0, 0.10, count))
    nucleus_radii = typical * traits["nucleus_radius"] * np.exp(rng.normal(0, 0.08, count))
    level = np.exp(rng.normal(0, 0.15, (count, len(CHANNELS))))

    to_nucleus, angle = _distances(
        centres, nucleus_radii, 1 + 0.6 * (traits["elongation"] - 1), 0.03, size, rng
    )
    to_cell, _ = _distances(centres, radii, traits["elongation"], traits["irregularity"], size, rng)
    owner = to_cell.argmin(axis=0)
    inside_cell = np.take_along_axis(to_cell, owner[None], 0)[0]
    nucleus_owner = to_nucleus.argmin(axis=0)
    inside_nucleus = np.take_along_axis(to_nucleus, nucleus_owner[None], 0)[0]
    nuclei = np.where(inside_nucleus < 1, nucleus_owner + 1, 0).astype(np.uint16)
    cells = np.where(nuclei > 0, nuclei, np.where(inside_cell < 1, owner + 1, 0)).astype(np.uint16)

    dna = (
        _soft(inside_nucleus, 0.10)
        * level[nucleus_owner, 0]
        * _grain(size, 1.3, traits["granularity"], rng)
    )
    body = _soft(inside_cell, 0.06) * level[owner, 1]
    cortex = np.exp(-(((inside_cell - 0.9) / 0.12) ** 2)) * (inside_cell < 1.2)
    actin = (0.35 * body + 0.65 * cortex * level[owner, 1]) * _grain(
        size, 2.2, 0.6 * traits["fibres"], rng
    )
    around = np.take_along_axis(angle, owner[None], 0)[0]
    strands = 1 + traits["fibres"] * np.sin(9 * around + 4 * _noise(size, 5.0, rng))
    falling = np.clip(1.15 - 0.75 * inside_cell, 0, None) * (1 - 0.55 * _soft(inside_nucleus, 0.15))
    tubulin = _soft(inside_cell, 0.06) * falling * strands * level[owner, 2]
    tubulin *= _grain(size, 1.6, 0.8 * traits["granularity"], rng)
    light = np.stack(
        [dna * traits["dna"], actin * traits["actin"], tubulin * traits["tubulin"]], axis=-1
    )
    return Drawing(_camera(light, size, rng), nuclei, cells)


def _place(
    count: int, size: int, closest: float, rng: np.random.Generator
) -> Float[np.ndarray, "count 2"]:
    """Centres that keep their distance: of a few random places for each cell, those too near another are passed over.

    Most places lie beside a cell already there, so that cells come in groups, as they do in culture.
    """
    margin = 0.3 * closest
    placed = rng.uniform(margin, size - margin, (1, 2))
    for _ in range(count - 1):
        alone = rng.uniform(margin, size - margin, (12, 2))
        mother = placed[rng.integers(len(placed), size=12)]
        turn = rng.uniform(0, 2 * np.pi, 12)
        step = closest * rng.uniform(1.02, 1.35, 12)
        beside = mother + step[:, None] * np.stack([np.sin(turn), np.cos(turn)], axis=-1)
        tried = np.concatenate([beside, alone] if rng.random() < GROUPED else [alone, beside])
        inside = ((tried > margin) & (tried < size - margin)).all(axis=1)
        nearest = np.linalg.norm(tried[:, None] - placed[None], axis=-1).min(axis=1)
        fits = np.flatnonzero(inside & (nearest >= closest))
        if len(fits):
            placed = np.concatenate([placed, tried[fits[:1]]])
    return placed


def _distances(
    centres: Float[np.ndarray, "n 2"],
    radii: Float[np.ndarray, "n"],
    elongation: float,
    irregularity: float,
    size: int,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "n h w"], Float[np.ndarray, "n h w"]]:
    """Distance of each pixel from each cell's centre, 1 at its outline, and the angle it is seen at.

    The outline is an ellipse of axes' ratio `elongation` and the given area, with waves of the given height.
    """
    n = len(centres)
    tilt, two, three, five = rng.uniform(0, 2 * np.pi, (4, n, 1, 1)).astype(np.float32)
    ratio = np.sqrt(elongation * np.exp(rng.normal(0, 0.08, (n, 1, 1)))).astype(np.float32)
    grid = np.arange(size, dtype=np.float32)
    y = grid[None, :, None] - centres[:, 0, None, None].astype(np.float32)
    x = grid[None, None, :] - centres[:, 1, None, None].astype(np.float32)
    along = (np.cos(tilt) * x + np.sin(tilt) * y) / ratio
    across = (np.cos(tilt) * y - np.sin(tilt) * x) * ratio
    angle = np.arctan2(across, along)
    wave = (
        0.4 * np.cos(2 * angle + two)
        + 0.8 * np.cos(3 * angle + three)
        + 0.5 * np.cos(5 * angle + five)
    )
    outline = radii[:, None, None].astype(np.float32) * (1 + np.float32(irregularity) * wave)
    return np.hypot(along, across) / np.maximum(outline, 0.3 * radii.min()), angle


def _soft(distance: Float[np.ndarray, "h w"], width: float) -> Float[np.ndarray, "h w"]:
    """1 inside, 0 outside, over an edge of the given width."""
    return 1 / (1 + np.exp(np.clip((distance - 1) / (width / 2), -30, 30)))


def _noise(size: int, scale: float, rng: np.random.Generator) -> Float[np.ndarray, "h w"]:
    """Smooth noise of mean 0 and deviation 1, with structures of about `scale` pixels."""
    field = ndi.gaussian_filter(
        rng.standard_normal((size, size), dtype=np.float32), scale, mode="wrap"
    )
    return field / field.std()


def _grain(
    size: int, scale: float, strength: float, rng: np.random.Generator
) -> Float[np.ndarray, "h w"]:
    return np.exp(strength * _noise(size, scale, rng) - strength**2 / 2)


def _camera(
    light: Float[np.ndarray, "h w 3"], size: int, rng: np.random.Generator
) -> UInt16[np.ndarray, "h w 3"]:
    """Haze, uneven illumination, blur, photon noise and read noise, in 16 bits."""
    haze = ndi.gaussian_filter(light, (size / 10, size / 10, 0)) * 0.10 + 60
    place = np.linspace(-1, 1, size)
    vignette = 1 - 0.12 * (place[:, None] ** 2 + place[None, :] ** 2) / 2
    signal = ndi.gaussian_filter(light + haze, (BLUR, BLUR, 0)) * vignette[..., None]
    seen = (
        GAIN * rng.poisson(np.clip(signal, 0, None) / GAIN)
        + OFFSET
        + rng.normal(0, READ_NOISE, light.shape)
    )
    return np.clip(np.rint(seen), 0, 65535).astype(np.uint16)

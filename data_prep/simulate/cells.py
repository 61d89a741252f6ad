"""Draw one site: touching cells with nuclei, actin cortex and microtubules, and a camera model.

Every cell is an ellipse with a wavy outline. The three channels are products of a shape (nucleus,
cortex, microtubules), a random intensity per cell and a smooth random texture. The camera model
adds haze, vignetting, optical blur, photon noise and read noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Float, Int, UInt16

from data_prep.simulate.layout import ORGANIZATION

CHANNELS = ("DNA", "Actin", "Tubulin")
#: Radius of a typical cell in pixels, for a site of 128 x 128 pixels.
CELL_RADIUS = 15.0
#: Camera: offset and read noise in gray values, gray values per photoelectron, and optical blur in
#: pixels.
OFFSET, READ_NOISE, GAIN, BLUR = 400.0, 25.0, 12.0, 0.8
#: Minimum distance between the centers of two cells, in cell radii. Below 2, so that cells touch.
MIN_DISTANCE = 1.15
#: Fraction of cells that are placed next to another cell if there is space.
GROUPED_FRACTION = 0.6
#: In sites of up to this height and width, the distance of every pixel to every cell is computed;
#: in larger ones, to cells closer than so many times the largest radius. A larger site would need
#: minutes. All other pixels have the last distance, at which a cell emits no light.
WHOLE_SITE, SURROUNDINGS, FAR = 256, 3.0, 10.0


@dataclass(frozen=True)
class Drawing:
    """Image of one site and its ground-truth masks."""

    image: UInt16[np.ndarray, "h w 3"]
    nuclei: UInt16[np.ndarray, "h w"]
    cells: UInt16[np.ndarray, "h w"]


def draw_site(
    traits: dict[str, float], size: int, rng: np.random.Generator, *, magnification: float = 1.0
) -> Drawing:
    """Draw the cells of one site.

    Args:
        traits: One value for each trait of `layout.TRAITS`; those of `layout.ORGANIZATION` are
            typical if absent. A count of 0 gives an image without cells.
        size: Height and width in pixels. The number of cells is proportional to the area.
        rng: Random generator for positions, shapes and noise.
        magnification: Relative magnification of the objective: larger cells, and fewer.
    """
    typical_organization = {name: trait.typical for name, trait in ORGANIZATION.items()}
    traits = {**typical_organization, **traits}
    if traits["count"] == 0:
        blank = np.zeros((size, size), np.uint16)
        return Drawing(_simulate_camera(np.zeros((size, size, 3)), size, rng), blank, blank)
    # `count` refers to a site of 128 x 128 pixels at magnification 1.
    expected = traits["count"] * (size / 128 / magnification) ** 2
    typical = CELL_RADIUS * magnification
    radius = typical * traits["cell_radius"]
    centers = _place_cells(max(rng.poisson(expected), 1), size, MIN_DISTANCE * radius, rng)
    count = len(centers)
    # Log-normal variation between the cells of a site.
    radii = radius * np.exp(rng.normal(0, 0.10, count))
    nucleus_radii = typical * traits["nucleus_radius"] * np.exp(rng.normal(0, 0.08, count))
    level = np.exp(rng.normal(0, 0.15, (count, len(CHANNELS))))

    # Nuclei are less elongated than their cells.
    nucleus_elongation = 1 + 0.6 * (traits["elongation"] - 1)
    # Each pixel belongs to the cell, and to the nucleus, with the smallest relative distance. A
    # distance of 1 is the outline.
    nucleus_centers = centers
    if traits["polarity"]:
        # Each nucleus is moved in a random direction.
        turn = rng.uniform(0, 2 * np.pi, count)
        offset = np.stack([np.sin(turn), np.cos(turn)], axis=-1)
        nucleus_centers = centers + traits["polarity"] * radii[:, None] * offset
    nuclei_axes = _Axes.draw(nucleus_centers, nucleus_elongation, rng)
    nucleus_distance, nucleus_owner = _nearest(nuclei_axes, nucleus_radii, 0.03, size)
    cell_axes = _Axes.draw(centers, traits["elongation"], rng)
    cell_distance, owner = _nearest(cell_axes, radii, traits["irregularity"], size)
    # Label i + 1 is cell i; nucleus and cell have the same label.
    nuclei = np.where(nucleus_distance < 1, nucleus_owner + 1, 0).astype(np.uint16)
    # A nucleus always belongs to its cell, also where a neighboring cell is closer.
    cells = np.where(nuclei > 0, nuclei, np.where(cell_distance < 1, owner + 1, 0)).astype(
        np.uint16
    )

    dna = (
        _soft_step(nucleus_distance, 0.10)
        * level[nucleus_owner, 0]
        * _texture(size, 1.3 * traits["grain"], traits["granularity"], rng)
    )
    body = _soft_step(cell_distance, 0.06) * level[owner, 1]
    # A ring just inside of the outline.
    cortex = np.exp(-(((cell_distance - 0.9) / 0.12) ** 2)) * (cell_distance < 1.2)
    actin = (0.35 * body + 0.65 * cortex * level[owner, 1]) * _texture(
        size, 2.2 * traits["grain"], 0.6 * traits["fibres"], rng
    )
    # Microtubules: radial strands (irregular) that fade outward and avoid the nucleus. Their number
    # is whole, so that they are continuous around the cell.
    rows, columns = np.indices((size, size), sparse=True, dtype=np.float32)
    cell_angle = np.arctan2(*nuclei_axes.offsets(rows, columns, owner))
    number = max(round(traits["strands"]), 2)
    strands = 1 + traits["fibres"] * np.sin(number * cell_angle + 4 * _noise(size, 5.0, rng))
    fading = np.clip(1.15 - 0.75 * cell_distance, 0, None)
    fading = fading * (1 - 0.55 * _soft_step(nucleus_distance, 0.15))
    tubulin = _soft_step(cell_distance, 0.06) * fading * strands * level[owner, 2]
    tubulin *= _texture(size, 1.6 * traits["grain"], 0.8 * traits["granularity"], rng)
    light = np.stack(
        [dna * traits["dna"], actin * traits["actin"], tubulin * traits["tubulin"]], axis=-1
    )
    return Drawing(_simulate_camera(light, size, rng), nuclei, cells)


def _place_cells(
    count: int, size: int, distance: float, rng: np.random.Generator
) -> Float[np.ndarray, "count 2"]:
    """Draw cell centers with a minimum distance.

    For each cell, 12 positions next to existing cells and 12 uniform positions are drawn; the first
    valid one is used. Most cells try the positions next to others first and form groups, as in
    culture. A cell without a valid position is omitted.
    """
    # Avoids centers near the border of the site.
    margin = 0.3 * distance
    centers = rng.uniform(margin, size - margin, (1, 2))
    for _ in range(count - 1):
        uniform = rng.uniform(margin, size - margin, (12, 2))
        parents = centers[rng.integers(len(centers), size=12)]
        turn = rng.uniform(0, 2 * np.pi, 12)
        step = distance * rng.uniform(1.02, 1.35, 12)
        # Slightly farther than the minimum distance, in a random direction.
        adjacent = parents + step[:, None] * np.stack([np.sin(turn), np.cos(turn)], axis=-1)
        is_grouped = rng.random() < GROUPED_FRACTION
        trials = np.concatenate([adjacent, uniform] if is_grouped else [uniform, adjacent])
        inside = ((trials > margin) & (trials < size - margin)).all(axis=1)
        # Distance of each trial to the closest existing center, (24,).
        nearest = np.linalg.norm(trials[:, None] - centers[None], axis=-1).min(axis=1)
        valid = np.flatnonzero(inside & (nearest >= distance))
        if len(valid):
            centers = np.concatenate([centers, trials[valid[:1]]])
    return centers


class _Axes(NamedTuple):
    """Axes and irregularities of n ellipses."""

    centers: Float[np.ndarray, "n 2"]
    tilt: Float[np.ndarray, " n"]
    ratio: Float[np.ndarray, " n"]
    phases: Float[np.ndarray, "3 n"]

    @classmethod
    def draw(
        cls, centers: Float[np.ndarray, "n 2"], elongation: float, rng: np.random.Generator
    ) -> _Axes:
        """Draw the axes of each ellipse; `elongation` is the typical ratio of its axes."""
        n = len(centers)
        tilt, *phases = rng.uniform(0, 2 * np.pi, (4, n)).astype(np.float32)
        # The square root on both axes retains the area: (r * ratio) * (r / ratio) = r^2.
        ratio = np.sqrt(elongation * np.exp(rng.normal(0, 0.08, n))).astype(np.float32)
        return cls(centers.astype(np.float32), tilt, ratio, np.stack(phases))

    def offsets(
        self, rows: np.ndarray, columns: np.ndarray, k: int | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Offsets along the minor and the major axis, scaled so that ellipse `k` is a circle."""
        y, x = rows - self.centers[k, 0], columns - self.centers[k, 1]
        sine, cosine = np.sin(self.tilt[k]), np.cos(self.tilt[k])
        return (cosine * y - sine * x) * self.ratio[k], (cosine * x + sine * y) / self.ratio[k]


def _nearest(
    axes: _Axes, radii: Float[np.ndarray, " n"], irregularity: float, size: int
) -> tuple[Float[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """Compute the relative distance of each pixel to its nearest cell, and the cell's number.

    The distance is 1 on the outline: an ellipse with the area of a circle of radius `radii`, plus
    waves with relative amplitude `irregularity`. In large sites only the surroundings of each cell
    are computed; pixels farther away have the distance `FAR`.
    """
    rows, columns = np.indices((size, size), sparse=True, dtype=np.float32)
    reach = float(size) if size <= WHOLE_SITE else SURROUNDINGS * radii.max()
    distance = np.full((size, size), np.inf if reach == size else FAR)
    owner = np.zeros((size, size), np.int64)
    for k, (row, column) in enumerate(axes.centers):
        top, left = max(0, int(row - reach)), max(0, int(column - reach))
        window = np.s_[top : int(row + reach) + 1, left : int(column + reach) + 1]
        minor, major = axes.offsets(rows[window[0]], columns[:, window[1]], k)
        angle = np.arctan2(minor, major)
        two, three, five = axes.phases[:, k]
        wave = (
            0.4 * np.cos(2 * angle + two)
            + 0.8 * np.cos(3 * angle + three)
            + 0.5 * np.cos(5 * angle + five)
        )
        outline = radii[k].astype(np.float32) * (1 + np.float32(irregularity) * wave)
        # The lower limit prevents a division by values near 0 at strong waves.
        to_cell = np.hypot(major, minor) / np.maximum(outline, 0.3 * radii.min())
        nearer = to_cell < distance[window]
        distance[window][nearer], owner[window][nearer] = to_cell[nearer], k
    return distance, owner


def _soft_step(distance: Float[np.ndarray, "h w"], width: float) -> Float[np.ndarray, "h w"]:
    """Sigmoid from 1 inside (distance below 1) to 0 outside."""
    return 1 / (1 + np.exp(np.clip((distance - 1) / (width / 2), -30, 30)))


def _noise(size: int, scale: float, rng: np.random.Generator) -> Float[np.ndarray, "h w"]:
    """Smooth noise with standard deviation 1 and a correlation length of about `scale` pixels."""
    # Blurred white noise. The blur reduces its variance, so it is normalized below.
    field = ndi.gaussian_filter(
        rng.standard_normal((size, size), dtype=np.float32), scale, mode="wrap"
    )
    return field / field.std()


def _texture(
    size: int, scale: float, strength: float, rng: np.random.Generator
) -> Float[np.ndarray, "h w"]:
    """Log-normal noise with mean 1."""
    # exp(s * n) of standard normal n has the mean exp(s^2 / 2), which is divided out.
    return np.exp(strength * _noise(size, scale, rng) - strength**2 / 2)


def _simulate_camera(
    light: Float[np.ndarray, "h w 3"], size: int, rng: np.random.Generator
) -> UInt16[np.ndarray, "h w 3"]:
    """Add haze, vignetting, blur, photon noise and read noise; convert to 16 bits."""
    # Out-of-focus light and a constant background of 60 gray values.
    haze = ndi.gaussian_filter(light, (size / 10, size / 10, 0)) * 0.10 + 60
    axis = np.linspace(-1, 1, size)
    # Quadratic decrease to 88 % in the corners.
    vignette = 1 - 0.12 * (axis[:, None] ** 2 + axis[None, :] ** 2) / 2
    signal = ndi.gaussian_filter(light + haze, (BLUR, BLUR, 0)) * vignette[..., None]
    values = (
        # Photon noise: Poisson in photoelectrons, converted back to gray values.
        GAIN * rng.poisson(np.clip(signal, 0, None) / GAIN)
        + OFFSET
        + rng.normal(0, READ_NOISE, light.shape)
    )
    return np.clip(np.rint(values), 0, 65535).astype(np.uint16)

"""Extend nuclei to whole cells in a second stain, as CellProfiler's "Propagation" does.

A pixel belongs to the nucleus from which it is reached by the cheapest path. A step of a path costs

    length * sqrt(|gradient|^2 + REGULARIZATION),

where the gradient is that of the smoothed stain, scaled to [0, 1]. Paths are expensive across edges
of the stain, so that boundaries move to membranes and dark gaps. Without edges they are equidistant
from both nuclei. Costs come from Dijkstra's algorithm (`skimage.graph.MCP_Geometric`), and a
watershed of these costs gives each pixel the label of its nucleus.

Cells end where the stain is dark or at a maximum distance from their nucleus. The threshold is
relative to the stain around the nuclei, where cells are known to be, and lower for dim cells. It
therefore works in confluent fields, which have no background. A field without cell stain gives
cells that equal their nuclei.

Source: Jones, Carpenter and Golland 2005, Voronoi-based segmentation of cells on image manifolds,
doi 10.1007/11569541_54.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import scipy.ndimage as ndi
from jaxtyping import Bool, Float32, UInt, UInt16

from perturbjax.segmentation.foreground import analyze_foreground

#: Smoothing of the stain before its gradient and the threshold: standard deviation in pixels.
SMOOTH = 1.0
#: Weight of the distance in the cost of a step, in squared units of the scaled stain per pixel.
#: CellProfiler's default.
REGULARIZATION = 0.05
#: Threshold between the background (0) and the stain around the nuclei (1).
THRESHOLD = 0.35
#: Width of the ring around nuclei in which the stain is measured, and maximum distance of a cell
#: pixel from its nucleus, in diameters of the nuclei.
RING, REACH = 0.25, 1.5
#: Minimum threshold above the background in units of the noise.
MIN_CONTRAST = 3.0
#: Percentile of the stain that counts as background.
BACKGROUND = 1.0


def describe_propagation(channel: str) -> dict[str, Any]:
    """Return the provenance of cells that were extended from nuclei."""
    return {
        "method": "propagation from nuclei",
        "channel": channel,
        "version": f"scikit-image {version('scikit-image')}",
        "parameters": {
            "smooth": SMOOTH,
            "regularization": REGULARIZATION,
            "threshold": THRESHOLD,
            "ring": RING,
            "reach": REACH,
            "min_contrast": MIN_CONTRAST,
            "background": BACKGROUND,
        },
    }


def propagate(
    nuclei: UInt16[np.ndarray, "h w"], stain: UInt[np.ndarray, "h w"], diameter: float = 0.0
) -> UInt16[np.ndarray, "h w"]:
    """Extend each nucleus to a whole cell.

    Args:
        nuclei: instance labels of the nuclei; 0 is background.
        stain: channel that shows the whole cells.
        diameter: typical diameter of the nuclei in pixels; 0 takes the median of this site.

    Returns:
        Instance labels of the cells, with the labels of their nuclei. Each cell contains its
        nucleus.
    """
    from skimage.measure import label
    from skimage.segmentation import watershed

    foreground = analyze_foreground(stain[..., None])
    if not nuclei.any() or not foreground.present:
        return nuclei.copy()
    diameter = diameter or _median_diameter(nuclei)
    smooth = ndi.gaussian_filter(stain.astype(np.float32), SMOOTH)
    distance, nearest = ndi.distance_transform_edt(nuclei == 0, return_indices=True)
    ring = (distance > 0) & (distance <= max(RING * diameter, 1))
    # Label of the nearest nucleus in the rings, 0 elsewhere.
    rings = np.where(ring, nuclei[tuple(nearest)], 0)
    thresholds = _thresholds(smooth, rings, int(nuclei.max()), float(foreground.noise[0]))
    inside = (distance <= REACH * diameter) & (smooth > thresholds.min())
    _, span = foreground.ranges[0]
    costs = _path_costs(smooth / span, nuclei > 0, inside | (nuclei > 0))
    # The flood of the costs gives each pixel the label of the pixel before it on its cheapest path.
    cells = watershed(costs, nuclei.astype(np.int32), mask=np.isfinite(costs))
    cells[(smooth <= thresholds[cells]) & (nuclei == 0)] = 0
    # Regions of one label; those without a nucleus were cut off by the threshold.
    regions = label(cells, connectivity=1)
    cells[~np.isin(regions, np.unique(regions[nuclei > 0]))] = 0
    return _fill_holes(cells).astype(np.uint16)


def _thresholds(
    smooth: Float32[np.ndarray, "h w"],
    rings: UInt16[np.ndarray, "h w"],
    count: int,
    noise: float,
) -> Float32[np.ndarray, " n"]:
    """Return the minimum intensity of each cell by label; element 0 is that of the site.

    Cells that are dimmer than the median cell have a lower threshold, so that they do not vanish
    beside brighter ones.
    """
    background = float(np.percentile(smooth, BACKGROUND))
    ring = smooth[rings > 0]
    # Nuclei that fill the whole image have no ring.
    typical = float(np.median(ring)) if ring.size else background
    signal = np.full(count + 1, typical, np.float32)
    present = np.unique(rings[rings > 0])
    signal[present] = np.minimum(ndi.median(smooth, rings, present), typical)
    thresholds = background + np.maximum(THRESHOLD * (signal - background), MIN_CONTRAST * noise)
    return thresholds.astype(np.float32)


def _path_costs(
    scaled: Float32[np.ndarray, "h w"],
    nuclei: Bool[np.ndarray, "h w"],
    inside: Bool[np.ndarray, "h w"],
) -> np.ndarray:
    """Return the cost of the cheapest path from a nucleus to each pixel; infinite outside."""
    from skimage.graph import MCP_Geometric

    down, across = np.gradient(scaled)
    step = np.sqrt(down**2 + across**2 + REGULARIZATION)
    # Paths start at the outer pixels of nuclei; negative costs exclude pixels.
    starts = nuclei & ~ndi.binary_erosion(nuclei)
    step[~inside | (nuclei & ~starts)] = -1
    costs, _ = MCP_Geometric(step).find_costs(np.argwhere(starts))
    costs[nuclei] = 0
    return costs


def _fill_holes(cells: np.ndarray) -> np.ndarray:
    """Fill the holes of each cell that contain only background."""
    filled = cells.copy()
    for number, box in enumerate(ndi.find_objects(cells), start=1):
        if box is not None:
            part = filled[box]
            part[ndi.binary_fill_holes(cells[box] == number) & (part == 0)] = number
    return filled


def _median_diameter(nuclei: UInt16[np.ndarray, "h w"]) -> float:
    """Return the median diameter of disks with the areas of the nuclei."""
    areas = np.bincount(nuclei.ravel())[1:]
    return float(2 * np.sqrt(np.median(areas[areas > 0]) / np.pi))
